"""Convolution with its neighbours: values and gradients against float64, errors, traps."""

from __future__ import annotations

import contextlib
import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.parity import FACTOR
from glide_fast.ops import norm_convolution, use_reference
from tests.ops.norm_convolution_cases import Case, assert_exact, differentiate

# Large and small tiles; rests in every loop: tiles over the edge, channels and panels that fill no vector, a
# vector across the border of x and skip, groups across it.
MAPS = (
    Case(shape=(2, 32, 16, 16), out=48),
    Case(shape=(2, 32, 8, 8), skip=32, out=64),
    Case(shape=(1, 24, 18, 11), skip=16, out=33, groups=8),
    Case(shape=(3, 20, 7, 9), skip=13, out=7, groups=3),
)
SETTINGS = tuple(itertools.product(("none", "up", "down"), (False, True), ("shared", "each")))
MAP_CASES = [
    replace(case, resample=resample, film=film, residual=film, bias=bias)
    for case in MAPS
    for resample, film, bias in SETTINGS
]
HALVED_CASES = [replace(case, resample="up", residual=True, halved=True, film=True) for case in MAPS] + [
    replace(MAPS[0], residual=True, halved=True),
    Case(shape=(2, 8, 20), out=12, residual=True, halved=True),
]
OTHER_CASES = [
    *(
        replace(MAPS[0], layout=layout, skip=16)
        for layout in ("contiguous", "sliced", "channels_last_sliced")
    ),
    *(replace(case, groups=None, bias="none") for case in MAPS),
    replace(MAPS[0], groups=None, resample="up"),
    Case(shape=(2, 8, 4, 4), out=8),  # too small to transform weights for
    Case(shape=(30, 8, 1, 1), out=8, groups=2),
    Case(shape=(30, 8, 1, 13), out=8),
    Case(shape=(2, 8, 9, 9), out=8, kernel=1),
    Case(shape=(2, 8, 20), out=12, skip=4, residual=True),
    Case(shape=(1, 8, 4, 6, 4), out=12, film=True, resample="up"),
]


@pytest.mark.parametrize("case", [*MAP_CASES, *HALVED_CASES], ids=str)
@pytest.mark.usefixtures("isa")
def test_maps_are_exact_in_value_and_every_gradient(case: Case) -> None:
    assert_exact(case)


@pytest.mark.parametrize("case", OTHER_CASES, ids=str)
def test_other_forms_are_exact_in_value_and_every_gradient(case: Case) -> None:
    assert_exact(case)


@pytest.mark.parametrize(("channels", "size"), [(192, 64), (384, 32), (576, 16), (768, 8)])
def test_the_maps_of_glide_base_are_exact(channels: int, size: int) -> None:
    case = Case(shape=(1, channels, size, size), out=64, groups=32, film=True)
    assert_exact(case, factor=FACTOR, gradient_factor=FACTOR)


@pytest.mark.parametrize(
    "case", [MAPS[0], MAPS[2], HALVED_CASES[1], OTHER_CASES[3], OTHER_CASES[-2]], ids=str
)
def test_float64_and_the_reference_agree(case: Case) -> None:
    actual = differentiate(case.ours, case.inputs(torch.float64))
    exact = differentiate(case.plain, case.inputs(torch.float64))
    with use_reference():
        defined = differentiate(case.ours, case.inputs(torch.float64))
    for name, value in exact.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(defined[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [MAPS[0], OTHER_CASES[4], OTHER_CASES[-2], OTHER_CASES[-1]], ids=str)
def test_a_weights_gradient_is_laid_out_like_it(case: Case, dtype: torch.dtype) -> None:
    """So that whoever adds it up or steps by it has no copy to make."""
    given = case.inputs(dtype)
    dims = given["weight"].ndim - 2
    for layout in (torch.contiguous_format, {2: torch.channels_last, 3: torch.channels_last_3d}.get(dims)):
        if layout is not None:
            given["weight"] = given["weight"].detach().contiguous(memory_format=layout).requires_grad_()
            assert differentiate(case.ours, given)["weight"].stride() == given["weight"].stride()
            with use_reference():
                assert differentiate(case.ours, given)["weight"].stride() == given["weight"].stride()
    x, skip, weight = given["x"].detach(), given.get("skip"), given["weight"].detach()
    joined = x if skip is None else torch.cat([x, skip.detach()], dim=1)
    grad = torch.randn(len(x), len(weight), *x.shape[2:]).to(dtype)
    nothing = torch.empty(0, dtype=dtype)
    torch.library.opcheck(
        torch.ops.glide_fast.norm_convolution_backward.default,
        (grad, joined, None, None, None, None, None, nothing, nothing, 1, 1e-5, 0, weight, None, True, True),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_follows_the_reference(dtype: torch.dtype) -> None:
    case = replace(MAPS[0], film=True, residual=True)
    actual = differentiate(case.ours, case.inputs(dtype))
    with use_reference():
        defined = differentiate(case.ours, case.inputs(dtype))
    for name, value in defined.items():
        assert actual[name].dtype is dtype
        spread = 4 * torch.finfo(dtype).eps * float(value.abs().max())
        torch.testing.assert_close(actual[name].float(), value.float(), rtol=0, atol=spread)


WIDENED = [
    replace(MAPS[0], film=True, residual=True),
    replace(MAPS[1], resample="up", residual=True, halved=True, bias="each"),
    replace(MAPS[0], resample="down"),
    replace(MAPS[0], groups=None, resample="down"),
    replace(MAPS[0], layout="contiguous"),
    OTHER_CASES[7],
    *OTHER_CASES[-2:],
]
NARROW = ("x", "skip")


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", WIDENED, ids=str)
def test_float32_weights_read_narrow_maps_as_if_they_were_converted(
    case: Case, dtype: torch.dtype, reference: bool
) -> None:
    def converted(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return case.ours({name: each.float() for name, each in inputs.items()})

    inputs = {
        name: value.detach().to(dtype if name in NARROW else torch.float32).requires_grad_()
        for name, value in case.inputs().items()
    }
    with use_reference() if reference else contextlib.nullcontext():
        actual, expected = (differentiate(function, inputs) for function in (case.ours, converted))
        with torch.no_grad():
            assert torch.equal(case.ours(inputs), expected["output"])
    assert actual["output"].dtype is torch.float32
    for name, value in expected.items():
        assert actual[name].dtype is value.dtype
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("case", MAPS[:2], ids=str)
def test_only_wanted_gradients_are_computed(case: Case) -> None:
    inputs = case.inputs()
    exact = differentiate(case.ours, inputs)
    for wanted in inputs:
        leaves = {name: value.detach().requires_grad_(name == wanted) for name, value in inputs.items()}
        output = case.ours(leaves)
        arriving = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
        output.backward(arriving)
        torch.testing.assert_close(leaves[wanted].grad, exact[wanted])
        assert all(value.grad is None for name, value in leaves.items() if name != wanted)


@pytest.mark.parametrize("skip", [0, 13])
def test_the_backward_pass_keeps_the_inputs_and_no_map_besides(skip: int) -> None:
    case = replace(MAPS[0], film=True, skip=skip, groups=3 if skip else 4)
    inputs = case.inputs()
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.ours(inputs)
    maps = [shape for shape in saved if shape[2:] == inputs["x"].shape[2:]]
    assert maps == [inputs[name].shape for name in ("x", "skip") if name in inputs]


def test_threads_do_not_change_the_result() -> None:
    inputs = Case(shape=(3, 64, 32, 32), out=96, groups=8).inputs()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(differentiate(Case(shape=(3, 64, 32, 32), out=96, groups=8).ours, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_an_empty_batch_stays_empty() -> None:
    results = differentiate(MAPS[0].ours, replace(MAPS[0], shape=(0, 32, 16, 16)).inputs())
    assert results["output"].shape == (0, 48, 16, 16)
    assert not results["weight"].any()


def test_denormals_are_numbers_like_others() -> None:
    x = torch.full((1, 16, 16, 16), 1e-40)
    weight = torch.zeros(16, 16, 3, 3)
    weight[:, :, 1, 1] = 1
    torch.testing.assert_close(
        norm_convolution(x, weight), F.conv2d(x, weight, padding=1), rtol=0, atol=1e-38
    )


def test_inference_mode_and_copies_compute_the_same() -> None:
    inputs = MAPS[0].inputs()
    expected = MAPS[0].ours(inputs).detach()
    with torch.inference_mode():
        assert torch.equal(MAPS[0].ours(copy.deepcopy(inputs)), expected)


def test_a_fake_has_the_shape_and_layout_of_the_real() -> None:
    case = replace(MAPS[2], resample="up")
    with torch.device("meta"):
        fake = norm_convolution(
            **{name: torch.empty_like(value) for name, value in case.inputs().items()},
            groups=8,
            resample="up",
        )
    real = case.ours(case.inputs())
    assert fake.shape == real.shape
    assert fake.stride() == real.stride()


WRONG = {
    "weight has shape": {"weight": torch.zeros(4, 5, 3, 3)},
    r"\*odd sizes": {"weight": torch.zeros(4, 8, 2, 2)},
    "bias has shape": {"bias": torch.zeros(5)},
    "residual has shape": {"residual": torch.zeros(1, 4, 6, 5)},
    "skip .* must have the batch": {"skip": torch.zeros(1, 2, 5, 5)},
    "weight is torch.float64": {"weight": torch.zeros(4, 8, 3, 3, dtype=torch.float64)},
    "give x in 16 bits with a float32 weight": {"weight": torch.zeros(4, 8, 3, 3, dtype=torch.float16)},
    "weight is torch.float16 but x is torch.bfloat16": {
        "x": torch.zeros(1, 8, 6, 6, dtype=torch.bfloat16),
        "weight": torch.zeros(4, 8, 3, 3, dtype=torch.float16),
    },
    "bias is torch.float16 but weight is torch.float32": {
        "x": torch.zeros(1, 8, 6, 6, dtype=torch.float16), "bias": torch.zeros(4, dtype=torch.float16),
    },
    "residual is torch.float64 but weight": {"residual": torch.zeros(1, 4, 6, 6, dtype=torch.float64)},
    "skip is torch.float16 but x": {
        "skip": torch.zeros(1, 2, 6, 6, dtype=torch.float16), "weight": torch.zeros(4, 10, 3, 3),
    },
    "not divisible into 3 groups": {
        "norm_weight": torch.zeros(8), "norm_bias": torch.zeros(8), "groups": 3,
    },
    "belong together": {"norm_weight": torch.zeros(8)},
    "modulate a norm": {"scale": torch.zeros(1, 8), "shift": torch.zeros(1, 8)},
    "unknown resample": {"resample": "sideways"},
    "give floating-point": {"x": torch.zeros(1, 8, dtype=torch.int64)},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused(message: str) -> None:
    inputs: dict[str, Any] = {"x": torch.zeros(1, 8, 6, 6), "weight": torch.zeros(4, 8, 3, 3)}
    with pytest.raises(ValueError, match=message):
        norm_convolution(**inputs | WRONG[message])
