"""What a person types: ``glide-fast sample | train | plan | evaluate | data | models | convert | run …``.

A command is a dataclass whose fields are its options; ``run`` does the work. A user's mistake ends in one
line on stderr and exit status 1 (2 where the command line itself is wrong), never in a traceback.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from tyro.conf import Positional, arg, subcommand

from glide_fast import doctor
from glide_fast.compat import run as compat
from glide_fast.config import load_toml
from glide_fast.data.check import DEFAULT_CONTEXT, check
from glide_fast.data.images import center_square, grid, load_image, save_png, to_tensor
from glide_fast.evaluation import evaluate_emoji
from glide_fast.files import replacing, sha256_of
from glide_fast.models import PRESETS, MaskedImage, ModelConfig, convert
from glide_fast.models.catalogue import catalogue
from glide_fast.models.checkpoint import files_of
from glide_fast.models.clip import CLIPConfig
from glide_fast.models.presets import published
from glide_fast.sampling.pipeline import EMBEDDED, UPSAMPLER_OPTIONS, StageOptions, TextToImage
from glide_fast.text.tokenizer import get_tokenizer
from glide_fast.training import LostProcessError, NonFiniteLossError, TrainConfig, train

EMOJI = "emoji"
LARGEST_COUNT = 10_000


@dataclass(frozen=True, kw_only=True)
class Painter:
    """Which models paint, and how."""

    model: str = EMOJI
    """"emoji", which ships with the package; a preset such as glide-base; or a base model's file."""
    upsampler: str | None = None
    """The upsampler that belongs to another base model than "emoji": a preset or a file."""
    sampler: str = "ddim"
    """How to go from noise to picture: ddpm, ddim, plms, euler, euler_ancestral, heun, dpm++2m, dpm++2m_sde
    or unipc."""
    eta: float | None = None
    """Noise added each step, 0 to 1, for samplers that have a choice; default: the sampler's usual."""
    steps: int = 50
    """Steps of the base model, 2 to 1000."""
    guidance: float | None = None
    """Classifier-free guidance of the base model, 0 to 100: 0 ignores the prompt, 1 is the plain model.
    Default: 1.25 for "emoji", 3 for other models."""
    rescale: float = 0.0
    """Share of the contrast that guidance adds and that is taken back, 0 to 1."""
    upsampler_steps: int = 20
    """Steps of the upsampler, 2 to 1000."""

    def scale(self, model: TextToImage) -> float:
        """The guidance that is given, or the model's usual one."""
        return model.guidance if self.guidance is None else self.guidance

    def sources(self) -> list[str | Path]:
        """Files or names of presets: the base model, then the upsampler if there is one."""
        if self.model == EMOJI:
            if self.upsampler is not None:
                raise ValueError(f"model {self.model!r} has its own upsampler; leave --upsampler out")
            return list(EMBEDDED)
        sources: list[str | Path] = [_painting_model(self.model, upsampler=False)]
        if self.upsampler is not None:
            sources.append(_painting_model(self.upsampler, upsampler=True))
        return sources

    def files(self) -> list[Path]:
        """The model files, downloaded if need be."""
        return [path for source in self.sources() for path in files_of(source)]

    def load(self, size: int | None = None) -> TextToImage:
        """The models, without the upsampler where ``size`` is that of the base model."""
        sources = self.sources()
        model = TextToImage.embedded() if self.model == EMOJI else TextToImage.load(*sources)
        sizes = [stage.config.unet.image_size for stage in (model.base, model.upsampler) if stage]
        if size is not None and size not in sizes:
            raise ValueError(
                f"size {size} is not one this model paints; choose {' or '.join(map(str, sizes))}"
            )
        return replace(model, upsampler=None) if size == sizes[0] else model

    def paint(
        self, model: TextToImage, prompts: Sequence[str], seeds: Sequence[int], **rest: Any
    ) -> NDArray[np.uint8]:
        """One picture a prompt and seed, uint8 [B, H, W, 3]; ``rest`` as for :class:`TextToImage`."""
        options = StageOptions(
            sampler=self.sampler,
            eta=self.eta,
            steps=self.steps,
            guidance=self.scale(model),
            rescale=self.rescale,
        )
        return model(
            prompts,
            seeds=seeds,
            base_options=options,
            upsampler_options=replace(
                UPSAMPLER_OPTIONS, sampler=self.sampler, eta=self.eta, steps=self.upsampler_steps
            ),
            **rest,
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Paint pictures from prompts: PNG files, a grid, and sample.json, which says how to get them again.

    The k-th picture of a prompt has the seed SEED + k and does not depend on how many are painted.
    """

    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT ...")]
    """What to paint, one or more texts; "" paints without a prompt."""
    number: Annotated[int, arg(aliases=("-n",))] = 1
    """Pictures a prompt."""
    seed: int = 0
    """Seed of the first picture of each prompt."""
    out: Path = Path("samples")
    """Folder for the files; it replaces those of the same names."""
    size: int | None = None
    """Pixels: the base model's size leaves the upsampler out. Default: the largest."""
    batch: int = 8
    """Pictures painted at a time."""
    known: Path | None = None
    """A picture to complete: what --mask shows white is kept."""
    mask: Path | None = None
    """A picture, white where --known is kept and black where it is painted."""
    painter: tyro.conf.OmitArgPrefixes[Painter] = Painter()

    def run(self) -> None:
        if not self.prompts:
            raise ValueError('no prompt; give at least one, or "" to paint without')
        if not 1 <= self.number <= LARGEST_COUNT:
            raise ValueError(f"number {self.number} must lie in 1 .. {LARGEST_COUNT}")
        if self.batch < 1:
            raise ValueError(f"batch {self.batch} must be at least 1")
        if not 0 <= self.seed < 2**63 - self.number:
            raise ValueError(f"seed {self.seed} must lie in 0 .. 2^63 - {self.number}")
        model = self.painter.load(self.size)
        known = self._known(model.size)
        orders = [(prompt, self.seed + k) for prompt in self.prompts for k in range(self.number)]
        parts = []
        for start in range(0, len(orders), self.batch):
            prompts, seeds = zip(*orders[start : start + self.batch], strict=True)
            parts.append(self.painter.paint(model, prompts, seeds, known=known, progress=sys.stderr.isatty()))
        self._write(np.concatenate(parts), orders, self.painter.scale(model))

    def _known(self, size: int) -> MaskedImage | None:
        if self.known is None and self.mask is None:
            return None
        if self.known is None or self.mask is None:
            raise ValueError("--known and --mask belong together; give both or neither")
        image, mask = (
            to_tensor(center_square(load_image(path), size))[None] for path in (self.known, self.mask)
        )
        return MaskedImage(image, (mask.mean(1, keepdim=True) > 0).float())

    def _write(self, pictures: NDArray[np.uint8], orders: list[tuple[str, int]], guidance: float) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        rows = []
        for index, (picture, (prompt, seed)) in enumerate(zip(pictures, orders, strict=True)):
            name = f"{index:04d}-{_slug(prompt)}-{seed}.png"
            save_png(self.out / name, picture)
            rows.append({"file": name, "prompt": prompt, "seed": seed})
        save_png(self.out / "grid.png", grid(pictures, self.number if self.number > 1 else 4))
        sidecar = {
            "command": shlex.join(["glide-fast", *sys.argv[1:]]),
            "pictures": rows,
            "options": {
                **asdict(self.painter),
                "guidance": guidance,
                "size": int(pictures.shape[1]),
                "batch": self.batch,
            },
            "model_sha256": {str(path.name): sha256_of(path) for path in self.painter.files()},
            "versions": doctor.versions(),
        }
        with replacing(self.out / "sample.json") as temporary:
            temporary.write_text(json.dumps(sidecar, indent=2, default=str) + "\n", encoding="utf-8")
        print(f"{len(pictures)} pictures in {self.out}, all of them on {self.out / 'grid.png'}")


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
    dtype: Literal["float32", "bfloat16"] | None = None
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


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Paint emoji captions and count how many are recognised by their nearest picture."""

    captions: int = 256
    """Captions drawn from the training set."""
    seed: int = 0
    """Seed of that draw and of the pictures."""
    painter: tyro.conf.OmitArgPrefixes[Painter] = Painter()

    def run(self) -> None:
        model = self.painter.load()
        paint = partial(self.painter.paint, model)
        print(evaluate_emoji(paint, captions=self.captions, seed=self.seed, progress=sys.stderr.isatty()))
        print(f"{self.painter.sampler}, {self.painter.steps} steps, guidance {self.painter.scale(model):g}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Look through a folder of captioned pictures before training on it; exit status 1 if it has faults."""

    action: Positional[Literal["check"]]
    """check: read every picture and caption, and name what is broken."""
    folder: Positional[Path]
    """Pictures with captions in .txt files beside them, in captions.csv or in captions.jsonl."""
    size: int = 64
    """Pixels of the model to be trained; smaller pictures are named."""
    context: int = DEFAULT_CONTEXT
    """Tokens that model reads; longer captions are named."""
    tokenizer: str = "embedded"
    """Who counts the tokens: embedded or glide."""

    def run(self) -> None:
        report = check(
            self.folder, size=self.size, context=self.context, tokenizer=get_tokenizer(self.tokenizer)
        )
        print(report)
        if not report.ok:
            sys.exit(1)


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a model's weights as safetensors that carry their config, the values unchanged."""

    source: Annotated[Positional[str], arg(metavar="IN")]
    """A file (.pt, .pth, TorchScript, .safetensors), or a preset, which is downloaded."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """The file to write, a .safetensors."""
    model: str | None = None
    """The preset that IN is, where its shapes do not tell; `glide-fast models` lists them."""
    also: Path | None = None
    """The second file of a noise-aware CLIP, whose encoders are published apart."""
    dtype: Literal["float16", "float32"] | None = None
    """Of the weights written. Default: that of each weight read."""

    def run(self) -> None:
        if self.out.suffix != ".safetensors":
            raise ValueError(f"{self.out} would be safetensors; give it that suffix")
        source = self.source if self.also is None else [Path(self.source), self.also]
        config = None if self.model is None else published(self.model).config
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        kind = type(convert(source, self.out, config=config, dtype=dtype)).__name__
        print(f"{self.out}: {kind}, {self.out.stat().st_size / 1e6:,.1f} MB")


@dataclass(frozen=True)
class Models:
    """List the published models that can be named: task, parameters, pixels, and where the weights are."""

    def run(self) -> None:
        print(catalogue())


@dataclass(frozen=True)
class Run:
    """Run a script or notebook written for glide-text2im, guided-diffusion, improved-diffusion or CLIP."""

    arguments: Annotated[Positional[tuple[str, ...]], arg(metavar="[--out FOLDER] SCRIPT [ARGS ...]")]
    """The script, and what is handed to it unread."""

    def run(self) -> None:
        compat.main(self.arguments, "glide-fast run")


@dataclass(frozen=True)
class Doctor:
    """Say what this installation can do, and which implementation serves each op, and why."""

    def run(self) -> None:
        print(doctor.examine())


Command = (
    Annotated[Sample, subcommand("sample")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Models, subcommand("models")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Run, subcommand("run")]
    | Annotated[Doctor, subcommand("doctor")]
)


def main() -> None:
    """Entry point of the command ``glide-fast``."""
    if sys.argv[1:2] == ["run"]:  # a script's options and errors are its own
        Run(tuple(sys.argv[2:])).run()
        return
    warnings.showwarning = _show_warning
    try:
        command: Command = tyro.cli(
            Command, prog="glide-fast", description="Text to picture: sample, train, judge."
        )
        command.run()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ModuleNotFoundError, NonFiniteLossError, LostProcessError) as error:
        sys.exit(f"glide-fast: {error}")


def _show_warning(message: Warning | str, *_where: Any, **_more: Any) -> None:
    print(f"glide-fast: warning: {message}", file=sys.stderr)


def _painting_model(name: str, *, upsampler: bool) -> str:
    """``name`` if it is a file, or a preset that paints what is written (enlarging it, if ``upsampler``)."""
    painting = {
        preset: config.unet
        for preset, config in PRESETS.items()
        if isinstance(config, ModelConfig) and config.unet.text is not None
    }
    known = [preset for preset, unet in painting.items() if unet.low_res == upsampler]
    if Path(name).is_file() or name in known:
        return name
    if name in PRESETS:
        task = "enlarges a picture of a text" if upsampler else "paints a picture from a text alone"
        raise ValueError(f"model {name!r} is none that {task}; choose one of {', '.join(known)}")
    if not upsampler:
        known = [EMOJI, *known]
    raise ValueError(
        f"model {name!r} is neither a known model ({', '.join(known)}) nor a file; "
        "give the path of a model's file, such as the .safetensors that `glide-fast train` wrote"
    )


def _slug(prompt: str) -> str:
    """A short file name made of the prompt's words."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "unconditional"
