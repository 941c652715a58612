"""Byte-level BPE tokenizers: GLIDE's (GPT-2's merges) and the small one of the embedded model.

A vocabulary follows from its list of merges: the 256 bytes in GPT-2's order, one entry a merge, and last
the end token that also pads. The text is lower-cased, split with GPT-2's pattern ("Language Models are
Unsupervised Multitask Learners", Radford et al. 2019), and merged by the library ``tokenizers``. Text that
looks like a special token is ordinary text.
"""

from __future__ import annotations

import functools
import gzip
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

__all__ = [
    "TOKENIZERS",
    "TokenBatch",
    "Tokenizer",
    "embedded_tokenizer",
    "get_tokenizer",
    "glide_tokenizer",
    "load_tokenizer",
    "train_tokenizer",
]

GLIDE_FILE = "glide_bpe.json.gz"
EMBEDDED_FILE = "embedded_vocabulary.json"
EMBEDDED_SIZE = 4096  # enough for every word of the captions to become one token; fewer are needed

Merge = tuple[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """Token ids of B prompts, padded to one length, and which of them are text."""

    tokens: Tensor  # B S, int64
    mask: Tensor  # B S, bool: True at text, False at padding


class Tokenizer:
    """Byte-level BPE on lower-cased text.

    ``merges`` are pairs in GPT-2's printable byte alphabet, in order of rank. With ``leading_space`` the
    first word of a text has the same token as inside a sentence (a space is put before it, and removed by
    ``decode``).
    """

    def __init__(self, merges: Sequence[Merge], *, leading_space: bool = False) -> None:
        self.merges = tuple(merges)
        self.leading_space = leading_space
        entries = byte_alphabet() + [left + right for left, right in self.merges]
        vocabulary = {entry: index for index, entry in enumerate(entries)}
        if len(vocabulary) != len(entries):
            raise ValueError(f"{len(entries) - len(vocabulary)} merges give an entry that is there already")
        self.end_token = len(entries)
        self._engine = Engine(models.BPE(vocab=vocabulary, merges=list(self.merges)))
        self._engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        self._engine.decoder = decoders.ByteLevel()

    @property
    def size(self) -> int:
        """Number of token ids, the end (padding) token included."""
        return self.end_token + 1

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, no end token; "" gives []. ValueError for lone surrogates."""
        lowered = text.lower()
        try:
            lowered.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {text!r} is not valid Unicode ({error.reason}); give it in UTF-8"
            ) from error
        if self.leading_space and lowered:
            lowered = " " + lowered
        ids: list[int] = self._engine.encode(lowered, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of ``tokens``; end (padding) tokens give nothing. ValueError for unknown ids."""
        ids = [int(token) for token in tokens]
        unknown = [token for token in ids if not 0 <= token < self.size]
        if unknown:
            raise ValueError(
                f"token {unknown[0]} is outside 0..{self.size - 1}; was it made by another tokenizer?"
            )
        text: str = self._engine.decode([token for token in ids if token != self.end_token])
        return text[1:] if self.leading_space and text.startswith(" ") else text

    def batch(self, texts: Sequence[str], context: int) -> TokenBatch:
        """Encode B texts to [B, context], padded with the end token; "" is all padding (unconditional).

        A text of more than ``context`` tokens is cut, with a warning that shows what was kept.
        """
        if context < 1:
            raise ValueError(f"context {context} must be at least 1 token")
        tokens = torch.full((len(texts), context), self.end_token, dtype=torch.int64)
        mask = torch.zeros((len(texts), context), dtype=torch.bool)
        for row, text in enumerate(texts):
            ids = self.encode(text)
            if len(ids) > context:
                kept = self.decode(ids[:context])
                warnings.warn(
                    f"prompt of {len(ids)} tokens was cut to the model's {context}; kept: {kept!r}",
                    stacklevel=2,
                )
                ids = ids[:context]
            tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            mask[row, : len(ids)] = True
        return TokenBatch(tokens=tokens, mask=mask)

    def save(self, path: str | Path) -> None:
        """Write the merges as JSON; compressed when the name ends in .gz."""
        content = json.dumps(
            {
                "leading_space": self.leading_space,
                "merges": [f"{left} {right}" for left, right in self.merges],
            },
            ensure_ascii=False,
            indent=0,
        ).encode()
        if str(path).endswith(".gz"):
            content = gzip.compress(content, 9, mtime=0)
        Path(path).write_bytes(content)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer that ``Tokenizer.save`` wrote; ValueError that names the file when it is none."""
    return _parse(Path(path).read_bytes(), str(path))


@functools.cache
def glide_tokenizer() -> Tokenizer:
    """Return GLIDE's tokenizer: GPT-2's 50,000 merges on lower-cased text; end and padding are 50256."""
    return _load_asset(GLIDE_FILE)


@functools.cache
def embedded_tokenizer() -> Tokenizer:
    """Return the tokenizer of the embedded model, in which every word of the emoji captions is one token."""
    return _load_asset(EMBEDDED_FILE)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {"glide": glide_tokenizer, "embedded": embedded_tokenizer}


def get_tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer of ``TOKENIZERS`` by name; ValueError that lists the names."""
    if name not in TOKENIZERS:
        raise ValueError(f"tokenizer {name!r} is unknown; choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()


def train_tokenizer(captions: Sequence[str], size: int) -> Tokenizer:
    """Learn a vocabulary of at most ``size`` ids from captions: the most frequent pairs are merged first.

    The same captions always give the same merges. The shipped vocabulary is ``train_tokenizer([item.caption
    for item in glide_fast.data.emoji_captions.list_emoji()], EMBEDDED_SIZE)`` of the package emoji 2.16.
    Raises ValueError for a size below 257 (the bytes and the end token) or when there is no caption.
    """
    alphabet = byte_alphabet()
    if size <= len(alphabet):
        raise ValueError(
            f"vocabulary size {size} must be at least {len(alphabet) + 1}: all bytes and the end token"
        )
    if not captions:
        raise ValueError("there is no caption to learn a vocabulary from")
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator([" " + caption.lower() for caption in captions], trainer)
    merges = [(left, right) for left, right in json.loads(engine.to_str())["model"]["merges"]]
    return Tokenizer(merges, leading_space=True)


def byte_alphabet() -> list[str]:
    """Return GPT-2's printable stand-ins for the 256 bytes, in the order of their ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(unprintable)]


def _load_asset(name: str) -> Tokenizer:
    return _parse((resources.files("glide_fast") / "assets" / name).read_bytes(), name)


def _parse(content: bytes, name: str) -> Tokenizer:
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        stored = json.loads(content)
        merges = [(left, right) for left, right in (merge.split(" ") for merge in stored["merges"])]
        return Tokenizer(merges, leading_space=bool(stored["leading_space"]))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError) as error:
        raise ValueError(f"{name} is not a tokenizer file: {error}") from error
