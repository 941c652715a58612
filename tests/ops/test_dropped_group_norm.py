"""GroupNorm with dropout: the random words, the share that is dropped, gradients, and what a CPU runs."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glide_fast.ops import dropped_group_norm, group_norm
from glide_fast.ops.dropped_group_norm import BACKWARD, FORWARD, draw_seed, kept, philox
from tests.ops.group_norm_cases import LAYOUTS, Case, Layout

# The known answers of Salmon et al.'s own library: counter, key, words.
ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
CASES = (
    Case(shape=(2, 12, 5, 4), groups=3, film=True, layout="channels_last"),
    Case(shape=(2, 6, 7), groups=2),
    Case(shape=(1, 6, 2, 3, 4), groups=3, film=True),
)


@pytest.mark.parametrize(("counter", "key", "words"), ANSWERS)
def test_words_are_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    first, second, third, fourth = (torch.tensor([word]) for word in counter)
    seed = key[0] + (key[1] << 32)
    found = philox((first, second, third, fourth), seed)
    assert tuple(int(word) for word in found) == words
    signed = seed - 2**64 if seed >= 2**63 else seed
    assert all(map(torch.equal, found, philox((first, second, third, fourth), signed)))


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_the_share_of_zeros_is_that_of_dropout(dropout: float) -> None:
    stays = kept(torch.empty(4, 64, 64, 64), dropout, 5).float()
    deviation = (dropout * (1 - dropout) / stays[0].numel()) ** 0.5
    assert (stays.mean((1, 2, 3)) - (1 - dropout)).abs().max() < 5 * deviation
    channels = stays.mean((0, 2, 3)) - (1 - dropout)
    assert channels.abs().max() < 5 * deviation * 4  # a channel has a 64th of 4 pictures
    halves = (stays - stays.mean()).flatten(2)
    neighbours = (halves[:, 1:] * halves[:, :-1]).mean()
    assert neighbours.abs() < 5 * dropout * (1 - dropout) / halves.numel() ** 0.5


def test_masks_differ_between_pictures_and_seeds_and_ignore_memory_order() -> None:
    x = torch.empty(2, 20, 6, 5)
    mask = kept(x, 0.5, 3)
    assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(mask, kept(x, 0.5, 4))
    assert not torch.equal(mask, kept(x, 0.5, 3 + 2**32))
    assert torch.equal(mask, kept(x.contiguous(memory_format=torch.channels_last), 0.5, 3))
    assert torch.equal(mask, kept(x.flatten(2), 0.5, 3).view_as(mask))


def test_the_expectation_is_the_norm_itself() -> None:
    x, weight, bias, *_ = (value.detach() for value in Case(shape=(1, 8, 3, 3)).inputs() if value is not None)
    draws = [FORWARD(x, weight, bias, None, None, 2, 1e-5, 0.3, seed)[0] for seed in range(2000)]
    expected = group_norm(x, weight, bias, groups=2, activation="silu")
    found = torch.stack(draws)
    slack = 5 * found.std(0) / len(draws) ** 0.5
    assert ((found.mean(0) - expected).abs() <= slack + 1e-6).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_is_kept_is_the_norm_over_the_share_kept(layout: Layout, dtype: torch.dtype) -> None:
    case = Case(shape=(2, 12, 5, 4), groups=3, film=True, layout=layout, dtype=dtype)
    x, weight, bias, scale, shift = (value.detach() for value in case.inputs() if value is not None)
    y, mean, rstd = FORWARD(x, weight, bias, scale, shift, 3, 1e-5, 0.25, 9)
    wide = [each.double() for each in (x, weight, bias)]
    film = {"scale": scale.double(), "shift": shift.double()}
    expected = group_norm(*wide, groups=3, activation="silu", **film) / 0.75 * kept(x, 0.25, 9)
    torch.testing.assert_close(y, expected.to(dtype))
    plain = torch.ops.glide_fast.group_norm_reference(x, weight, bias, scale, shift, 3, 1e-5, True, 0)
    assert y.stride() == plain[0].stride()
    assert all(map(torch.equal, (mean, rstd), plain[1:]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_differences(case: Case) -> None:
    inputs = [None if value is None else value.detach().double().requires_grad_() for value in case.inputs()]

    def function(*values: Tensor | None) -> Tensor:
        return FORWARD(*values, case.groups, 1e-5, 0.4, 11)[0]  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case, dtype: torch.dtype) -> None:
    inputs = [None if value is None else value.detach().to(dtype).requires_grad_() for value in case.inputs()]
    torch.library.opcheck(FORWARD, (*inputs, case.groups, 1e-5, 0.4, 11))
    plain = [None if value is None else value.detach() for value in inputs]
    y, *statistics = FORWARD(*plain, case.groups, 1e-5, 0.4, 11)
    torch.library.opcheck(BACKWARD, (y, *plain, *statistics, 0.4, 11))


def test_on_a_cpu_it_is_the_norm_and_pytorchs_dropout_bit_for_bit() -> None:
    x, weight, bias, scale, shift = Case(shape=(2, 64, 9, 7), film=True).inputs()
    assert x is not None
    torch.manual_seed(0)
    y = dropped_group_norm(x, weight, bias, scale=scale, shift=shift, dropout=0.3)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    norm = group_norm(x, weight, bias, scale=scale, shift=shift, activation="silu")
    assert torch.equal(y, F.dropout(norm, 0.3))
    assert torch.equal(state, torch.get_rng_state())
    without = dropped_group_norm(x, weight, bias, scale=scale, shift=shift, dropout=0.0)
    assert torch.equal(without, norm)


def test_recomputing_a_checkpointed_layer_draws_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[dropped_group_norm.__module__], "_is_fused", lambda _x: True)
    masks: list[Tensor] = []

    def layer(x: Tensor) -> Tensor:
        y = dropped_group_norm(x, torch.ones(8), torch.zeros(8), groups=2, dropout=0.5)
        masks.append(y.detach() != 0)
        return y.square()

    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert len(masks) == 2
    assert torch.equal(*masks)


def test_a_seed_is_drawn_from_the_default_generator_of_the_cpu() -> None:
    torch.manual_seed(4)
    first, second = draw_seed(), draw_seed()
    assert first != second
    torch.manual_seed(4)
    assert draw_seed() == first
    with torch.device("meta"), torch._subclasses.FakeTensorMode():
        assert draw_seed() == second


@pytest.mark.parametrize("dropout", [-0.1, 1.5, float("nan")])
def test_what_is_no_probability_is_refused(dropout: float) -> None:
    with pytest.raises(ValueError, match="is no probability; give one from 0 to 1"):
        dropped_group_norm(torch.ones(1, 4, 2), torch.ones(4), torch.ones(4), groups=2, dropout=dropout)
