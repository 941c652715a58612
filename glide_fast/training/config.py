"""What a training run is made of; the recipes in ``configs/`` are these dataclasses as TOML."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from glide_fast.data.masks import MaskConfig
from glide_fast.models.configs import Config, ModelConfig
from glide_fast.models.encoder import EncoderConfig
from glide_fast.models.noisy_clip import NoisyCLIPConfig

TaskName = Literal["base", "upsampler", "inpaint", "inpaint_upsampler", "adm", "classifier", "clip"]
LARGEST_SCALE = 2.0**24
SECTIONS: dict[TaskName, str] = {"classifier": "classifier", "clip": "clip"}  # the others': "model"


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(2, number + 1) if number % divisor == 0]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """``source``: "emoji", a folder of captioned pictures, or webdataset shards, such as "a/{000..099}.tar".

    ``hold_out`` keeps emoji's test set unseen. ``flip`` mirrors half of the pictures, for data whose captions
    know no left and right. ``window`` is the number of samples among which those of a shard are shuffled.
    """

    source: str = "emoji"
    hold_out: bool = True
    flip: bool = False
    window: int = 1000


@dataclass(frozen=True, kw_only=True)
class LowResConfig:
    """The upsampler's condition: smaller by ``factor``, and degraded to forgive a base model's faults.

    A Gaussian blur of up to ``blur`` pixels and noise of up to ``noise`` (in [-1, 1] units), drawn anew for
    every picture (Cascaded Diffusion, arXiv 2106.15282, section 4.2).
    """

    factor: int = 2
    blur: float = 0.6
    noise: float = 0.1


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """How the pictures are noised that a classifier or a CLIP reads: as those of the model it will guide."""

    schedule: str = "cosine"
    steps: int = 1000


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
class ScalingConfig:
    """What float16 multiplies the loss by: at first ``initial``, half as much where gradients overflow.

    Twice as much after ``growth_interval`` steps without an overflow. After ``most_halvings`` in a row the
    run stops and says where the gradient is not finite.
    """

    initial: float = 65536.0
    growth_interval: int = 2000
    most_halvings: int = 12


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The pictures a run draws from its EMA weights, always with the same prompts and seeds.

    A model without text draws ``count`` pictures of its classes in turn instead.
    """

    prompts: tuple[str, ...] = ()
    count: int = 0
    every: int = 1000
    steps: int = 25
    guidance: float = 3.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. ``batch`` pictures an optimiser step, taken in ``accumulate`` equal parts.

    The task says which of ``model``, ``classifier`` and ``clip`` is given: diffusion models are ``model``,
    the two others read pictures with the ``noise`` of a diffusion model. ``caption_drop`` is the share of
    captions that a diffusion model with text does not see.

    ``compute_dtype`` is that of the activations, and of the copies of weights that a process alone reads;
    weights, the optimiser's moments and the average are always float32. "float16", for GPUs without
    "bfloat16", has its loss scaled (``scaling``).
    Of several processes each has all weights ("ddp") or a share of them ("fsdp"); with
    ``checkpoint_activations`` blocks compute theirs again in the backward pass.
    """

    task: TaskName
    model: ModelConfig | None = None
    classifier: EncoderConfig | None = None
    clip: NoisyCLIPConfig | None = None
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    low_res: LowResConfig = field(default_factory=LowResConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    steps: int = 10_000
    batch: int = 32
    accumulate: int = 1
    caption_drop: float = 0.2
    timesteps: Literal["uniform", "noisy", "loss_second_moment"] = "uniform"
    weighting: Literal["simple", "v"] = "simple"
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    sharding: Literal["ddp", "fsdp"] = "ddp"
    checkpoint_activations: bool = False
    seed: int = 0
    save_every: int = 250

    def __post_init__(self) -> None:
        problems = [message for holds, message in (*self._rules(), *self._network_rules()) if not holds]
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def section(self) -> str:
        """The field that describes the network: "model", "classifier" or "clip"."""
        return SECTIONS.get(self.task, "model")

    @property
    def network(self) -> Config:
        """The config of the network that is trained."""
        network: Config = getattr(self, self.section)
        return network

    @property
    def diffusion_model(self) -> ModelConfig:
        """``model``, for tasks that have one.

        Raises:
            ValueError: the task has none.
        """
        if self.model is None:
            raise ValueError(f"task {self.task!r} trains no diffusion model")
        return self.model

    @property
    def image_size(self) -> int:
        """Pixels of a side of the training pictures."""
        network = self.network
        if isinstance(network, ModelConfig):
            return network.unet.image_size
        return network.trunk.image_size if isinstance(network, EncoderConfig) else network.image_size

    @property
    def classes(self) -> int | None:
        """The number of classes that are learned, None where there are none."""
        if self.classifier is not None:
            return self.classifier.trunk.out_channels
        return None if self.model is None else self.model.unet.classes

    @property
    def reads_captions(self) -> bool:
        """Whether the task learns from captions."""
        return self.clip is not None or (self.model is not None and self.model.unet.text is not None)

    def _rules(self) -> Iterator[tuple[bool, str]]:
        samples = self.samples
        yield self.batch >= 1, f"batch {self.batch} must be at least 1"
        yield (
            self.accumulate >= 1 and self.batch % self.accumulate == 0,
            f"batch {self.batch} cannot be taken in accumulate = {self.accumulate} parts; use a divisor",
        )
        yield 0 <= self.caption_drop < 1, f"caption_drop {self.caption_drop} must be in [0, 1)"
        yield 0 <= self.optimizer.ema < 1, f"optimizer.ema {self.optimizer.ema} must be in [0, 1)"
        yield self.steps >= 1, f"steps {self.steps} must be at least 1"
        yield self.save_every >= 1, f"save_every {self.save_every} must be at least 1"
        yield self.data.window >= 1, f"data.window {self.data.window} must be at least 1"
        yield samples.every >= 1, f"samples.every {samples.every} must be at least 1"
        yield samples.count >= 0, f"samples.count {samples.count} must be at least 0"
        yield from self._scaling_rules()

    def _scaling_rules(self) -> Iterator[tuple[bool, str]]:
        scaling = self.scaling
        yield (
            1 <= scaling.initial <= LARGEST_SCALE and math.frexp(scaling.initial)[0] == 0.5,
            f"scaling.initial {scaling.initial:g} must be a power of two, 1 to {LARGEST_SCALE:g}",
        )
        for name in ("growth_interval", "most_halvings"):
            value = getattr(scaling, name)
            yield value >= 1, f"scaling.{name} {value} must be at least 1"
        yield (
            self.compute_dtype == "float16" or scaling == ScalingConfig(),
            f"compute_dtype {self.compute_dtype!r} needs no scaled loss; leave [scaling] out",
        )

    def _network_rules(self) -> Iterator[tuple[bool, str]]:
        for section in ("model", "classifier", "clip"):
            wanted, given = section == self.section, getattr(self, section) is not None
            change = f"add [{section}]" if wanted else f"leave [{section}] out"
            yield wanted == given, f"task {self.task!r} trains what [{self.section}] describes; {change}"
        if self.section == "model" and self.model is not None:
            yield from self._diffusion_rules(self.model)
        elif self.section != "model":
            yield (
                not self.samples.prompts and not self.samples.count,
                f"task {self.task!r} draws no pictures; leave samples.prompts and samples.count out",
            )
        if self.clip is not None:
            steps, timesteps = self.noise.steps, self.clip.timesteps
            yield (
                timesteps == steps,
                f"clip.timesteps {timesteps} must be noise.steps {steps}: each has its own embedding",
            )
        yield (
            self.section != "model" or self.noise == NoiseConfig(),
            f"task {self.task!r} noises pictures as [model] says; leave [noise] out",
        )
        yield (
            self.task.startswith("inpaint") or self.masks == MaskConfig(),
            f"task {self.task!r} hides no part of a picture; leave [masks] out",
        )
        yield (
            self.task != "clip" or self.accumulate == 1,
            f"accumulate {self.accumulate} must be 1 for task 'clip', which compares all pictures of a batch "
            "with all captions; use a smaller batch or more processes",
        )

    def _diffusion_rules(self, model: ModelConfig) -> Iterator[tuple[bool, str]]:
        unet, samples, task = model.unet, self.samples, self.task
        drawn = "prompts" if unet.text is not None else "count"
        yield (
            not getattr(samples, drawn) or 2 <= samples.steps <= model.steps,
            f"samples.steps {samples.steps} must lie in 2 .. model.steps = {model.steps}",
        )
        yield (
            not samples.count or unet.text is None,
            f"samples.count {samples.count} is for models without text; use samples.prompts",
        )
        yield (
            not samples.prompts or unet.text is not None,
            "samples.prompts are for models with text; use samples.count",
        )
        needs_text = task in ("base", "inpaint")
        yield (
            unet.text is not None or not needs_text,
            f"task {task!r} needs a model with text; add [model.unet.text]",
        )
        yield (
            unet.text is None or task != "adm",
            "task 'adm' is for models without text; use task 'base', or leave [model.unet.text] out",
        )
        yield (
            unet.low_res == task.endswith("upsampler"),
            f"task {task!r} and model.unet.low_res = {unet.low_res} do not fit; "
            "an upsampler is low_res, a base model is not",
        )
        yield (
            not unet.low_res or self.low_res.factor in _divisors(unet.image_size),
            f"low_res.factor {self.low_res.factor} must be a divisor of model.unet.image_size "
            f"{unet.image_size}, at least 2",
        )
        yield (
            unet.inpaint == task.startswith("inpaint"),
            f"task {task!r} and model.unet.inpaint = {unet.inpaint} do not fit; "
            "tasks 'inpaint' and 'inpaint_upsampler' train models that see a part of the picture",
        )
