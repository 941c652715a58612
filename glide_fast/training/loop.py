"""The training loop, the same for every task and any number of processes.

Every step's randomness is seeded by the run's seed and the step's number, and the data order by the epoch's:
a run that was killed and resumed is the unbroken run.

    glide-fast train configs/emoji_base.toml --out runs/base
    torchrun --nproc-per-node 8 --no-python glide-fast train configs/emoji_base.toml --out runs/base
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from glide_fast.config import to_json
from glide_fast.data.images import grid, save_png, to_uint8
from glide_fast.diffusion import timestep_sampler
from glide_fast.files import replacing
from glide_fast.models import save_model
from glide_fast.models.noisy_clip import Tower
from glide_fast.models.trunk import Stage
from glide_fast.training.config import TrainConfig
from glide_fast.training.diagnose import NonFiniteLossError, look_at_gradients, look_at_outputs
from glide_fast.training.distributed import World, gradient_exchange, joined, shared
from glide_fast.training.draws import Draws
from glide_fast.training.ema import ExponentialMovingAverage
from glide_fast.training.initial import load_weights
from glide_fast.training.log import RunLog, plot_losses, read_log, require_matplotlib
from glide_fast.training.optimizer import clip_gradients, new_optimizer, update
from glide_fast.training.scaling import LossScale
from glide_fast.training.sources import open_source
from glide_fast.training.state import TrainingState
from glide_fast.training.tasks import TASKS, Batch, Task
from glide_fast.training.working_weights import WorkingWeights

LOG_EVERY = 10
ALONE = World()


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step: linear warm-up, plateau, linear decay to zero at the end of the run."""
    settings = config.optimizer
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    decay = min(1.0, (config.steps - step) / settings.decay_steps) if settings.decay_steps else 1.0
    return settings.learning_rate * warmup * decay


class Trainer:
    """A model being trained in a run directory; :func:`train` is the usual way in."""

    def __init__(
        self, config: TrainConfig, directory: Path, initial: Path | None = None, world: World = ALONE
    ) -> None:
        require_matplotlib()
        world.check_batch(config.batch, config.accumulate)
        self.config, self.directory, self.world = config, directory, world
        self.source = open_source(config)
        self.task: Task = TASKS[config.task](config, self.source.pictures)
        torch.manual_seed(config.seed)
        self.model = self.task.network()
        if initial is not None:
            load_weights(self.model, config, initial)
        if config.checkpoint_activations:
            recompute_blocks(self.model)
        self.model.to(world.device)
        self.shared = shared(self.model, world, config.sharding)
        self.working = WorkingWeights.of(self.model, config, world)
        self.state = self._fresh_state()
        directory.mkdir(parents=True, exist_ok=True)
        self.state.resume(directory, config)
        self.log = RunLog(directory / "log.jsonl", self.state.step) if world.rank == 0 else None
        world.first(self._write_config)

    def _fresh_state(self) -> TrainingState:
        settings = self.config.optimizer
        return TrainingState(
            model=self.model,
            ema=ExponentialMovingAverage(self.model, settings.ema),
            optimizer=new_optimizer(self.model, settings),
            scale=LossScale(self.config.scaling if self.config.compute_dtype == "float16" else None),
            timesteps=timestep_sampler(self.config.timesteps, self.task.diffusion.steps),
            source=self.source,
            world=self.world,
        )

    def _write_config(self) -> None:
        with replacing(self.directory / "config.json") as temporary:
            temporary.write_text(to_json(self.config) + "\n", encoding="utf-8")

    def step(self) -> dict[str, float]:
        """One optimiser step; its number, losses, gradient norm and, in float16, loss scale are returned.

        Raises:
            NonFiniteLossError: names the step, the timesteps, the loss scale and the first bad module or
                gradient; the weights are untouched.
        """
        config, state, world = self.config, self.state, self.world
        part = world.part(config.batch)
        draws = Draws.of_step(config.seed, state.step, config.batch, part)
        batch = self.task.batch(self.source.take(state.step, part), draws).to(world.device)
        noise = draws.normal(*batch.x_start.shape[1:]).to(world.device)
        drawn = state.timesteps.sample(config.batch, np.random.default_rng((config.seed, state.step)))
        t, weights = (each[part].to(world.device) for each in drawn)

        losses, norm, factor = self._finite_gradients(batch, t, noise, weights)
        scale = state.scale.value
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config, state.step)
        update(state.optimizer, state.ema, self.model, state.step, factor, self.working)
        state.timesteps.update(drawn[0], losses["loss"])
        state.step += 1
        state.scale.succeed()
        means = {**{name: loss.mean() for name, loss in losses.items()}, "grad_norm": norm}
        if config.compute_dtype == "float16":
            means["loss_scale"] = torch.tensor(scale)
        return {"step": state.step, **{name: round(float(value), 6) for name, value in means.items()}}

    def _finite_gradients(
        self, batch: Batch, t: Tensor, noise: Tensor, weights: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """Gradients left in the parameters, at the loss scale where they are finite.

        The losses of the whole batch [B], the gradients' norm and their factor are returned.
        """
        config, state = self.config, self.state
        seeds = np.random.SeedSequence((config.seed, state.step, 1 + self.world.rank)).generate_state(1)
        while True:
            torch.manual_seed(int(seeds[0]))  # dropout
            losses = self._gradients(batch, t, noise, weights)
            norm, factor = clip_gradients(
                state.optimizer, self.model, config.optimizer.clip, state.scale.value
            )
            finite = bool(torch.isfinite(losses["loss"]).all())
            if finite and torch.isfinite(norm):
                return losses, norm, factor
            if not finite or not state.scale.halve():  # no scale mends a loss
                self._stop(batch, t, noise, weights)

    def _gradients(self, batch: Batch, t: Tensor, noise: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Leave the gradient of the whole batch in the parameters; the losses of the whole batch [B]."""
        self.model.train()
        self.state.optimizer.zero_grad(set_to_none=True)
        parts: list[dict[str, Tensor]] = []
        for rows in self._parts(len(t)):
            with gradient_exchange(self.shared, last=rows.stop == len(t)), self.working.lent():
                losses = self._loss(batch.part(rows), t[rows], noise[rows])
                torch.autograd.backward(losses["loss"], self._slopes(weights[rows]))
            parts.append({name: loss.detach() for name, loss in losses.items()})
        return {name: self.world.gather(torch.cat([each[name] for each in parts])) for name in parts[0]}

    def _parts(self, rows: int) -> list[slice]:
        """The parts in which this process's rows are taken."""
        size = rows // self.config.accumulate
        return [slice(start, start + size) for start in range(0, rows, size)]

    def _slopes(self, weights: Tensor) -> Tensor:
        """The gradient of what is minimised by the losses [B], from the weights of their timesteps [B]."""
        share = self.config.batch / self.world.size  # gradients are averaged over the processes
        return weights * (self.state.scale.value / share)

    def _loss(self, batch: Batch, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        return self.task.loss(self.shared, batch, t, noise)

    def _stop(self, batch: Batch, t: Tensor, noise: Tensor, weights: Tensor) -> NoReturn:
        def objective(rows: slice) -> Tensor:
            losses = self._loss(batch.part(rows), t[rows], noise[rows])
            return (losses["loss"] * self._slopes(weights[rows])).sum()

        losses = [partial(objective, rows) for rows in self._parts(len(t))]
        findings = self.world.objects(look_at_outputs(self.model, losses))
        if not any(each.is_cause for each in findings):
            findings = self.world.objects(look_at_gradients(self.model, losses))
        rank, found = next((each for each in enumerate(findings) if each[1].module), (0, findings[0]))
        where = f"process {rank}: " if len(findings) > 1 else ""
        timesteps = self.task.diffusion.model_timesteps(t)
        raise NonFiniteLossError(
            f"{where}the loss or its gradient is not finite at step {self.state.step}, timesteps "
            f"{int(timesteps.min())} .. {int(timesteps.max())}{self.state.scale}: {found.text}; "
            f"the last checkpoint is {self.state.saved(self.directory) or 'not there yet'}"
        )

    def save(self) -> None:
        """Write the EMA weights as a model file with its config, the loss curve and the checkpoint.

        The checkpoint comes last: what a kill prevents is done again by the resumed run.
        """
        average = self.state.ema.whole(keep=self.world.rank == 0)

        def write() -> None:
            save_model(self.directory / "model.safetensors", *self.task.export(average))
            if self.log is not None and (records := read_log(self.log.path)):
                plot_losses(records, self.directory / "loss.png")

        self.world.first(write)
        self.state.save(self.directory, self.config)

    def draw_samples(self) -> None:
        """Write a grid of pictures painted with the EMA weights, if the config asks for any."""
        if not (self.config.samples.prompts or self.config.samples.count):
            return
        average = self.state.ema.whole(keep=self.world.rank == 0)

        def write() -> None:
            pictures = self.task.samples(average)
            if pictures is not None:
                path = self.directory / "samples" / f"step-{self.state.step:06d}.png"
                save_png(path, grid(to_uint8(pictures), 8))

        self.world.first(write)

    def run(self) -> None:
        """Train to the end of the config; SIGINT and SIGTERM end the run after the step at hand."""
        config, state, world = self.config, self.state, self.world
        with (
            stop_signals() as stopped,
            tqdm(
                total=config.steps, initial=state.step, unit="step", desc=config.task, disable=world.rank > 0
            ) as bar,
        ):
            first, started = state.step, time.perf_counter()
            while state.step < config.steps and not world.any(bool(stopped)):
                state.unlogged.append(self.step())
                bar.update()
                if state.step % LOG_EVERY == 0:
                    rate = (state.step - first) * config.batch / (time.perf_counter() - started)
                    self._write_log(rate, bar)
                    first, started = state.step, time.perf_counter()
                if state.step % config.samples.every == 0 or state.step == config.steps:
                    self.draw_samples()
                if state.step % config.save_every == 0 or state.step == config.steps:
                    self.save()
            if world.any(bool(stopped)):
                self.save()

    def _write_log(self, rate: float, bar: tqdm[None]) -> None:
        """Log the means over the steps since the last line."""
        records = self.state.unlogged
        record = {"step": records[-1]["step"]}
        for name in [each for each in records[-1] if each != "step"]:
            record[name] = round(float(np.mean([each[name] for each in records])), 6)
        if self.log is not None:
            self.log.append({**record, "images_per_second": round(rate, 2)})
        records.clear()
        bar.set_postfix(loss=f"{record['loss']:.4f}", images_s=f"{rate:.1f}")


def recompute_blocks(model: nn.Module) -> None:
    """Compute the activations of a network's blocks again in the backward pass instead of keeping them."""
    for module in model.modules():
        if isinstance(module, Stage | Tower):
            module.recompute = True


def train(config: TrainConfig, directory: Path, initial: Path | None = None) -> None:
    """Run, or resume, a training run in ``directory``; a new one starts from ``initial``'s weights, if given.

    The directory gets config.json, log.jsonl, loss.png, samples/, a checkpoint and model.safetensors (EMA,
    float16). Under torchrun all its processes train together.

    Raises:
        ValueError: the config does not fit its data, or the checkpoint there belongs to another config.
        NonFiniteLossError: the loss stopped being finite.
        LostProcessError: another process of the run has ended.
    """
    with joined() as world:
        Trainer(config, directory, initial, world).run()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM arrives; a second one ends the process as usual."""
    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        restore()

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
