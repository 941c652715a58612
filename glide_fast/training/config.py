"""What a training run is made of; the recipes in ``configs/`` are these dataclasses as TOML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from glide_fast.models.configs import ModelConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """``source``: "emoji" or a folder of captioned pictures; ``hold_out`` keeps emoji's test set unseen."""

    source: str = "emoji"
    hold_out: bool = True


@dataclass(frozen=True, kw_only=True)
class LowResConfig:
    """How the upsampler's condition is degraded, so that it forgives a base model's faults.

    A Gaussian blur of up to ``blur`` pixels and noise of up to ``noise`` (in [-1, 1] units), drawn anew for
    every picture (Cascaded Diffusion, arXiv 2106.15282, section 4.2).
    """

    blur: float = 0.6
    noise: float = 0.1


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW; the learning rate warms up, stays, and falls linearly to zero over the last ``decay_steps``."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    warmup_steps: int = 100
    decay_steps: int = 0
    ema: float = 0.9999


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The pictures a run draws from its EMA weights, always with the same prompts and seeds."""

    prompts: tuple[str, ...] = ()
    every: int = 1000
    steps: int = 25
    guidance: float = 3.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. ``batch`` pictures an optimiser step, taken in ``accumulate`` equal parts."""

    task: Literal["base", "upsampler"]
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    low_res: LowResConfig = field(default_factory=LowResConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    steps: int = 10_000
    batch: int = 32
    accumulate: int = 1
    caption_drop: float = 0.2
    timesteps: Literal["uniform", "noisy", "loss_second_moment"] = "uniform"
    weighting: Literal["simple", "v"] = "simple"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    save_every: int = 250

    def __post_init__(self) -> None:
        problems = [message for holds, message in self._rules() if not holds]
        if problems:
            raise ValueError("; ".join(problems))

    def _rules(self) -> list[tuple[bool, str]]:
        low_res = self.model.unet.low_res
        return [
            (self.batch >= 1, f"batch {self.batch} must be at least 1"),
            (
                self.accumulate >= 1 and self.batch % self.accumulate == 0,
                f"batch {self.batch} cannot be taken in accumulate = {self.accumulate} equal parts; "
                "use a divisor",
            ),
            (0 <= self.caption_drop < 1, f"caption_drop {self.caption_drop} must be in [0, 1)"),
            (0 <= self.optimizer.ema < 1, f"optimizer.ema {self.optimizer.ema} must be in [0, 1)"),
            (self.steps >= 1, f"steps {self.steps} must be at least 1"),
            (self.save_every >= 1, f"save_every {self.save_every} must be at least 1"),
            (self.samples.every >= 1, f"samples.every {self.samples.every} must be at least 1"),
            (
                not self.samples.prompts or 2 <= self.samples.steps <= self.model.steps,
                f"samples.steps {self.samples.steps} must lie in 2 .. model.steps = {self.model.steps}",
            ),
            (
                self.model.unet.text is not None,
                f"task {self.task!r} needs a model with text; add [model.unet.text]",
            ),
            (
                low_res == (self.task == "upsampler"),
                f"task {self.task!r} and model.unet.low_res = {low_res} do not fit; "
                "an upsampler is low_res, a base model is not",
            ),
        ]
