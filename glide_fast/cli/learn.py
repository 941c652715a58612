"""``glide-fast train`` and ``plan``: make a model, and know before what it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from glide_fast.config import load_toml
from glide_fast.models import PRESETS
from glide_fast.models.clip import CLIPConfig
from glide_fast.models.presets import published
from glide_fast.training import TrainConfig, train


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model as a recipe says, or go on with a run that was stopped at any moment."""

    config: Positional[Path]
    """A recipe, such as configs/emoji_base.toml."""
    out: Path
    """The run's folder: config, log, loss curve, samples, checkpoint and model."""
    initial: Path | None = None
    """A model file (.safetensors) whose weights a new run starts from."""

    def run(self) -> None:
        config = load_toml(TrainConfig, self.config)
        if any(self.out.glob("checkpoint*")):
            print(f"going on with the run in {self.out}")
        train(config, self.out, self.initial)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say what training a model takes before it is tried: memory a GPU, FLOPs, speed, days."""

    model: Annotated[Positional[str], arg(metavar="PRESET|RECIPE.toml")]
    """A preset, such as glide-3.5b-base, or a recipe, such as configs/emoji_base.toml."""
    gpus: int = 1
    """How many."""
    gpu: str = "H100"
    """Which; an unknown one lists those that are known."""
    batch: int | None = None
    """Pictures an optimiser step, on all GPUs together. Default: the recipe's, or 32 a GPU."""
    accumulate: int | None = None
    """Parts in which a GPU takes its share of a batch. Default: the recipe's, or 1."""
    images: float | None = None
    """Pictures to learn from until the run ends. Default: the recipe's steps, or 100 million."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the activations. Default: the recipe's, or bfloat16."""
    sharding: Literal["ddp", "fsdp"] | None = None
    """ddp: everything on every GPU. fsdp: weights and what belongs to them divided among the GPUs.
    Default: the recipe's, or ddp."""
    checkpoint_activations: bool = False
    """Compute the blocks' activations again in the backward pass instead of keeping them, as a recipe may."""
    utilisation: float = 0.4
    """Share of the GPU's peak FLOP/s that is assumed to be reached, 0 to 1; small models reach less."""

    def run(self) -> None:
        recipe = load_toml(TrainConfig, Path(self.model)) if self.model.endswith(".toml") else None
        model = published(self.model).config if recipe is None else recipe.network
        if isinstance(model, CLIPConfig):
            known = [name for name, config in PRESETS.items() if not isinstance(config, CLIPConfig)]
            raise ValueError(f"no task trains preset {self.model!r}; choose one of {', '.join(known)}")
        defaults: dict[str, Any] = {"batch": 32 * self.gpus, "accumulate": 1, "dtype": "bfloat16"}
        defaults["sharding"] = "ddp"
        if recipe is not None:
            defaults = {name: getattr(recipe, name) for name in ("batch", "accumulate", "sharding")}
            defaults["dtype"] = recipe.compute_dtype
        given = {name: getattr(self, name) for name in defaults if getattr(self, name) is not None}
        choices = {**defaults, **given}
        images = self.images
        if images is None:
            images = 1e8 if recipe is None else recipe.steps * choices["batch"]
        from glide_fast.training.plan import Setup, plan  # brings torch's FLOP counter, slow to import

        setup = Setup(
            gpus=self.gpus,
            gpu=self.gpu,
            checkpoint_activations=self.checkpoint_activations
            or (recipe is not None and recipe.checkpoint_activations),
            utilisation=self.utilisation,
            images=images,
            **choices,
        )
        print(plan(self.model, model, setup))
