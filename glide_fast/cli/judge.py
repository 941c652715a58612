"""``glide-fast draw``, ``judge`` and ``evaluate``: how good a model's pictures are."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import OmitArgPrefixes, Positional, arg

from glide_fast.cli.painter import EMOJI, Painter
from glide_fast.data.emoji import load_emoji, split
from glide_fast.evaluation import evaluate_emoji
from glide_fast.evaluation.cache import cached
from glide_fast.evaluation.drawing import DrawingPlan, draw
from glide_fast.evaluation.extractors import find_extractor
from glide_fast.evaluation.judgement import judge
from glide_fast.evaluation.pictures import read_pictures
from glide_fast.files import replacing, sha256_of
from glide_fast.sampling.pipeline import TextToImage
from glide_fast.training.distributed import joined


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Paint many pictures for `glide-fast judge`, alone or as one of the processes of torchrun.

    Stopped or killed at any moment, the same command goes on, with any number of processes; the pictures are
    the same for any number.
    """

    number: Annotated[Positional[int], arg(metavar="N")]
    """How many."""
    out: Path
    """Folder for the pictures."""
    captions: str = EMOJI
    """Their captions, in a random order: a text file with one a line, or "emoji", its training captions."""
    size: int | None = None
    """Pixels: the base model's size leaves the upsampler out. Default: the largest."""
    seed: int = 0
    """Seed of the first picture, and of the order."""
    batch: int = 8
    """Pictures painted at a time."""
    painter: OmitArgPrefixes[Painter] = field(default_factory=Painter)

    def run(self) -> None:
        captions = self._captions()
        with joined() as world:  # first: it chooses this process's GPU
            model = self.painter.load(self.size)
            plan = DrawingPlan(
                number=self.number,
                captions=captions,
                seed=self.seed,
                batch=self.batch,
                made_by=self._made_by(model),
            )
            paint = partial(self.painter.paint, model)
            draw(paint, plan, self.out, world, progress=world.rank == 0 and sys.stderr.isatty())
            if world.rank == 0:
                print(f"{self.number} pictures in {self.out}")

    def _made_by(self, model: TextToImage) -> dict[str, Any]:
        """What decides the pictures, whatever the names of the files."""
        network = model.base.network
        return {
            **asdict(replace(self.painter, model="", upsampler=None)),
            "guidance": self.painter.scale(model),
            "size": model.size,
            "device": next(network.parameters()).device.type,
            "dtype": str(network.compute_dtype),
            "model_sha256": [sha256_of(path) for path in self.painter.files()],
        }

    def _captions(self) -> list[str]:
        if self.captions == EMOJI:
            training, _ = split(load_emoji(32))
            return training.captions
        path = Path(self.captions)
        if not path.is_file():
            raise FileNotFoundError(f"captions {self.captions!r} are neither {EMOJI!r} nor a text file")
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Say how good and how varied pictures are, compared with others, and how well they show their captions.

    Features are computed once and kept in the cache folder.
    """

    samples: Annotated[Positional[str], arg(metavar="SAMPLES")]
    """A folder that `glide-fast draw` wrote, an .npz with the pictures as arr_0, or a folder of pictures."""
    reference: str
    """What they should be like: as SAMPLES, "emoji", or an .npz with statistics, as OpenAI's."""
    features: str = EMOJI
    """Who looks: "emoji" (the embedded judge), "inception", a CLIP such as clip-vit-b-32, or its file."""
    clip: str | None = None
    """Who compares pictures with captions, if not the same: "emoji", a CLIP, or its file."""
    out: Path | None = None
    """A file for the numbers, as JSON."""

    def run(self) -> None:
        samples = read_pictures(self.samples)
        reference = read_pictures(self.reference, size=samples.size)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        extractor = cached(find_extractor(self.features, device=device))
        clip = None if self.clip is None else cached(find_extractor(self.clip, device=device))
        found = judge(samples, reference, extractor, clip=clip, progress=sys.stderr.isatty())
        print(found)
        if self.out is not None:
            with replacing(self.out) as temporary:
                temporary.write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Paint emoji captions and count how many are recognised by their nearest picture."""

    captions: int = 256
    """Captions drawn from the training set."""
    seed: int = 0
    """Seed of that draw and of the pictures."""
    painter: OmitArgPrefixes[Painter] = field(default_factory=Painter)

    def run(self) -> None:
        model = self.painter.load()
        paint = partial(self.painter.paint, model)
        print(evaluate_emoji(paint, captions=self.captions, seed=self.seed, progress=sys.stderr.isatty()))
        print(f"{self.painter.sampler}, {self.painter.steps} steps, guidance {self.painter.scale(model):g}")
