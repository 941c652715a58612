"""What a wrong call is told: the value, the rule and the fix."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from glide_fast.ops import attention, group_norm

GROUP_NORM: list[tuple[str, dict[str, Any], str]] = [
    (
        "no space",
        {"x": torch.ones(2, 8)},
        "x has shape (2, 8); give [B, C, *space] with 1, 2 or 3 dimensions",
    ),
    (
        "4-D space",
        {"x": torch.ones(2, 8, 1, 1, 1, 1)},
        "give [B, C, *space] with 1, 2 or 3 dimensions of space",
    ),
    (
        "integers",
        {"x": torch.ones(2, 8, 4, dtype=torch.int64)},
        "x is torch.int64; give a floating-point tensor",
    ),
    ("groups", {"groups": 3}, "8 channels are not divisible into 3 groups; change one of them"),
    ("no groups", {"groups": 0}, "8 channels are not divisible into 0 groups; change one of them"),
    ("empty space", {"x": torch.ones(2, 8, 0, 4)}, "x has shape (2, 8, 0, 4); only the batch may be empty"),
    ("weight", {"weight": torch.ones(7)}, "weight has shape (7,); x with 8 channels needs [8]"),
    ("bias", {"bias": torch.ones(8, 1)}, "bias has shape (8, 1); x with 8 channels needs [8]"),
    ("scale alone", {"scale": torch.ones(2, 8)}, "scale and shift belong together; give both or neither"),
    (
        "shift's shape",
        {"scale": torch.ones(2, 8), "shift": torch.ones(1, 8)},
        "shift has shape (1, 8); it must be [2, 8]",
    ),
    ("activation", {"activation": "relu"}, "unknown activation 'relu'; use one of none, silu"),
    ("resample", {"resample": "half"}, "unknown resample 'half'; use one of none, up, down"),
    (
        "too small",
        {"x": torch.ones(2, 8, 1, 4), "resample": "down"},
        "space (1, 4) is too small to halve; each dimension must be at least 2",
    ),
]
IMAGE, TEXT = torch.ones(2, 6, 3, 4), torch.ones(2, 5, 3, 4)
ATTENTION: list[tuple[str, dict[str, Any], str]] = [
    (
        "3-D",
        {"query": torch.ones(2, 6, 4)},
        "query has shape (2, 6, 4); it must be [B, T, N, D], only B may be 0",
    ),
    ("no heads", {"query": torch.ones(2, 6, 0, 4)}, "query has shape (2, 6, 0, 4); it must be [B, T, N, D]"),
    ("integers", {"query": IMAGE.long()}, "query is torch.int64; give a floating-point tensor"),
    (
        "key's shape",
        {"key": TEXT},
        "key (2, 5, 3, 4) and value (2, 6, 3, 4) must have the query's shape (2, 6, 3, 4)",
    ),
    ("value's shape", {"value": TEXT}, "value (2, 5, 3, 4) must have the query's shape (2, 6, 3, 4)"),
    ("text key alone", {"text_key": TEXT}, "text_key and text_value belong together; give both or neither"),
    (
        "text's heads",
        {"text_key": torch.ones(2, 5, 2, 4), "text_value": torch.ones(2, 5, 2, 4)},
        "text_key (2, 5, 2, 4) and text_value (2, 5, 2, 4) must both be [2, S, 3, 4]",
    ),
    ("text's length", {"text_key": TEXT, "text_value": IMAGE}, "must both be [2, S, 3, 4]"),
    (
        "dtypes",
        {"value": IMAGE.double()},
        "value is torch.float64 but query is torch.float32; convert one of them",
    ),
    (
        "text's dtype",
        {"text_key": TEXT.half(), "text_value": TEXT.half()},
        "text_key is torch.float16 but query is torch.float32; convert one of them",
    ),
]


@pytest.mark.parametrize(
    ("wrong", "message"), [row[1:] for row in GROUP_NORM], ids=[row[0] for row in GROUP_NORM]
)
def test_group_norm_names_value_rule_and_fix(wrong: dict[str, Any], message: str) -> None:
    right = {"x": torch.ones(2, 8, 4, 4), "weight": torch.ones(8), "bias": torch.ones(8), "groups": 2}
    with pytest.raises(ValueError, match=re.escape(message)):
        group_norm(**{**right, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"), [row[1:] for row in ATTENTION], ids=[row[0] for row in ATTENTION]
)
def test_attention_names_value_rule_and_fix(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(**{"query": IMAGE, "key": IMAGE, "value": IMAGE, **wrong})
