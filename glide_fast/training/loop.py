"""The training loop, the same for every task.

Loss: the hybrid of Improved DDPM (arXiv 2102.09672, equation 16). Every step's randomness is seeded by the
run's seed and the step's number, and the data order by the epoch's: a run that was killed and resumed is
the unbroken run.

    glide-fast train configs/emoji_base.toml --out runs/base
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from glide_fast.config import to_dict, to_json
from glide_fast.data import emoji
from glide_fast.data.dataset import CaptionedPictures
from glide_fast.data.folder import load_dataset
from glide_fast.data.images import grid, save_png, to_uint8
from glide_fast.diffusion import (
    GaussianDiffusion,
    LossTerms,
    Schedule,
    hybrid_loss,
    timestep_sampler,
    v_weight,
)
from glide_fast.files import replacing
from glide_fast.models import UNet, load_model, save_model
from glide_fast.training.config import TrainConfig
from glide_fast.training.diagnose import NonFiniteLossError, explain_non_finite
from glide_fast.training.ema import ExponentialMovingAverage
from glide_fast.training.log import RunLog, plot_losses, read_log, require_matplotlib
from glide_fast.training.state import TrainingState, first_difference
from glide_fast.training.tasks import TASKS, Batch, Rows, Task

LOG_EVERY = 10


def load_pictures(config: TrainConfig) -> CaptionedPictures:
    """The training pictures of a config, without the held-out captions where it says so."""
    pictures = load_dataset(config.data.source, config.model.unet.image_size)
    if config.data.source == "emoji" and config.data.hold_out:
        return emoji.split(pictures)[0]
    return pictures


def rows_of_step(step: int, batch: int, count: int, seed: int) -> Rows:
    """The ``batch`` pictures (of ``count``) that a step sees; every epoch is a new permutation of all."""
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs = positions // count
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in set(epochs.tolist())
    }
    pairs = zip(epochs.tolist(), (positions % count).tolist(), strict=True)
    return np.array([orders[epoch][place] for epoch, place in pairs], dtype=np.int64)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step: linear warm-up, plateau, linear decay to zero at the end of the run."""
    settings = config.optimizer
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    decay = min(1.0, (config.steps - step) / settings.decay_steps) if settings.decay_steps else 1.0
    return settings.learning_rate * warmup * decay


class Trainer:
    """A model being trained in a run directory; :func:`train` is the usual way in."""

    def __init__(self, config: TrainConfig, directory: Path, initial: Path | None = None) -> None:
        require_matplotlib()
        self.config = config
        self.directory = directory
        self.task: Task = TASKS[config.task](config, load_pictures(config))
        schedule = Schedule.create(config.model.schedule, config.model.steps, "")
        self.diffusion = GaussianDiffusion(
            schedule=schedule,
            mean_type=config.model.prediction,
            variance_type=config.model.variance,
            rescale_timesteps=config.model.rescale_timesteps,
        )
        torch.manual_seed(config.seed)
        self.model = UNet(config.model.unet, compute_dtype=getattr(torch, config.compute_dtype))
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
        if initial is not None:
            load_weights(self.model, config, initial)
        settings = config.optimizer
        self.state = TrainingState(
            model=self.model,
            ema=ExponentialMovingAverage(self.model, settings.ema),
            optimizer=torch.optim.AdamW(
                self.model.parameters(),
                lr=settings.learning_rate,
                betas=settings.betas,
                weight_decay=settings.weight_decay,
                fused=True,
            ),
            timesteps=timestep_sampler(config.timesteps, self.diffusion.steps),
        )
        directory.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self.state.resume(self.checkpoint, config)
        self.log = RunLog(directory / "log.jsonl", self.state.step)
        with replacing(directory / "config.json") as temporary:
            temporary.write_text(to_json(config) + "\n", encoding="utf-8")

    @property
    def checkpoint(self) -> Path:
        """The run's one resumable file."""
        return self.directory / "checkpoint.pt"

    def step(self) -> dict[str, float]:
        """One optimiser step; its number, losses and gradient norm are returned.

        Raises:
            NonFiniteLossError: names the step, the timesteps and the first bad module; the weights are
                untouched.
        """
        config, step = self.config, self.state.step
        torch.manual_seed(int(np.random.SeedSequence((config.seed, step)).generate_state(1)[0]))  # dropout
        generator = torch.Generator().manual_seed(torch.initial_seed() + 1)
        rows = rows_of_step(step, config.batch, len(self.task), config.seed)
        batch = self.task.batch(rows, generator)
        t, weights = self.state.timesteps.sample(config.batch, np.random.default_rng((config.seed, step)))
        noise = torch.randn(batch.x_start.shape, generator=generator)

        self.model.train()
        self.state.optimizer.zero_grad(set_to_none=True)
        parts = []
        size = config.batch // config.accumulate
        for start in range(0, config.batch, size):
            part = slice(start, start + size)
            terms = self._loss(batch.part(part), t[part], noise[part])
            torch.autograd.backward((terms.loss * weights[part]).sum().div(config.batch))
            parts.append([term.detach() for term in terms])
        loss, mse, vlb = (torch.cat(term) for term in zip(*parts, strict=True))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip)
        if not (torch.isfinite(loss).all() and torch.isfinite(norm)):
            self._stop(batch, t, noise)
        for group in self.state.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        self.state.optimizer.step()
        self.state.timesteps.update(t, loss)
        self.state.ema.update(self.model, step)
        self.state.step += 1
        means = {"loss": loss.mean(), "mse": mse.mean(), "vlb": vlb.mean(), "grad_norm": norm}
        return {"step": self.state.step, **{name: round(float(value), 6) for name, value in means.items()}}

    def _loss(self, batch: Batch, t: Tensor, noise: Tensor) -> LossTerms:
        x_t = self.diffusion.q_sample(batch.x_start, t, noise)
        output = self.model(
            x_t,
            self.diffusion.model_timesteps(t),
            tokens=batch.tokens,
            mask=batch.mask,
            low_res=batch.low_res,
        )
        weight = v_weight(self.diffusion, t) if self.config.weighting == "v" else 1.0
        return hybrid_loss(self.diffusion, output, batch.x_start, x_t, t, noise, mse_weight=weight)

    def _stop(self, batch: Batch, t: Tensor, noise: Tensor) -> None:
        message = explain_non_finite(
            self.model,
            lambda: self._loss(batch, t, noise).loss,
            self.state.step,
            self.diffusion.model_timesteps(t),
        )
        saved = str(self.checkpoint) if self.checkpoint.exists() else "not there yet"
        raise NonFiniteLossError(f"{message}; the last checkpoint is {saved}")

    def save(self) -> None:
        """Write the EMA weights as a model file with its config, the loss curve and the checkpoint.

        The checkpoint comes last: what a kill prevents is done again by the resumed run.
        """
        save_model(self.directory / "model.safetensors", self.config.model, self.state.ema.state_dict())
        records = read_log(self.log.path)
        if records:
            plot_losses(records, self.directory / "loss.png")
        self.state.save(self.checkpoint, self.config)

    def draw_samples(self) -> None:
        """Write a grid of pictures painted with the EMA weights."""
        if not self.config.samples.prompts:
            return
        with torch.device("meta"):
            model = UNet(self.config.model.unet)
        model.load_state_dict(self.state.ema.state_dict(), assign=True)
        pictures = to_uint8(self.task.samples(model.eval()))
        save_png(self.directory / "samples" / f"step-{self.state.step:06d}.png", grid(pictures, 8))

    def run(self) -> None:
        """Train to the end of the config; SIGINT and SIGTERM end the run after the step at hand."""
        config, state = self.config, self.state
        with (
            stop_signals() as stopped,
            tqdm(total=config.steps, initial=state.step, unit="step", desc=config.task) as bar,
        ):
            first, started = state.step, time.perf_counter()
            while state.step < config.steps and not stopped:
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
            if stopped:
                self.save()

    def _write_log(self, rate: float, bar: tqdm[None]) -> None:
        """Log the means over the steps since the last line."""
        records = self.state.unlogged
        record = {"step": records[-1]["step"]}
        for name in ("loss", "mse", "vlb", "grad_norm"):
            record[name] = round(float(np.mean([each[name] for each in records])), 6)
        self.log.append({**record, "images_per_second": round(rate, 2)})
        records.clear()
        bar.set_postfix(loss=f"{record['loss']:.4f}", images_s=f"{rate:.1f}")


def load_weights(model: UNet, config: TrainConfig, path: Path) -> None:
    """Start ``model`` from the weights of a model file.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or it has another config; names the field.
    """
    loaded = load_model(path)
    difference = first_difference(to_dict(loaded.config), to_dict(config.model), "model.")
    if difference is not None:
        raise ValueError(f"{path} is another model: {difference}; give the one this recipe describes")
    model.load_state_dict(loaded.network.state_dict())


def train(config: TrainConfig, directory: Path, initial: Path | None = None) -> None:
    """Run, or resume, a training run in ``directory``; a new one starts from ``initial``'s weights, if given.

    The directory gets config.json, log.jsonl, loss.png, samples/, checkpoint.pt and model.safetensors (EMA,
    float16).

    Raises:
        ValueError: the config does not fit its data, or the checkpoint there belongs to another config.
        NonFiniteLossError: the loss stopped being finite.
    """
    Trainer(config, directory, initial).run()


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
