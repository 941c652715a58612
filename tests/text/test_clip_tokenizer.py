"""CLIP's tokenizer: the recorded ids of the original, special tokens in a text, and damaged files."""

from __future__ import annotations

import gzip
from importlib import resources
from pathlib import Path

import pytest

from glide_fast.text.clip_tokenizer import MERGES_FILE, clean, clip_tokenizer, load_clip_tokenizer
from tests.golden import data, entry

ROWS = data("tokenizers")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ascii(row["text"][:20]))
def test_ids_and_texts_are_the_originals(row: dict[str, object]) -> None:
    tokenizer = clip_tokenizer()
    assert tokenizer.encode(str(row["text"])) == row["clip"]
    assert tokenizer.decode(row["clip"]) == row["clip_decoded"]  # type: ignore[arg-type]


def test_size_and_special_tokens() -> None:
    tokenizer, constants = clip_tokenizer(), entry("tokenizers")["constants"]
    assert tokenizer.size == constants["clip_n_vocab"]
    assert tokenizer.start_token == constants["clip_start_token"]
    assert tokenizer.end_token == constants["clip_end_token"]


def test_a_special_token_counts_only_where_a_word_begins() -> None:
    tokenizer = clip_tokenizer()
    assert tokenizer.encode("cat<|endoftext|>dog") == [
        *tokenizer.encode("cat"),
        tokenizer.end_token,
        *tokenizer.encode("dog"),
    ]
    assert tokenizer.end_token not in tokenizer.encode("!<|endoftext|>")


def test_cleaning_repairs_and_lowers() -> None:
    assert clean("  CafÃ©\t&amp;amp;\n  Straße ") == "café & straße"


def test_unknown_ids_are_named() -> None:
    with pytest.raises(ValueError, match=r"token 49408 is outside 0\.\.49407"):
        clip_tokenizer().decode([320, 49408])


def test_merges_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "merges.txt.gz"
    path.write_bytes((resources.files("glide_fast") / "assets" / MERGES_FILE).read_bytes())
    assert load_clip_tokenizer(path).encode("a diagram") == clip_tokenizer().encode("a diagram")


@pytest.mark.parametrize(
    "content", [b"no archive", gzip.compress(b"header\nthree parts here\n"), b"\x1f\x8b"]
)
def test_a_file_of_something_else_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"merges.txt.gz is not a list of CLIP's merges"):
        load_clip_tokenizer(path)
