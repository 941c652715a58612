"""Tokenizers: equal to the original on stored texts, reversible, padded and cut by the documented rules."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glide_fast.text.tokenizer import (
    TOKENIZERS,
    Tokenizer,
    byte_alphabet,
    embedded_tokenizer,
    get_tokenizer,
    glide_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from tests import golden

FIXTURES: list[dict[str, Any]] = golden.data("tokenizers")
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
CAPTIONS = ["a red apple", "a green apple", "a red car", "the green car, seen from above", "café"]


@pytest.mark.parametrize("fixture", FIXTURES, ids=[str(index) for index in range(len(FIXTURES))])
def test_glide_tokens_equal_the_original(fixture: dict[str, Any]) -> None:
    tokenizer = glide_tokenizer()
    assert tokenizer.encode(fixture["text"]) == fixture["glide"]
    assert tokenizer.decode(fixture["glide"]) == fixture["glide_decoded"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = tokenizer.batch([fixture["text"]], 16)
    assert batch.tokens.tolist() == [fixture["glide_padded_16"]]
    assert batch.mask.int().tolist() == [fixture["glide_mask_16"]]
    assert batch.tokens.dtype == torch.int64
    assert batch.mask.dtype == torch.bool


def test_all_sixty_four_texts_are_there() -> None:
    assert len(FIXTURES) == 64


def test_glide_size_and_end() -> None:
    assert glide_tokenizer().size == 50257
    assert glide_tokenizer().end_token == 50256


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_decode_returns_the_lower_cased_text(name: str, text: str) -> None:
    tokenizer = get_tokenizer(name)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text.lower()
    assert all(0 <= token < tokenizer.end_token for token in tokens)


@settings(max_examples=40, deadline=None)
@given(text=ANY_TEXT, context=st.integers(1, 12))
def test_mask_counts_the_text_and_the_rest_is_padding(text: str, context: int) -> None:
    tokenizer = embedded_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = tokenizer.batch([text, ""], context)
    count = min(len(tokenizer.encode(text)), context)
    assert batch.mask.sum(1).tolist() == [count, 0]
    assert (batch.tokens[~batch.mask] == tokenizer.end_token).all()
    assert batch.tokens[0, :count].tolist() == tokenizer.encode(text)[:count]


def test_empty_prompt_is_all_padding_and_empty_batch_has_no_rows() -> None:
    tokenizer = glide_tokenizer()
    batch = tokenizer.batch([""], 4)
    assert batch.tokens.tolist() == [[50256] * 4]
    assert not batch.mask.any()
    assert tokenizer.batch([], 4).tokens.shape == (0, 4)


def test_cutting_warns_and_shows_what_was_kept() -> None:
    with pytest.warns(UserWarning, match=r"7 tokens was cut to the model's 4; kept: 'an oil painting of'"):
        glide_tokenizer().batch(["an oil painting of a corgi"], 4)


def test_a_prompt_that_fits_exactly_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert glide_tokenizer().batch(["an oil painting of a corgi"], 7).mask.all()


def test_text_that_looks_like_a_special_token_is_text() -> None:
    for name in TOKENIZERS:
        tokenizer = get_tokenizer(name)
        assert tokenizer.end_token not in tokenizer.encode("<|endoftext|>")


def test_padding_decodes_to_nothing() -> None:
    tokenizer = embedded_tokenizer()
    assert tokenizer.decode(tokenizer.batch(["red apple"], 9).tokens[0].tolist()) == "red apple"


def test_words_of_the_captions_are_single_tokens_wherever_they_stand() -> None:
    tokenizer = embedded_tokenizer()
    first, second = tokenizer.encode("apple"), tokenizer.encode("red apple")
    assert len(first) == 1
    assert second[-1:] == first
    assert len(tokenizer.encode("woman running, medium-dark skin tone")) == 8


def test_bad_input_names_the_value_and_the_rule() -> None:
    tokenizer = embedded_tokenizer()
    with pytest.raises(ValueError, match=r"token 999999 is outside 0\.\.3937"):
        tokenizer.decode([999999])
    with pytest.raises(ValueError, match=r"not valid Unicode"):
        tokenizer.encode("\ud800")
    with pytest.raises(ValueError, match=r"context 0 must be at least 1"):
        tokenizer.batch(["a"], 0)
    with pytest.raises(ValueError, match=r"'gpt' is unknown; choose one of glide, embedded"):
        get_tokenizer("gpt")


def test_training_is_reproducible_and_keeps_the_size() -> None:
    tokenizer = train_tokenizer(CAPTIONS, 280)
    assert tokenizer.size == 280
    assert tokenizer.merges == train_tokenizer(list(CAPTIONS), 280).merges
    assert len(train_tokenizer(CAPTIONS, 10_000).encode("the apple")) == 2
    with pytest.raises(ValueError, match=r"size 256 must be at least 257"):
        train_tokenizer(CAPTIONS, 256)
    with pytest.raises(ValueError, match="no caption"):
        train_tokenizer([], 300)


@pytest.mark.parametrize("name", ["vocabulary.json", "vocabulary.json.gz"])
def test_saved_and_loaded_tokenizers_are_equal(tmp_path: Path, name: str) -> None:
    tokenizer = train_tokenizer(CAPTIONS, 300)
    tokenizer.save(tmp_path / name)
    loaded = load_tokenizer(tmp_path / name)
    assert loaded.merges == tokenizer.merges
    assert loaded.encode("A green café") == tokenizer.encode("a green café")
    first = (tmp_path / name).read_bytes()
    loaded.save(tmp_path / name)
    assert (tmp_path / name).read_bytes() == first


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"merges": ["a"]}', b"\x1f\x8bxx"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer file"):
        load_tokenizer(path)


def test_repeated_merges_are_refused() -> None:
    with pytest.raises(ValueError, match="there already"):
        Tokenizer([("a", "b"), ("a", "b")])


def test_the_alphabet_is_every_byte_once() -> None:
    assert len(set(byte_alphabet())) == 256


def test_the_shipped_vocabulary_is_the_trained_one() -> None:
    emoji = pytest.importorskip("emoji")
    if not emoji.__version__.startswith("2.16."):
        pytest.skip(f"the vocabulary was trained on the captions of emoji 2.16, not {emoji.__version__}")
    from glide_fast.data.emoji_captions import list_emoji
    from glide_fast.text.tokenizer import EMBEDDED_SIZE

    captions = [item.caption for item in list_emoji()]
    assert train_tokenizer(captions, EMBEDDED_SIZE).merges == embedded_tokenizer().merges
    assert max(len(embedded_tokenizer().encode(caption)) for caption in captions) == 19
