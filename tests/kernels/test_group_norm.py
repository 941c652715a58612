"""GroupNorm's kernels, interpreted: values, statistics, gradients against the reference in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from glide_fast.kernels import group_norm as forward
from glide_fast.kernels import group_norm_backward as backward
from glide_fast.kernels import group_norm_tiles as tiles
from glide_fast.ops import reference
from glide_fast.ops.column_sums import COPIES
from glide_fast.ops.group_norm import resampled_shape
from tests.kernels.compiled import compile_cases, rehearse
from tests.kernels.interpreter import DEVICE
from tests.ops.group_norm_cases import Layout, laid_out

TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
NONE, UP, DOWN = reference.RESAMPLE_NONE, reference.RESAMPLE_UP, reference.RESAMPLE_DOWN
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: x [B, C, *space] with `skip` more channels beside it, and settings."""

    shape: tuple[int, ...]
    groups: int = 32
    skip: int = 0
    film: bool = True
    silu: bool = True
    mode: int = NONE
    layout: Layout = "channels_last"
    dtype: torch.dtype = torch.float32
    offset: float = 0.5

    def __str__(self) -> str:
        """The case's name in pytest's output."""
        name = "x".join(map(str, self.shape))
        kind = f"{'film' if self.film else 'plain'}-{'silu' if self.silu else 'linear'}-mode{self.mode}"
        return f"{name}+{self.skip}-g{self.groups}-{kind}-{self.layout}-{str(self.dtype)[6:]}"

    def inputs(self) -> list[Any]:
        """x, skip, weight, bias, scale, shift; FiLM is two halves of one projection, parameters float32."""
        generator = torch.Generator().manual_seed(sum(self.shape))

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        batch, channels, *space = self.shape
        wide = channels + self.skip
        x = laid_out(2 * draw(*self.shape) + self.offset, self.layout).to(self.dtype)
        skip = laid_out(draw(batch, self.skip, *space) - 1, self.layout).to(self.dtype) if self.skip else None
        film = (0.3 * draw(batch, 2 * wide)).to(self.dtype).chunk(2, dim=1) if self.film else (None, None)
        values = (x, skip, 1 + 0.3 * draw(wide), 0.2 * draw(wide), *film)
        return [None if value is None else value.to(DEVICE) for value in values]


def wide(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()


def error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the difference as a share of the norm."""
    return float((actual.double() - exact).norm() / exact.norm())


def run_forward(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    x, skip, *parameters = case.inputs()
    settings = (case.groups, EPS, case.silu, case.mode)
    if skip is None:
        return forward.group_norm(x, *parameters, *settings)
    norm = tiles.Norm(*parameters, *settings)
    y, statistics = forward.normalise(norm, x, skip, memory_format=torch.channels_last)
    return y, statistics.mean, statistics.rstd


def exact_forward(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    x, skip, *parameters = (wide(value) for value in case.inputs())
    x = x if skip is None else torch.cat([x, skip], dim=1)
    return reference.group_norm(x, *parameters, case.groups, EPS, case.silu, case.mode)


def assert_forward(case: Case) -> None:
    y, mean, rstd = run_forward(case)
    exact = exact_forward(case)
    assert y.dtype is case.dtype
    assert y.shape == exact[0].shape
    assert error(y, exact[0]) <= TOLERANCE[case.dtype]
    for actual, value in ((mean, exact[1]), (rstd, exact[2])):
        assert actual.dtype is torch.float32
        assert error(actual, value) <= TOLERANCE[torch.float32]


def assert_backward(case: Case) -> None:
    x, skip, *parameters = case.inputs()
    both = x if skip is None else torch.cat([x, skip], dim=1)
    exact_statistics = exact_forward(case)[1:]
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(resampled_shape(both, case.mode), generator=generator).to(DEVICE, case.dtype)
    grad = laid_out(grad, case.layout)
    saved = [value.float() for value in exact_statistics]
    settings = case.silu, case.mode
    summand = None
    if len(x) > 1:  # the gradient of another path, in a wider tensor of its own
        drawn = torch.randn((len(x), both.shape[1] + 3, *x.shape[2:]), generator=generator)
        summand = laid_out(drawn.to(DEVICE, case.dtype), case.layout)[:, 3:]
    if skip is None:
        actual = backward.group_norm_backward(grad, x, *parameters, *saved, *settings, summand, COPIES)
    else:
        norm = tiles.Norm(*parameters, case.groups, EPS, *settings)
        further = backward.Further(summand, sums=COPIES, skip=skip)
        actual = backward.gradients(norm, grad, x, tiles.Statistics(*saved), further)
    exact = reference.group_norm_backward(
        grad.double(), both.double(), *map(wide, parameters), *exact_statistics, *settings, wide(summand),
        COPIES,
    )  # fmt: skip
    assert actual[0].stride() == torch.empty_like(both, memory_format=reference.memory_format(x)).stride()
    for value, right, like in zip(actual, exact, (x, *parameters, x), strict=True):
        assert value.shape == right.shape
        if like is not None:
            assert value.dtype is like.dtype
            assert error(value, right) <= TOLERANCE[like.dtype]


@pytest.mark.parametrize(
    "case",
    [
        Case(shape=(2, 48, 9, 8), groups=4),
        Case(shape=(3, 20, 33), groups=5, silu=False),
        Case(shape=(2, 33, 5, 7), skip=15, groups=4),
    ],
    ids=str,
)
def test_two_paths_join_and_the_norm_is_left_for_who_needs_it(case: Case) -> None:
    x, skip, *parameters = case.inputs()
    both = x if skip is None else torch.cat([x, skip], dim=1)
    y, *saved = (each.float() for each in exact_forward(case))
    draws = torch.Generator().manual_seed(7)
    grad, summand, second = (torch.randn(y.shape, generator=draws).to(DEVICE, case.dtype) for _ in range(3))
    activated = torch.full_like(y, float("nan"))
    norm = tiles.Norm(*parameters, case.groups, EPS, case.silu, case.mode)
    further = backward.Further(summand, second, sums=3, activated=activated, skip=skip)
    actual = backward.gradients(norm, grad, x, tiles.Statistics(*saved), further)
    exact = reference.group_norm_backward(
        *map(wide, (grad, both, *parameters, *saved)), case.silu, case.mode, wide(summand + second), 3
    )
    for value, right in zip((*actual, activated), (*exact, wide(y)), strict=True):
        assert error(value, right) <= TOLERANCE[case.dtype]
    assert actual[5].shape == (3, both.shape[1])


# Groups of 6 to 48 channels, and odd ones; maps that fill no tile; what lies in two tile columns.
MEMBERS = (6, 12, 18, 24, 36, 48)
ODD = (
    Case(shape=(2, 33, 7, 5), groups=3),
    Case(shape=(2, 33, 7, 5), groups=33),
    Case(shape=(1, 150, 3, 11), groups=1),
    Case(shape=(2, 20, 23), groups=4, layout="contiguous"),
    Case(shape=(1, 20, 3, 5, 4), groups=5),
    Case(shape=(2, 8, 1, 1), groups=2),
    Case(shape=(1, 1, 5, 7), groups=1),
)
SOURCES: Any = pytest.mark.parametrize(
    ("channels", "skip", "mode", "layout"),
    [
        (*sizes, layout)
        for sizes in ((24, 48, NONE), (70, 20, DOWN), (5, 1, UP))
        for layout in ("channels_last", "contiguous", "channels_last_sliced")
    ],
)
KINDS = tuple(itertools.product((False, True), (False, True), (NONE, UP, DOWN)))


@pytest.fixture(autouse=True)
def _uninitialized_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[True, False], ids=["one_pass", "split"])
def one_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two ways that a forward pass can take."""
    if not request.param:
        monkeypatch.setattr(forward, "ONE_PASS_PIXELS", 0)


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("members", MEMBERS)
def test_groups_of_the_models_are_exact(members: int) -> None:
    assert_forward(Case(shape=(1, 8 * members, 8, 8), groups=8))


@pytest.mark.parametrize("members", MEMBERS)
def test_gradients_of_the_models_groups_are_exact(members: int) -> None:
    assert_backward(Case(shape=(2, 8 * members, 6, 6), groups=8))


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("case", ODD, ids=str)
def test_odd_shapes_are_exact(case: Case) -> None:
    assert_forward(case)


@pytest.mark.parametrize("case", ODD[:-2], ids=str)
def test_gradients_of_odd_shapes_are_exact(case: Case) -> None:
    assert_backward(case)


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize(("film", "silu", "mode"), KINDS)
def test_film_activation_and_resampling_are_exact(film: bool, silu: bool, mode: int) -> None:
    assert_forward(Case(shape=(2, 20, 7, 5), groups=4, film=film, silu=silu, mode=mode))


@pytest.mark.parametrize(("film", "silu", "mode"), KINDS)
def test_gradients_of_film_activation_and_resampling_are_exact(film: bool, silu: bool, mode: int) -> None:
    assert_backward(Case(shape=(2, 20, 7, 5), groups=4, film=film, silu=silu, mode=mode))


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", [NONE, UP, DOWN])
def test_half_precision_is_float32_arithmetic_rounded_once(dtype: torch.dtype, mode: int) -> None:
    case = Case(shape=(1, 33, 6, 7), groups=3, mode=mode, dtype=dtype)
    assert_forward(case)
    assert_backward(case)


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "channels_last_sliced"])
@pytest.mark.parametrize("mode", [NONE, UP])
def test_every_layout_is_read_and_its_format_kept(layout: Layout, mode: int) -> None:
    case = Case(shape=(2, 20, 7, 5), groups=4, layout=layout, mode=mode)
    assert_forward(case)
    assert_backward(case)
    y = run_forward(case)[0]
    assert y.is_contiguous(memory_format=reference.memory_format(case.inputs()[0]))


@pytest.mark.usefixtures("one_pass")
@SOURCES
def test_two_sources_are_as_one(channels: int, skip: int, mode: int, layout: Layout) -> None:
    assert_forward(Case(shape=(2, channels, 6, 5), skip=skip, groups=6, mode=mode, layout=layout))


@SOURCES
def test_gradients_of_two_sources_are_those_of_one(
    channels: int, skip: int, mode: int, layout: Layout
) -> None:
    assert_backward(Case(shape=(2, channels, 6, 5), skip=skip, groups=6, mode=mode, layout=layout))


def test_sources_of_different_formats_are_read() -> None:
    case = Case(shape=(1, 12, 6, 5), skip=6, groups=3)
    x, skip, *parameters = case.inputs()
    norm = tiles.Norm(*parameters, 3, EPS, True, NONE)
    y, statistics = forward.normalise(norm, x, skip.contiguous(), memory_format=torch.channels_last)
    assert error(y, exact_forward(case)[0]) <= 1e-6
    results = (
        backward.gradients(norm, y, x, statistics, backward.Further(skip=each))
        for each in (skip, skip.contiguous())
    )
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_saved_statistics_are_used_as_they_are() -> None:
    case = Case(shape=(2, 33, 7, 5), groups=3)
    x, _, *parameters = case.inputs()
    norm = tiles.Norm(*parameters, case.groups, EPS, True, NONE)
    statistics = tiles.Statistics(*(value.float() for value in exact_forward(case)[1:]))
    y, same = forward.normalise(norm, x, memory_format=torch.channels_last, saved=statistics)
    assert same is statistics
    assert error(y, exact_forward(case)[0]) <= 1e-6


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_a_large_mean_does_not_cost_the_variance(offset: float) -> None:
    case = Case(shape=(1, 16, 13, 11), groups=2, film=False, silu=False, offset=offset)
    y, _, rstd = run_forward(case)
    exact = exact_forward(case)
    assert error(rstd, exact[2]) <= 1e-5
    rounding = offset * torch.finfo(torch.float32).eps  # of the mean itself
    assert error(y, exact[0]) <= max(1e-6, rounding)


@pytest.mark.usefixtures("one_pass")
def test_nan_reaches_its_own_group_and_no_other() -> None:
    x, _, *parameters = Case(shape=(2, 33, 7, 5)).inputs()
    x[1, 4, 2, 3] = float("nan")
    y = forward.group_norm(x, *parameters, 11, EPS, True, NONE)[0]
    assert y[1, 3:6].isnan().all()
    assert y.isnan().flatten(2).any(2).sum() == 3


def test_many_chunks_of_pixels_and_a_rest_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "ONE_PASS_PIXELS", 0)
    case = Case(shape=(1, 18, 13, 17), groups=3)
    assert_forward(case)
    monkeypatch.setattr(tiles, "CHUNKS", 3)
    monkeypatch.setattr(tiles, "PROGRAMS", 2)
    assert_forward(case)
    assert_backward(case)


def test_a_picture_gives_the_same_bits_alone_and_in_a_batch() -> None:
    x, _, weight, bias, scale, shift = Case(shape=(3, 24, 9, 9), groups=4).inputs()
    together = forward.group_norm(x, weight, bias, scale, shift, 4, EPS, True, NONE)[0]
    alone = forward.group_norm(x[1:2], weight, bias, scale[1:2], shift[1:2], 4, EPS, True, NONE)[0]
    assert torch.equal(alone, together[1:2])


def test_an_expanded_gradient_is_read_as_what_it_stands_for() -> None:
    x, _, *parameters = Case(shape=(2, 20, 7, 5)).inputs()
    saved = forward.group_norm(x, *parameters, 4, EPS, True, NONE)[1:]
    ones = torch.ones((), device=DEVICE).expand(x.shape)
    expanded = backward.group_norm_backward(ones, x, *parameters, *saved, True, NONE)
    dense = backward.group_norm_backward(ones.contiguous(), x, *parameters, *saved, True, NONE)
    assert all(torch.equal(*pair) for pair in zip(expanded, dense, strict=True))


@pytest.mark.parametrize("mode", [NONE, UP, DOWN])
def test_an_empty_batch_gives_empty_results_and_zero_parameter_gradients(mode: int) -> None:
    case = Case(shape=(0, 64, 6, 4), mode=mode)
    x, _, *parameters = case.inputs()
    y, *saved = forward.group_norm(x, *parameters, 32, EPS, True, mode)
    assert y.shape == tuple(resampled_shape(x, mode))
    gradients = backward.group_norm_backward(y, x, *parameters, *saved, True, mode, None, COPIES)
    shapes = [value.shape for value in (x, *parameters)]
    assert [value.shape for value in gradients] == [*shapes, (COPIES, 64)]
    assert not gradients[1].any()
    assert not gradients[2].any()


@pytest.mark.parametrize(
    "case",
    [
        Case(shape=(1, 8, 6), groups=2, mode=UP, layout="contiguous"),
        Case(shape=(1, 8, 2, 4, 6), groups=2, mode=DOWN),
        Case(shape=(1, 8, 6, 5), groups=2, dtype=torch.float64),
    ],
    ids=str,
)
def test_what_is_not_covered_is_left_to_the_default(case: Case) -> None:
    x, _, *parameters = case.inputs()
    settings = (case.groups, EPS, case.silu, case.mode)
    expected = reference.group_norm(x, *parameters, *settings)
    assert not tiles.covered(x, case.mode)
    assert all(
        torch.equal(*pair)
        for pair in zip(forward.group_norm(x, *parameters, *settings), expected, strict=True)
    )


def test_resources_hold_to_the_budget() -> None:
    wanted = [
        ("group_norm", "sm_90", "group_norm one_pass 8²x768+0 film True mode 0"),
        ("group_norm", "sm_90", "group_norm one_pass 32²x384+0 film True mode 0"),
        ("group_norm", "sm_90", "group_norm statistics 64²x192+0 film True mode 0"),
        ("group_norm", "sm_90", "group_norm apply 64²x192+0 film True mode 0"),
        ("group_norm", "sm_80", "group_norm apply 64²x384+192 film False mode 0"),
        ("group_norm_backward", "sm_90", "group_norm_backward sums 64²x192 film True mode 0"),
        ("group_norm_backward", "sm_90", "group_norm_backward dx 64²x192 film True mode 0"),
        ("group_norm_backward", "sm_80", "group_norm_backward sums 64²x384+192 film False mode 0"),
        ("group_norm_backward", "sm_120", "group_norm_backward dx 64²x384+192 film False mode 0"),
    ]
    for row in compile_cases(wanted):
        backwards, one_pass = row["name"].startswith("group_norm_backward"), "one_pass" in row["name"]
        assert row["spills"] == 0, row
        assert row["registers"] <= (80 if backwards or one_pass else 64), row
        assert row["occupancy"] >= (0.37 if backwards or one_pass else 0.5), row
        assert row["shared"] <= 2048, row
        assert row["wide_loads"] >= 2, row
        assert row["wide_stores"] >= 1 or "statistics" in row["name"] or "sums" in row["name"], row


def test_launches_of_one_pixel_or_channel_compile_as_on_a_gpu() -> None:
    program = """
from glide_fast.kernels.group_norm import group_norm
from glide_fast.kernels.group_norm_backward import group_norm_backward
for shape, groups in (((1, 1, 1, 1), 1), ((2, 33, 1, 33), 11)):
    x, weight, film = torch.ones(shape), torch.ones(shape[1]), torch.ones(shape[0], shape[1])
    y, *saved = group_norm(x, weight, weight, film, film, groups, 1e-5, True, 0)
    group_norm_backward(y, x, weight, weight, film, film, *saved, True, 0)
"""
    launches = rehearse("sm_90", program)
    kernels = [row["name"] for row in launches]
    assert kernels == 2 * ["one_pass_kernel", "sums_kernel", "dx_kernel"]
    assert all(row["spills"] == 0 for row in launches)
