"""CLIP's tokenizer: byte-level BPE on cleaned, lower-cased text, with a mark at the end of every word.

The vocabulary follows from the published list of merges: the 256 bytes, the same as ends of words, one entry
a merge, and last the start and the end token (Radford et al. 2021, arXiv 2103.00020, section 2.4). Text is
repaired (mojibake, HTML entities), its white space is made single, and it is merged by ``tokenizers``.
"""

from __future__ import annotations

import functools
import gzip
import html
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

import ftfy
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Engine

from glide_fast.text.tokenizer import Merge, byte_alphabet

MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2  # the published list is longer; CLIP was trained with so many
END_OF_WORD = "</w>"
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
WORDS = r"(?i)<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """BPE whose ids are CLIP's; ``merges`` are pairs of entries in order of rank.

    The special tokens are recognised in a text as in the original, which lets a text name them.
    """

    def __init__(self, merges: Sequence[Merge]) -> None:
        letters = byte_alphabet()
        entries = [*letters, *(letter + END_OF_WORD for letter in letters)]
        entries += [left + right for left, right in merges]
        self.merges = tuple(merges)
        self.vocabulary = {entry: index for index, entry in enumerate([*entries, *SPECIAL])}
        if len(self.vocabulary) != len(entries) + len(SPECIAL):
            raise ValueError("the merges give an entry twice; is this CLIP's list of merges?")
        self.start_token, self.end_token = (self.vocabulary[token] for token in SPECIAL)
        self._split = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
        self._engine = Engine(
            models.BPE(vocab=self.vocabulary, merges=list(self.merges), end_of_word_suffix=END_OF_WORD)
        )
        self._engine.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
        self._engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._engine.decoder = decoders.ByteLevel()

    @property
    def size(self) -> int:
        """Number of token ids, the start and the end token included."""
        return len(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without start and end tokens; "" gives []."""
        words = [word for word, _ in self._split.pre_tokenize_str(clean(text))]
        ids: list[int] = self._engine.encode(words, is_pretokenized=True, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of ``tokens``, a space behind every word. ValueError for unknown ids."""
        ids = [int(token) for token in tokens]
        unknown = [token for token in ids if not 0 <= token < self.size]
        if unknown:
            raise ValueError(
                f"token {unknown[0]} is outside 0..{self.size - 1}; was it made by another tokenizer?"
            )
        text: str = self._engine.decode(ids, skip_special_tokens=False)
        return text.replace(END_OF_WORD, " ")


def clean(text: str) -> str:
    """Repair mojibake and (doubly) escaped HTML, make white space single, and lower the case."""
    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(repaired.split()).lower()


def load_clip_tokenizer(path: str | Path) -> ClipTokenizer:
    """Read the list of merges as CLIP's code publishes it; ValueError that names the file when it is none."""
    return _parse(Path(path).read_bytes(), str(path))


@functools.cache
def clip_tokenizer() -> ClipTokenizer:
    """Return CLIP's tokenizer: 49,408 ids, start 49406, end 49407."""
    return _parse((resources.files("glide_fast") / "assets" / MERGES_FILE).read_bytes(), MERGES_FILE)


def _parse(content: bytes, name: str) -> ClipTokenizer:
    try:
        lines = gzip.decompress(content).decode().split("\n")[1 : MERGES + 1]
        return ClipTokenizer([(left, right) for left, right in (line.split() for line in lines)])
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{name} is not a list of CLIP's merges: {error}") from error
