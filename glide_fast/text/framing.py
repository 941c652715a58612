"""Texts as a CLIP reads them: the tokens of each, closed by an end token, which speaks for the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glide_fast.text.clip_tokenizer import clip_tokenizer
from glide_fast.text.tokenizer import TOKENIZERS, get_tokenizer

CLIP = "clip"


class FramedTokens(NamedTuple):
    """Tokens [B, context] of B texts, and how many of each count [B], the last of them the end token."""

    tokens: Tensor
    lengths: Tensor


def tokenizer_size(name: str) -> int:
    """The number of ids of a tokenizer: "clip", or one of ``TOKENIZERS``; ValueError lists them."""
    return clip_tokenizer().size if name == CLIP else get_tokenizer(_known(name)).size


def framed(name: str, texts: Sequence[str], context: int) -> FramedTokens:
    """Encode ``texts`` with the tokenizer ``name``: "clip", or one of ``TOKENIZERS``.

    CLIP's puts its start token before a text. What is more than ``context`` tokens is cut; the rest is zeros.

    Raises:
        ValueError: an unknown tokenizer, or a context below 3.
    """
    if context < 3:
        raise ValueError(f"context {context} must be at least 3: a start token, one of text and an end token")
    if name == CLIP:
        clip = clip_tokenizer()
        start, end, encode = [clip.start_token], clip.end_token, clip.encode
    else:
        other = get_tokenizer(_known(name))
        start, end, encode = [], other.end_token, other.encode
    tokens = torch.zeros(len(texts), context, dtype=torch.int64)
    lengths = torch.zeros(len(texts), dtype=torch.int64)
    for row, text in enumerate(texts):
        ids = [*start, *encode(text)[: context - 1 - len(start)], end]
        tokens[row, : len(ids)] = torch.tensor(ids)
        lengths[row] = len(ids)
    return FramedTokens(tokens, lengths)


def _known(name: str) -> str:
    if name not in TOKENIZERS:
        raise ValueError(f"tokenizer {name!r} is unknown; choose one of {CLIP}, {', '.join(TOKENIZERS)}")
    return name
