"""``glide-fast data``, ``convert`` and ``models``: what lies in files, before it is used."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import Positional, arg

from glide_fast.data.check import DEFAULT_CONTEXT, check
from glide_fast.models import convert
from glide_fast.models.catalogue import catalogue
from glide_fast.models.presets import published
from glide_fast.text.tokenizer import get_tokenizer


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
