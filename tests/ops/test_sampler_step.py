"""A sampler's step in one op: the equations of DDPM and DDIM one by one, float64, dtypes, strides, errors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor

from glide_fast.diffusion import GaussianDiffusion, Schedule
from glide_fast.diffusion.process import MeanType, VarianceType
from glide_fast.diffusion.rules import ddim_encode_rule, ddim_rule, ddpm_rule
from glide_fast.ops import StepRule, sampler_step, use_reference
from glide_fast.ops.sampler_step import FORWARD

CPU = torch.device("cpu")
SCALE = 2.5
STEPS = torch.tensor([3, 0, 11])


def diffusion_of(mean: str = "epsilon", variance: str = "learned_range") -> GaussianDiffusion:
    return GaussianDiffusion(
        schedule=Schedule.create("cosine", 1000, "12"),
        mean_type=cast(MeanType, mean),
        variance_type=cast(VarianceType, variance),
    )


def rule_of(kind: str, diffusion: GaussianDiffusion, *, clip: bool = True) -> StepRule:
    if kind == "ddpm":
        return ddpm_rule(diffusion, clip=clip, device=CPU)
    if kind == "ddim_encode":
        return ddim_encode_rule(diffusion, clip=clip, device=CPU)
    return ddim_rule(diffusion, 0.6, clip=clip, device=CPU)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    x: Tensor
    output: Tensor
    t: Tensor
    noise: Tensor
    guidance: Tensor | None

    def to(self, dtype: torch.dtype) -> Inputs:
        return replace(self, x=self.x.to(dtype), output=self.output.to(dtype), noise=self.noise.to(dtype))

    def step(self, rule: StepRule, *, noisy: bool = True) -> tuple[Tensor, Tensor]:
        noise = self.noise if noisy else None
        return sampler_step(self.x, self.output, self.t, rule, noise=noise, guidance=self.guidance)


def draw(channels: int, *, guided: bool, shape: tuple[int, ...] = (3, 3, 5, 7)) -> Inputs:
    generator = torch.Generator().manual_seed(channels + len(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    rows = shape[0] * (2 if guided else 1)
    return Inputs(
        x=normal(*shape),
        output=normal(rows, channels * shape[1], *shape[2:]),
        t=STEPS[: shape[0]],
        noise=normal(*shape),
        guidance=torch.tensor([SCALE]) if guided else None,
    )


def one_by_one(
    kind: str, diffusion: GaussianDiffusion, given: Inputs, *, clip: bool
) -> tuple[Tensor, Tensor]:
    """The same by the methods of the diffusion."""
    output, t = given.output, given.t
    if given.guidance is not None:
        (conditional, plain), channels = output.chunk(2), given.x.shape[1]
        mixed = plain[:, :channels] + SCALE * (conditional[:, :channels] - plain[:, :channels])
        output = torch.cat([mixed, conditional[:, channels:]], dim=1)
    p = diffusion.predict(output, given.x, t, clip_denoised=clip)
    inner = (t != 0).float().view(-1, 1, 1, 1)
    if kind == "ddpm":
        return p.mean + inner * torch.exp(0.5 * p.log_variance) * given.noise, p.x_start
    epsilon = diffusion.predict_epsilon_from_x_start(given.x, t, p.x_start)
    if kind == "ddim_encode":
        return diffusion.ddim_step_to_noise(p.x_start, epsilon, t), p.x_start
    mean, sigma = diffusion.ddim_step(p.x_start, epsilon, t, 0.6)
    return mean + inner * sigma * given.noise, p.x_start


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "ddim_encode"])
@pytest.mark.parametrize("variance", get_args(VarianceType))
@pytest.mark.parametrize("mean", get_args(MeanType))
def test_a_step_is_the_equations_one_by_one(mean: str, variance: str, kind: str) -> None:
    diffusion = diffusion_of(mean, variance)
    for guided in (False, True):
        for clip in (False, True):
            given = draw(2 if diffusion.learns_variance else 1, guided=guided)
            actual = given.step(rule_of(kind, diffusion, clip=clip), noisy=kind != "ddim_encode")
            expected = one_by_one(kind, diffusion, given, clip=clip)
            assert torch.equal(actual[1], expected[1])
            if kind == "ddpm" and diffusion.learns_variance:  # the exponential may round another way
                torch.testing.assert_close(actual[0], expected[0], rtol=4e-7, atol=4e-7)
            else:
                assert torch.equal(actual[0], expected[0])


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_the_reference_computes_the_same(kind: str) -> None:
    rule, given = rule_of(kind, diffusion_of()), draw(2, guided=True)
    with use_reference():
        expected = given.step(rule)
    for mine, value in zip(given.step(rule), expected, strict=True):
        torch.testing.assert_close(mine, value, rtol=4e-7, atol=4e-7)


def test_float64_is_computed_in_float64() -> None:
    rule, given = rule_of("ddpm", diffusion_of()), draw(2, guided=True)
    exact = given.to(torch.float64).step(rule)
    assert exact[0].dtype == torch.float64
    rounded = given.step(rule)
    assert torch.equal(exact[0], exact[0].float().double()) is False
    for mine, value in zip(rounded, exact, strict=True):
        torch.testing.assert_close(mine.double(), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_output_is_widened_first(dtype: torch.dtype) -> None:
    rule, given = rule_of("ddpm", diffusion_of()), draw(2, guided=True)
    half = replace(given, output=given.output.to(dtype))
    wide = replace(given, output=half.output.float())
    for mine, value in zip(half.step(rule), wide.step(rule), strict=True):
        assert torch.equal(mine, value)
    narrow = given.to(dtype).step(rule)
    assert narrow[0].dtype == dtype
    with use_reference():
        expected = given.to(dtype).step(rule)
    for mine, value in zip(narrow, expected, strict=True):
        torch.testing.assert_close(mine, value)


def test_memory_formats_and_views_do_not_matter() -> None:
    rule, given = rule_of("ddpm", diffusion_of()), draw(2, guided=True)
    expected = given.step(rule)
    transposed = given.output.transpose(2, 3).contiguous().transpose(2, 3)
    last = given.output.contiguous(memory_format=torch.channels_last)
    part = torch.cat([given.output, given.output], dim=1)[:, : given.output.shape[1]]
    for output in (transposed, last, part):
        for mine, value in zip(replace(given, output=output).step(rule), expected, strict=True):
            assert torch.equal(mine, value)
            assert mine.is_contiguous()
    x = given.x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(replace(given, x=x).step(rule)[0], expected[0])


@pytest.mark.parametrize(
    "shape", [(3, 5), (2, 4, 9), (1, 1, 1, 1), (2, 3, 2, 3, 4), (0, 3, 4, 4), (2, 3, 0, 4)]
)
def test_pictures_of_any_dimensions(shape: tuple[int, ...]) -> None:
    rule, given = rule_of("ddpm", diffusion_of()), draw(2, guided=True, shape=shape)
    with use_reference():
        expected = given.step(rule)
    for mine, value in zip(given.step(rule), expected, strict=True):
        assert mine.shape == shape
        torch.testing.assert_close(mine, value, rtol=4e-7, atol=4e-7)


def test_a_nan_is_not_clipped_away() -> None:
    given = draw(2, guided=False)
    given.output[0, 0, 0, 0] = float("nan")
    moved, x_start = given.step(rule_of("ddim", diffusion_of()))
    for found in (moved, x_start):
        assert found[0, 0, 0, 0].isnan()
        assert found.isnan().sum() == 1


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_op_keeps_the_dispatchers_rules(kind: str, device: str) -> None:
    diffusion = diffusion_of("previous_x" if kind == "ddpm" else "epsilon")
    given, rule = draw(2, guided=True), rule_of(kind, diffusion)
    arguments: Any = (given.x, given.output, given.noise, rule.table, given.t, given.guidance, 2, 2, True)
    if device == "meta":
        found = FORWARD(*[each.to("meta") if isinstance(each, Tensor) else each for each in arguments])
        assert [each.shape for each in found] == [given.x.shape] * 2
        return
    torch.library.opcheck(FORWARD, arguments, test_utils=("test_schema", "test_faketensor"))


def test_it_compiles_whole() -> None:
    given, rule = draw(2, guided=True), rule_of("ddpm", diffusion_of())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor, output: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return sampler_step(x, output, t, rule, noise=noise, guidance=given.guidance)[0] + 0

    assert torch.equal(step(given.x, given.output, given.t, given.noise), given.step(rule)[0])


def test_what_does_not_fit_is_refused() -> None:
    given, rule = draw(2, guided=True), rule_of("ddpm", diffusion_of())
    plain = rule_of("ddpm", diffusion_of("epsilon", "fixed_small"))
    with pytest.raises(ValueError, match=r"output has shape \(6, 6, 5, 7\) but .* needs \(3, 6, 5, 7\)"):
        replace(given, guidance=None).step(rule)
    with pytest.raises(ValueError, match=r"and guidance needs \(6, 6, 5, 7\)"):
        replace(given, output=given.output[:, :3]).step(rule)
    assert torch.equal(
        replace(given, output=given.output[:, :3]).step(plain)[0], given.step(plain)[0]
    )  # a learned variance is not read by a rule that has its own
    for t in (torch.tensor([1, 2]), torch.tensor([1.0, 2.0, 3.0])):
        with pytest.raises(ValueError, match=r"t is torch.* give int64 \[3\]"):
            replace(given, t=t).step(rule)
    for t in (-1, 12):
        with pytest.raises((RuntimeError, IndexError)):
            replace(given, t=torch.tensor([1, t, 1])).step(rule)
    with pytest.raises(ValueError, match=r"noise is torch\.float64"):
        replace(given, noise=given.noise.double()).step(rule)
    with pytest.raises(ValueError, match="give one number"):
        replace(given, guidance=torch.ones(3)).step(rule)
    with pytest.raises(ValueError, match="output is on meta but x on cpu"):
        replace(given, output=given.output.to("meta")).step(rule)
    with pytest.raises(ValueError, match="has no gradient"):
        replace(given, x=given.x.requires_grad_()).step(rule)


def test_a_rule_refuses_what_it_does_not_know() -> None:
    rule = rule_of("ddpm", diffusion_of())
    with pytest.raises(ValueError, match=r"must be \[T, 8\] with columns guess_x"):
        replace(rule, table=rule.table[:, :7])
    with pytest.raises(ValueError, match="unknown deviation 'fixed'; use one of table, learned"):
        replace(rule, deviation=cast(Any, "fixed"))
    with pytest.raises(ValueError, match="unknown direction 'up'; use one of x, noise, output"):
        replace(rule, direction=cast(Any, "up"))
