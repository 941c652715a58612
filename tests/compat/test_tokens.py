"""The tokenizers under the originals' names: recorded ids, padding, attributes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from glide_fast.compat import clip
from glide_fast.compat.clip.simple_tokenizer import SimpleTokenizer
from glide_fast.compat.glide_text2im.tokenizer import simple_tokenizer
from glide_fast.compat.glide_text2im.tokenizer.bpe import Encoder, get_encoder
from tests.golden import data, entry

ROWS: list[dict[str, Any]] = data("tokenizers")
CONSTANTS = entry("tokenizers")["constants"]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return get_encoder()


@pytest.fixture(scope="module")
def simple() -> SimpleTokenizer:
    return SimpleTokenizer()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ascii(row["text"][:20]))
def test_ids_padding_and_texts_are_the_originals(
    row: dict[str, Any], encoder: Encoder, simple: SimpleTokenizer
) -> None:
    assert encoder.encode(row["text"]) == row["glide"]
    assert encoder.decode(row["glide"]) == row["glide_decoded"]
    tokens, mask = encoder.padded_tokens_and_mask(row["glide"], 16)
    assert (tokens, [int(each) for each in mask]) == (row["glide_padded_16"], row["glide_mask_16"])

    assert simple.encode(row["text"]) == row["clip"]
    assert simple.decode(row["clip"]) == row["clip_decoded"]
    padded, length = simple.padded_tokens_and_len(row["clip"], 77)
    assert (length, len(padded)) == (row["clip_len_77"], 77)
    assert clip.tokenize(row["text"], truncate=True).tolist() == [padded]
    cut = clip.tokenize([row["text"]], 16, True)
    assert cut.dtype == torch.int32
    assert cut.tolist() == [row["clip_tokenize_16_truncated"]]
    if row["clip_tokenize_fits_77"]:
        assert clip.tokenize(row["text"]).tolist() == [padded]
    else:
        with pytest.raises(RuntimeError, match=r"too long for context length 77"):
            clip.tokenize(row["text"])


def test_attributes(encoder: Encoder, simple: SimpleTokenizer) -> None:
    assert (encoder.n_vocab, encoder.end_token) == (CONSTANTS["glide_n_vocab"], CONSTANTS["glide_end_token"])
    assert encoder.encoder["<|endoftext|>"] == encoder.end_token == encoder.start_token
    assert encoder.decode([encoder.encoder["Ġcorgi"[:3]], encoder.end_token]) == " co<|endoftext|>"
    assert (simple.n_vocab, simple.start_token, simple.end_token) == (
        CONSTANTS["clip_n_vocab"],
        CONSTANTS["clip_start_token"],
        CONSTANTS["clip_end_token"],
    )
    assert simple.encoder["dog</w>"] == simple.encode("dog")[0]
    assert simple.decoder[simple.end_token] == "<|endoftext|>"
    assert simple.bpe_ranks[("i", "n")] == 0
    assert clip.tokenize([]).shape == (0, 77)


def test_vocabularies_of_ones_own(encoder: Encoder, tmp_path: Path) -> None:
    merges = [("a", "b"), ("ab", "c")]
    ids = {
        entry: index
        for entry, index in encoder.encoder.items()
        if index < 256  # the bytes
    } | {"ab": 256, "abc": 257, "<|endoftext|>": 258}
    assert Encoder(ids, merges).encode("ABC") == [257]
    assert Encoder(ids, merges).decode([encoder.encoder["Ã"]]) == "\ufffd"
    assert Encoder(ids, merges, errors="ignore").decode([encoder.encoder["Ã"]]) == ""
    with pytest.raises(ValueError, match=r"do not follow from the merges"):
        Encoder({**ids, "abc": 300}, merges)

    copied = tmp_path / "merges.txt.gz"
    shipped = resources.files("glide_fast") / "assets" / "bpe_simple_vocab_16e6.txt.gz"
    copied.write_bytes(shipped.read_bytes())
    assert simple_tokenizer.SimpleTokenizer(str(copied)).encode("a cat") == SimpleTokenizer().encode("a cat")
    assert simple_tokenizer.default_bpe() == str(shipped)
