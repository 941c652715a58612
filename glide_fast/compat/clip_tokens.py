"""CLIP's tokenizer class as glide-text2im and CLIP offer it, on :mod:`glide_fast.text.clip_tokenizer`."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from importlib import resources

from glide_fast.text.clip_tokenizer import MERGES_FILE, clip_tokenizer, load_clip_tokenizer


@functools.cache
def default_bpe() -> str:
    """The path of the list of merges that ships with this package."""
    return str(resources.files("glide_fast") / "assets" / MERGES_FILE)


class SimpleTokenizer:
    """CLIP's BPE; ``encoder`` has the id of every entry, ``decoder`` the entry of every id."""

    def __init__(self, bpe_path: str | None = None) -> None:
        shipped = bpe_path in (None, default_bpe())
        self._tokenizer = clip_tokenizer() if shipped else load_clip_tokenizer(str(bpe_path))
        self.encoder = dict(self._tokenizer.vocabulary)
        self.decoder = {index: entry for entry, index in self.encoder.items()}
        self.bpe_ranks = {merge: rank for rank, merge in enumerate(self._tokenizer.merges)}

    @property
    def n_vocab(self) -> int:
        """Number of token ids, the start and the end token included."""
        return self._tokenizer.size

    @property
    def start_token(self) -> int:
        """The token before a text."""
        return self._tokenizer.start_token

    @property
    def end_token(self) -> int:
        """The token behind a text."""
        return self._tokenizer.end_token

    def padded_tokens_and_len(self, tokens: list[int], text_ctx: int) -> tuple[list[int], int]:
        """Start, the tokens cut to fit, end, and zeros up to ``text_ctx``; and how many are no padding."""
        framed = [self.start_token, *tokens[: text_ctx - 2], self.end_token]
        return framed + [0] * (text_ctx - len(framed)), len(framed)

    def encode(self, text: str) -> list[int]:
        """The token ids of ``text``, without start and end tokens."""
        return self._tokenizer.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``, a space behind every word."""
        return self._tokenizer.decode(tokens)
