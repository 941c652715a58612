"""What all samplers share: the arguments, the loop, the progress bar, the checks.

A sampler is written as a rule: a generator that takes a :class:`Run` and yields x and the guess of x_0 after
each step. :func:`sampler` makes the function that users call out of it. What a rule has computed by
:meth:`Run.compute` is replayed from a CUDA graph where the caller gives graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from glide_fast.diffusion.process import DenoisedFunction, GaussianDiffusion, Prediction
from glide_fast.diffusion.schedule import Schedule
from glide_fast.ops import StepRule, sampler_step
from glide_fast.ops.sampler_step import Deviation, Direction
from glide_fast.sampling.denoiser import Denoiser, NoiseSource, global_noise
from glide_fast.sampling.graph import CannotCaptureError, Graphs, Session, capturable, warn_of
from glide_fast.sampling.guidance import ClassifierFree


@dataclass(frozen=True, kw_only=True)
class Step:
    """After a step: its number from 0, its timestep in training, x [B, C, H, W] and the guess of x_0."""

    index: int
    timestep: int
    x: Tensor
    x_start: Tensor


StepCallback = Callable[[Step], None]


class Level(NamedTuple):
    """A noise level: x = alpha x_0 + sigma noise, with alpha^2 + sigma^2 = 1."""

    alpha: float
    sigma: float

    @property
    def log_ratio(self) -> float:
        """lambda = log(alpha / sigma), infinite without noise (DPM-Solver, arXiv 2206.00927)."""
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf


CLEAN = Level(1.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call of a sampler, as its rule sees it; ``x`` is the start, ``session`` has the graphs, if any."""

    denoise: Denoiser
    x: Tensor
    diffusion: GaussianDiffusion
    noise: NoiseSource
    eta: float
    clip_denoised: bool
    denoised_fn: DenoisedFunction | None
    session: Session | None = None

    @property
    def countdown(self) -> range:
        """The steps from the noisiest, T - 1, to 0."""
        return range(self.diffusion.steps)[::-1]

    def t(self, step: int) -> Tensor:
        """``step`` for each picture, int64 [B]."""
        return torch.full((self.x.shape[0],), step, dtype=torch.int64, device=self.x.device)

    def predict(self, x: Tensor, t: Tensor) -> Prediction:
        """One evaluation of the denoiser at steps t [B]."""
        output = self.denoise(x, self.diffusion.model_timesteps(t))
        return self.diffusion.predict(
            output, x, t, clip_denoised=self.clip_denoised, denoised_fn=self.denoised_fn
        )

    def guess(self, x: Tensor, step: int) -> Tensor:
        """The guess of x_0 by one evaluation of the denoiser at ``step``."""
        return self.compute(_guess, x, self.t(step))[0]

    def compute(self, part: Part, *tensors: Tensor) -> tuple[Tensor, ...]:
        """``part(self, *tensors)``, by a graph where this run has graphs.

        ``part`` is hashable, reads no tensors but those given and what the run's denoiser, ``denoised_fn``
        and schedule have, looks into none, draws no noise, and does the same work at every call.
        """
        if self.session is None:
            return part(self, *tensors)
        return self.session.call(part, lambda *known: part(self._within(*known[:2]), *known[2]), tensors)

    def _within(self, kept: Sequence[Any], inputs: Sequence[Tensor]) -> Run:
        """This run as a graph holds it: with the graph's own schedule and ``inputs``."""
        denoise: Any = capturable(self.denoise)
        count = len(denoise.inputs)
        denoised_fn: Any = self.denoised_fn
        if denoised_fn is not None:
            denoised_fn = denoised_fn.reading(inputs[count:])
        denoise = denoise.reading(inputs[:count])
        return replace(self, denoise=denoise, denoised_fn=denoised_fn, diffusion=kept[0], session=None)

    @property
    def is_plain(self) -> bool:
        """Whether nothing comes between the denoiser's output and the step, so that `move` serves."""
        return type(self.diffusion) is GaussianDiffusion and self.denoised_fn is None

    @cached_property
    def guided(self) -> ClassifierFree | None:
        """The denoiser, if it mixes two halves by a formula that a step can compute as well."""
        denoise = self.denoise
        return denoise if isinstance(denoise, ClassifierFree) and not denoise.rescales else None

    @cached_property
    def guidance(self) -> Tensor | None:
        """The scale of `guided` [1], on the device of x."""
        if self.guided is None:
            return None
        scale = self.guided.scale
        if isinstance(scale, Tensor):
            return scale.view(1)
        return torch.full((1,), scale, device=self.x.device)

    def move(self, rule: StepRule, x: Tensor, step: int, *, noisy: bool = True) -> tuple[Tensor, Tensor]:
        """One evaluation of the denoiser, and all that follows in one pass: the next x, the guess of x_0."""
        part = _Move(deviation=rule.deviation, direction=rule.direction, clip=rule.clip)
        noise = (self.draw(),) if noisy else ()
        x, x_start = self.compute(part, x, self.t(step), rule.table, *noise)
        return x, x_start

    def limit(self, x_start: Tensor) -> Tensor:
        """An extrapolated guess of x_0 treated as the denoiser's own: ``denoised_fn``, then the clip."""
        if self.denoised_fn is not None:
            x_start = self.denoised_fn(x_start)
        return x_start.clamp(-1, 1) if self.clip_denoised else x_start

    def draw(self) -> Tensor:
        """The next standard normals, of the shape of x."""
        return self.noise(self.x.shape, self.x.device)

    def level(self, step: int) -> Level:
        """The noise of x at ``step``; none at -1, after the last step."""
        if step < 0:
            return CLEAN
        kept = float(self.diffusion.schedule.alphas_cumprod[step])
        return Level(math.sqrt(kept), math.sqrt(1 - kept))

    def growth(self, step: int) -> float:
        """h, by how much lambda grows from `step` to the next; infinite from step 0."""
        return self.level(step - 1).log_ratio - self.level(step).log_ratio


Part = Callable[..., tuple[Tensor, ...]]  # of a Run and tensors
Rule = Callable[[Run], Iterator[tuple[Tensor, Tensor]]]


def _guess(run: Run, x: Tensor, t: Tensor) -> tuple[Tensor]:
    return (run.predict(x, t).x_start,)


@dataclass(frozen=True, kw_only=True)
class _Move:
    """The part behind :meth:`Run.move`: a step rule without its table, which is a tensor among others."""

    deviation: Deviation
    direction: Direction
    clip: bool

    def __call__(
        self, run: Run, x: Tensor, t: Tensor, table: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        evaluate = run.denoise if run.guided is None else run.guided.halves
        output = evaluate(x, run.diffusion.model_timesteps(t))
        run.diffusion.check_output(output[: x.shape[0]], x)
        rule = StepRule(table=table, deviation=self.deviation, direction=self.direction, clip=self.clip)
        return sampler_step(x, output, t, rule, noise=noise, guidance=run.guidance)


class Sampler(Protocol):
    """What all samplers have in common."""

    def __call__(
        self,
        denoise: Denoiser,
        x: Tensor,
        diffusion: GaussianDiffusion,
        *,
        noise: NoiseSource = global_noise,
        eta: float | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        callback: StepCallback | None = None,
        progress: bool = False,
        graphs: Graphs | None = None,
    ) -> Tensor:
        """x_0 [B, C, H, W] from x_T [B, C, H, W], float32.

        ``eta`` scales the noise that is added each step, for samplers that have a choice; None is the
        sampler's usual. ``denoised_fn`` changes each guess of x_0 before it is clipped to [-1, 1];
        ``callback`` sees every step; ``progress`` shows a bar. ``graphs`` hold a step, or the whole loop
        where nobody watches it, for all calls with pictures of this shape, this network and this schedule.

        Warns:
            UserWarning: the denoiser, ``denoised_fn`` or the diffusion cannot be held by a graph; the same
                pictures come without one.

        Raises:
            ValueError: x is not float32, the denoiser's output does not fit, or eta is out of range.
        """


def sampler(rule: Rule, *, eta: float | None = None, upwards: bool = False) -> Sampler:
    """The function that users call, from a rule.

    ``eta`` is the usual value for a rule that reads ``run.eta``, None for one that does not; ``upwards``
    says that the rule goes from the picture to the noise.
    """
    usual, name = eta, rule.__name__.lstrip("_")

    def sample(
        denoise: Denoiser,
        x: Tensor,
        diffusion: GaussianDiffusion,
        *,
        noise: NoiseSource = global_noise,
        eta: float | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        callback: StepCallback | None = None,
        progress: bool = False,
        graphs: Graphs | None = None,
    ) -> Tensor:
        run = Run(
            denoise=denoise,
            x=_checked(x),
            diffusion=diffusion,
            noise=noise,
            eta=_checked_eta(eta, usual, name),
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
        )
        order = run.countdown[::-1] if upwards else run.countdown
        with torch.inference_mode():
            run = replace(run, session=_session(run, graphs))
            if run.session is not None and run.session.graphs.unit == "loop" and not (callback or progress):
                return _whole(rule, run).clone()
            states = tqdm(rule(run), total=len(order), desc="sampling", unit="step", disable=not progress)
            for (index, step), (x, x_start) in zip(enumerate(order), states, strict=True):
                if callback is not None:
                    timestep = int(diffusion.schedule.timestep_map[step])
                    callback(Step(index=index, timestep=timestep, x=x, x_start=x_start))
        return x.clone()  # a normal tensor, which the caller may change and differentiate

    sample.__name__, sample.__doc__ = name, rule.__doc__
    return sample


def _session(run: Run, graphs: Graphs | None) -> Session | None:
    """The graphs for a run; None, and a warning, if it cannot be captured."""
    if graphs is None:
        return None
    diffusion, schedule = run.diffusion, run.diffusion.schedule
    parts = [run.denoise] if run.denoised_fn is None else [run.denoise, run.denoised_fn]
    tables = schedule.betas.tobytes(), schedule.timestep_map.tobytes(), schedule.original_steps
    kinds = diffusion.mean_type, diffusion.variance_type, diffusion.rescale_timesteps
    try:
        if type(diffusion) is not GaussianDiffusion:
            raise CannotCaptureError(f"{type(diffusion).__name__} pushes each step along a gradient")
        recipe = (tables, kinds, run.eta, run.clip_denoised)
        return graphs.session(run.x.device, parts, recipe, kept=(diffusion,))
    except CannotCaptureError as reason:
        warn_of(str(reason))
        return None


@dataclass(frozen=True)
class _Loop:
    """All steps of a rule as one part, with all their noise."""

    rule: Rule

    def __call__(self, run: Run, x: Tensor, *noise: Tensor) -> tuple[Tensor]:
        drawn = iter(noise)
        last = x
        for last, _ in self.rule(replace(run, x=x, noise=lambda *_: next(drawn))):  # noqa: B007 (it counts)
            pass
        return (last,)


def _whole(rule: Rule, run: Run) -> Tensor:
    """The last x of a rule, whose noise is drawn before it."""
    noise = [run.draw() for _ in range(_draws(rule, run.diffusion.steps, run.eta))]
    return run.compute(_Loop(rule), run.x, *noise)[0]


@lru_cache
def _draws(rule: Rule, steps: int, eta: float) -> int:
    """How often a rule draws noise, counted on a picture of one pixel."""
    drawn = []

    def noise(shape: Sequence[int], _device: torch.device) -> Tensor:
        drawn.append(shape)
        return torch.zeros(*shape)

    diffusion = GaussianDiffusion(schedule=Schedule.create("cosine", steps), variance_type="fixed_small")
    pixel = Run(
        denoise=lambda x, _timesteps: x,
        x=torch.zeros(1, 1, 1, 1),
        diffusion=diffusion,
        noise=noise,
        eta=eta,
        clip_denoised=True,
        denoised_fn=None,
    )
    for _ in rule(pixel):
        pass
    return len(drawn)


def _checked(x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or x.dim() < 2:
        raise ValueError(
            f"x is {x.dtype} with shape {tuple(x.shape)}; samplers keep float32 [B, C, H, W]: "
            "use initial_noise, or x.float()"
        )
    return x.contiguous()


def _checked_eta(eta: float | None, usual: float | None, name: str) -> float:
    if eta is None:
        return usual or 0.0
    if usual is None:
        raise ValueError(f"sampler {name!r} has no eta to choose, but eta {eta} is given; leave it out")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} must lie in [0, 1]; 0 is deterministic, 1 is as random as DDPM")
    return eta
