"""Solvers of the diffusion ODE and SDE that need few steps, one rule an algorithm.

All are written in guesses of x_0, which stay in the range of pictures where predicted noise does not (DPM-
Solver++, arXiv 2211.01095). With lambda = log(alpha / sigma) and h its growth, the exact solution between two
levels is x' = (sigma' / sigma) x + alpha' times the integral of e^(u - h) x_0(u) du over 0 .. h: the rules
differ in the guess of x_0 that they put under the integral. The last step, to the clean picture, has infinite
h: there all rules return the guess itself, so that known pixels stay exact.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from glide_fast.sampling.run import Level, Run, sampler

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def _plms(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """PLMS (PNDM, arXiv 2202.09778): Adams-Bashforth of up to fourth order on the noise, then a DDIM step.

    The first steps have lower order, so that each costs one evaluation. The formulas take steps for equally
    long: respace evenly.
    """
    x, recent = run.x, deque[Tensor](maxlen=4)
    for step in run.countdown:
        here, there = run.level(step), run.level(step - 1)
        recent.appendleft((x - here.alpha * run.guess(x, step)) / here.sigma)
        epsilon = _weighted(ADAMS_BASHFORTH[len(recent) - 1], recent)
        x_start = run.limit((x - here.sigma * epsilon) / here.alpha)
        x = there.alpha * x_start + there.sigma * epsilon
        yield x, x_start


def _heun(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Heun's second-order method (EDM, arXiv 2206.00364, algorithm 1): two evaluations a step, one the last.

    In exponential form, with guesses of x_0 that are linear in lambda between both ends: the mean of slopes
    grows without bounds on the first step of a cosine schedule.
    """
    x = run.x
    for step in run.countdown:
        x_start = run.guess(x, step)
        ahead = _transfer(x, x_start, run.level(step), run.level(step - 1))
        if step:
            ends = [x_start, run.guess(ahead, step - 1)]
            ahead = _integrate(run, x, step, step - 1, [step, step - 1], ends)
        x = ahead
        yield x, x_start


def _dpm_solver(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2), and at eta 1 its form for the SDE.

    The guess of x_0 is extrapolated from the last two to the middle of the step, or of as long a step as the
    last: steps that are even in t end with one that is many times longer in lambda.
    """
    x, previous, previous_growth = run.x, None, math.inf
    for step in run.countdown:
        here, there, growth = run.level(step), run.level(step - 1), run.growth(step)
        x_start = run.guess(x, step)
        middle = x_start
        if previous is not None and step:
            middle = x_start + min(growth / previous_growth, 1) / 2 * (x_start - previous)
        x = _transfer(x, middle, here, there, eta=run.eta)
        if run.eta and step:
            x = x + there.sigma * math.sqrt(-math.expm1(-2 * run.eta * growth)) * run.draw()
        previous, previous_growth = x_start, growth
        yield x, x_start


def _unipc(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """UniPC of order 2 with varying coefficients (arXiv 2302.04867): a corrector that costs nothing.

    Each guess of x_0 serves twice: to correct the x that it was made at, and to predict the next. Both
    integrate the polynomial in lambda through the last guesses; the prediction is of first order where the
    step is more than twice as long as the last.
    """
    x, start = run.x, run.x
    steps, guesses = deque[int](maxlen=3), deque[Tensor](maxlen=3)
    for step in run.countdown:
        x_start = run.guess(x, step)
        steps.appendleft(step)
        guesses.appendleft(x_start)
        known = 1
        if len(steps) > 1:
            x = _integrate(run, start, steps[1], step, steps, guesses)
            growth, last_growth = run.growth(step), run.growth(steps[1])
            known = 2 if growth <= 2 * last_growth else 1
        start = x
        x = _integrate(run, x, step, step - 1, list(steps)[:known], list(guesses)[:known])
        yield x, x_start


def _transfer(x: Tensor, x_start: Tensor, here: Level, there: Level, eta: float = 0.0) -> Tensor:
    """x at level `there` if x_0 is `x_start` all the way; at eta > 0 without the noise to be added."""
    if there.sigma == 0:
        return x_start
    growth = there.log_ratio - here.log_ratio
    kept = there.sigma / here.sigma * math.exp(-eta * growth)
    return kept * x - there.alpha * math.expm1(-(1 + eta) * growth) * x_start


def _integrate(
    run: Run, x: Tensor, start: int, end: int, steps: Sequence[int], guesses: Sequence[Tensor]
) -> Tensor:
    """x at step `end` from x at `start`, with x_0 the polynomial in lambda through `guesses` at `steps`."""
    here, there = run.level(start), run.level(end)
    if there.sigma == 0:
        return guesses[0]
    growth = there.log_ratio - here.log_ratio
    nodes = np.array([(run.level(step).log_ratio - here.log_ratio) / growth for step in steps])
    moments = [-math.expm1(-growth)]  # of e^(u - h) over 0 .. h, in units of h
    for power in range(1, len(nodes)):
        moments.append(1 - power / growth * moments[-1])
    weights = np.linalg.solve(np.vander(nodes, increasing=True).T, np.array(moments))
    return there.sigma / here.sigma * x + there.alpha * _weighted(weights.tolist(), guesses)


def _weighted(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], list(tensors)[1:], strict=True):
        total = total + weight * tensor
    return total


plms = sampler(_plms)
heun = sampler(_heun)
dpm_solver = sampler(_dpm_solver, eta=0.0)
dpm_solver_sde = sampler(_dpm_solver, eta=1.0)
unipc = sampler(_unipc)
