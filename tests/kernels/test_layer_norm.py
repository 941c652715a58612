"""LayerNorm's and the activations' kernels, interpreted: values and gradients against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from glide_fast.kernels import activation as activations
from glide_fast.kernels import layer_norm as norms
from glide_fast.ops import reference
from tests.kernels.compiled import compile_cases
from tests.kernels.interpreter import DEVICE

TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
KINDS = [reference.ACTIVATION_GELU, reference.ACTIVATION_QUICK_GELU]
EPS = 1e-5


@pytest.fixture(autouse=True)
def _uninitialized_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (2 * torch.randn(shape, generator=generator) + 0.5).to(DEVICE, dtype)


def error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the difference as a share of the norm."""
    return float((actual.double() - exact).norm() / exact.norm())


def assert_norm(x: Tensor, grad: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Compare with the reference in float64; parameters are of ``dtype``."""
    channels = x.shape[-1]
    weight, bias = draw(2 * channels).to(dtype).chunk(2)
    y, mean, rstd = norms.layer_norm(x, weight, bias, EPS)
    exact = reference.layer_norm(x.double(), weight.double(), bias.double(), EPS)
    assert y.dtype is x.dtype
    assert y.is_contiguous()
    assert error(y, exact[0]) <= TOLERANCE[x.dtype]
    for actual, value in zip((mean, rstd), exact[1:], strict=True):
        assert actual.dtype is torch.float32
        assert actual.shape == x.shape[:-1]
        assert error(actual, value) <= 1e-6
    gradients = norms.layer_norm_backward(grad, x, weight, mean, rstd, True, True)
    exact = reference.layer_norm_backward(grad.double(), x.double(), weight.double(), *exact[1:], True, True)
    assert len(gradients[3]) == len(exact[3]) == 0
    for actual, value, like in zip(gradients[:3], exact[:3], (x, weight, bias), strict=True):
        assert actual.dtype is like.dtype
        assert actual.shape == like.shape
        assert error(actual, value) <= TOLERANCE[like.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 7, 33), (77, 512), (2, 1500), (9, 1)], ids=str)
def test_norms_are_exact(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if shape[-1] == 1:  # one channel is its own mean: the bias is left, and no gradient of x
        x, bias = draw(*shape, dtype=dtype), draw(1)
        assert (norms.layer_norm(x, bias, bias, EPS)[0] == bias.to(dtype)).all()
        return
    assert_norm(draw(*shape, dtype=dtype), draw(*shape[::-1], dtype=dtype).reshape(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_may_be_of_any_width(dtype: torch.dtype) -> None:
    assert_norm(draw(6, 40, dtype=dtype), draw(6, 40, dtype=dtype), dtype)
    assert_norm(draw(6, 40), draw(6, 40), dtype)


def test_strides_are_read_as_they_are() -> None:
    x, grad = draw(4, 6, 80)[..., :40], draw(4, 40, 6).transpose(1, 2)
    assert_norm(x, grad)
    assert_norm(draw(6, 4, 40).transpose(0, 1), torch.ones((), device=DEVICE).expand(4, 6, 40))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 7, 33), (2, 1500)], ids=str)
def test_a_summand_is_added_before_the_one_rounding(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad, weight = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype).cos(), draw(shape[-1])
    _, *statistics = norms.layer_norm(x, weight, weight, EPS)
    exact = reference.layer_norm(x.double(), weight.double(), weight.double(), EPS)[1:]
    plain = norms.layer_norm_backward(grad, x, weight, *statistics, True, True)
    summand = draw(*shape, dtype=dtype).sin()
    for added in (
        summand,
        summand.transpose(0, 1).contiguous().transpose(0, 1),
        summand[..., :1].expand_as(x),
    ):
        found = norms.layer_norm_backward(grad, x, weight, *statistics, True, True, added)
        wide = (each.double() for each in (grad, x, weight))
        expected = reference.layer_norm_backward(*wide, *exact, True, True, added.double())[0]
        assert found[0].dtype is dtype
        assert error(found[0], expected) <= TOLERANCE[dtype]
        assert all(torch.equal(*pair) for pair in zip(found[1:], plain[1:], strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 7, 33), (2, 1500), (77, 512)], ids=str)
@pytest.mark.parametrize("copies", [1, 2])
def test_the_sums_of_the_rows_that_are_written(
    copies: int, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "PROGRAMS", 5)  # rounds of rows, the last one not whole
    x, grad, weight = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype).cos(), draw(shape[-1])
    _, *statistics = norms.layer_norm(x, weight, weight, EPS)
    exact = reference.layer_norm(x.double(), weight.double(), weight.double(), EPS)[1:]
    wide = [each.double() for each in (grad, x, weight)]
    for summand in (None, draw(*shape, dtype=dtype).sin()):
        plain = norms.layer_norm_backward(grad, x, weight, *statistics, True, True, summand)
        for needs_weight in (True, False):
            *gradients, sums = norms.layer_norm_backward(
                grad, x, weight, *statistics, True, needs_weight, summand, copies
            )
            added = None if summand is None else summand.double()
            expected = reference.layer_norm_backward(*wide, *exact, True, needs_weight, added, copies)[3]
            assert (sums.dtype, sums.shape) == (dtype, (copies, shape[-1]))
            assert (sums == sums[0]).all()
            assert error(sums, expected) <= TOLERANCE[dtype]
            assert torch.equal(gradients[0], plain[0])
            if needs_weight:
                assert all(torch.equal(*pair) for pair in zip(gradients[1:], plain[1:3], strict=True))


def test_rows_beyond_one_round_of_programs_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "PROGRAMS", 3)
    assert_norm(draw(500, 24), draw(500, 24))


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_a_large_mean_does_not_cost_the_variance(offset: float) -> None:
    x, ones, zeros = draw(9, 64) + offset, torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE)
    _, _, rstd = norms.layer_norm(x, ones, zeros, EPS)
    assert error(rstd, reference.layer_norm(x.double(), ones.double(), zeros.double(), EPS)[2]) <= 1e-5


def test_only_what_is_needed_is_computed() -> None:
    x, weight = draw(5, 24), draw(24)
    _, mean, rstd = norms.layer_norm(x, weight, weight, EPS)
    everything = norms.layer_norm_backward(x, x, weight, mean, rstd, True, True)
    dx, *nothing = norms.layer_norm_backward(x, x, weight, mean, rstd, True, False)
    assert torch.equal(dx, everything[0])
    assert [len(each) for each in nothing] == [0, 0, 0]
    none, *parameters = norms.layer_norm_backward(x, x, weight, mean, rstd, False, True, None, 2)
    assert len(none) == 0
    assert parameters[-1].shape == (0,)
    assert all(torch.equal(*pair) for pair in zip(parameters, everything[1:], strict=True))


def test_an_empty_batch_gives_zero_parameter_gradients() -> None:
    x, weight = draw(0, 7, 24), draw(24)
    y, mean, rstd = norms.layer_norm(x, weight, weight, EPS)
    dx, grad_weight, grad_bias, sums = norms.layer_norm_backward(
        x, x, weight, mean, rstd, True, True, None, 2
    )
    assert y.shape == dx.shape == (0, 7, 24)
    assert not grad_weight.any()
    assert not grad_bias.any()
    assert torch.equal(sums, torch.zeros(2, 24, device=DEVICE))


@pytest.mark.parametrize(
    ("wide", "parameter"), [(torch.float64, torch.float32), (torch.float32, torch.float64)]
)
def test_float64_is_left_to_the_default(wide: torch.dtype, parameter: torch.dtype) -> None:
    x, weight = draw(3, 24).to(wide), draw(24).to(parameter)
    y, mean, rstd = norms.layer_norm(x, weight, weight, EPS)
    assert mean.dtype is torch.float64
    gradients = norms.layer_norm_backward(x, x, weight, mean, rstd, True, True, None, 2)
    expected = reference.layer_norm_backward(x, x, weight, mean, rstd, True, True, None, 2)
    assert error(y, reference.layer_norm(x, weight, weight, EPS)[0].double()) <= 1e-12
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 7, 33), (2048,)], ids=str)
def test_activations_are_exact(shape: tuple[int, ...], kind: int, dtype: torch.dtype) -> None:
    x, grad = draw(*shape, dtype=dtype), draw(*shape[::-1], dtype=dtype).reshape(shape)
    y = activations.activation(x, kind)
    assert y.dtype is dtype
    assert error(y, reference.activation(x.double(), kind)) <= TOLERANCE[dtype]
    exact, totals = reference.activation_backward(grad.double(), x.double(), kind, 1)
    for copies in (0, 1, 2):
        dx, sums = activations.activation_backward(grad, x, kind, copies)
        assert dx.dtype is sums.dtype is dtype
        assert error(dx, exact) <= TOLERANCE[dtype]
        assert sums.shape == ((copies, shape[-1]) if copies else (0,))
        assert all(error(each, totals[0]) <= TOLERANCE[dtype] for each in sums)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_activations_of_runs_of_rows_are_summed(
    rows: int, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "RUNS", 3)
    x, grad = draw(rows, 300), draw(300, rows).t().contiguous()
    exact, totals = reference.activation_backward(grad.double(), x.double(), kind, 1)
    dx, sums = activations.activation_backward(grad, x, kind, 1)
    assert error(dx, exact) <= 1e-6
    assert error(sums, totals) <= 1e-6


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_activations_stay_right_far_from_zero(kind: int) -> None:
    x = torch.tensor([-200.0, -50.0, -8.0, 0.0, 8.0, 50.0, 200.0], device=DEVICE)
    y, dx = activations.activation(x, kind), activations.activation_backward(torch.ones_like(x), x, kind)[0]
    exact = reference.activation(x.double(), kind)
    slope, _ = reference.activation_backward(torch.ones_like(x).double(), x.double(), kind)
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx.double(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_nothing_strides_and_float64(kind: int) -> None:
    assert activations.activation(draw(0, 5), kind).shape == (0, 5)
    dx, sums = activations.activation_backward(draw(0, 5), draw(0, 5), kind, 1)
    assert dx.shape == (0, 5)
    assert torch.equal(sums, torch.zeros(1, 5, device=DEVICE))
    one = torch.ones((), device=DEVICE)
    assert activations.activation_backward(one, one, kind)[0].shape == ()
    x = draw(6, 9).t()
    y = activations.activation(x, kind)
    assert y.is_contiguous()
    assert torch.equal(y, activations.activation(x.contiguous(), kind))
    dense = x.contiguous()
    assert torch.equal(*(activations.activation_backward(each, x, kind)[0] for each in (x, dense)))
    assert activations.activation(x.double(), kind).dtype is torch.float64
    assert activations.activation_backward(x.double(), x.double(), kind)[0].dtype is torch.float64


def test_resources_hold_to_the_budget() -> None:
    wanted = [
        ("layer_norm", "sm_90", "layer_norm forward 154x768"),
        ("layer_norm", "sm_90", "layer_norm backward 154x768"),
        ("layer_norm", "sm_90", "layer_norm parameters 154x768"),
        ("layer_norm", "sm_90", "layer_norm backward and sums 256x512"),
        ("layer_norm", "sm_80", "layer_norm backward and sums 514x1024"),
        ("layer_norm", "sm_90", "layer_norm parameters and sums 154x768"),
        ("activation", "sm_90", "activation gelu"),
        ("activation", "sm_80", "activation quick_gelu backward"),
        ("activation", "sm_90", "activation gelu backward and sums"),
    ]
    for row in compile_cases(wanted):
        assert row["spills"] == 0, row
        assert row["registers"] <= 80, row
        assert row["occupancy"] >= 0.37, row
        assert row["wide_loads"] >= 1, row
