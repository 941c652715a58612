"""GLIDE's tokenizer; what glide-text2im's module of this name offers, on :mod:`glide_fast.text`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from glide_fast.text.tokenizer import Merge, Tokenizer, byte_alphabet, glide_tokenizer

__all__ = ["Encoder", "get_encoder"]

END = "<|endoftext|>"


class Encoder:
    """GPT-2's BPE on lower-cased text; ``encoder`` has the id of every entry.

    ``encoder`` and ``bpe_merges`` must agree as GPT-2's do: bytes, merges in order, end token. ``errors``
    says what :meth:`decode` does with bytes that are not UTF-8: "replace", "strict" ...

    Raises:
        ValueError: the ids of ``encoder`` do not follow from the merges.
    """

    def __init__(
        self, encoder: Mapping[str, int], bpe_merges: Sequence[Merge], errors: str = "replace"
    ) -> None:
        self.encoder = dict(encoder)
        self.decoder = {index: entry for entry, index in self.encoder.items()}
        self.errors = errors
        self.bpe_ranks = {merge: rank for rank, merge in enumerate(bpe_merges)}
        shared = glide_tokenizer()
        self._tokenizer = shared if tuple(bpe_merges) == shared.merges else Tokenizer(bpe_merges)
        self._bytes = {letter: byte for byte, letter in byte_letters().items()}
        if self.encoder != vocabulary(self._tokenizer):
            raise ValueError("the ids do not follow from the merges; give GPT-2's vocabulary and merges")

    @property
    def n_vocab(self) -> int:
        """Number of token ids, the end token included."""
        return len(self.encoder)

    @property
    def end_token(self) -> int:
        """The token that ends a text and pads it."""
        return self.n_vocab - 1

    @property
    def start_token(self) -> int:
        """GPT-2 begins a text with the token that ends one."""
        return self.end_token

    def padded_tokens_and_mask(self, tokens: list[int], text_ctx: int) -> tuple[list[int], list[bool]]:
        """The tokens cut or padded to ``text_ctx``, and which of them are text."""
        kept = tokens[:text_ctx]
        padding = text_ctx - len(kept)
        return kept + [self.end_token] * padding, [True] * len(kept) + [False] * padding

    def encode(self, text: str) -> list[int]:
        """The token ids of ``text``."""
        return self._tokenizer.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, the end token spelled out."""
        entries = "".join(self.decoder[int(token)] for token in tokens)
        return bytes(self._bytes[letter] for letter in entries).decode("utf-8", errors=self.errors)


def get_encoder() -> Encoder:
    """GLIDE's tokenizer: 50,257 ids."""
    tokenizer = glide_tokenizer()
    return Encoder(vocabulary(tokenizer), tokenizer.merges)


def vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """Every entry's id: bytes, merges in order, the end token."""
    entries = [*byte_alphabet(), *(left + right for left, right in tokenizer.merges), END]
    return {entry: index for index, entry in enumerate(entries)}


def byte_letters() -> dict[int, str]:
    """The printable stand-in of each byte, in the order of their ids."""
    printable = [ord(letter) for letter in byte_alphabet() if ord(letter) < 256]
    return dict(zip(printable + sorted(set(range(256)) - set(printable)), byte_alphabet(), strict=True))
