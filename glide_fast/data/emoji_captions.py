"""Captions of the emoji: the Unicode short names as English that a person would type.

``woman_running_medium-dark_skin_tone`` becomes "woman running, medium-dark skin tone". A skin tone always
stands at the end of the caption, after a comma, so that it can be read off and replaced. The names come
from the PyPI package ``emoji`` (Unicode CLDR short names).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

__all__ = ["SKIN_TONES", "Emoji", "held_out_captions", "list_emoji", "skin_tone", "tone_siblings"]

SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")

HELD_OUT_COUNT = 100
HELD_OUT_SEED = 0
# Later emoji are missing from the fonts of older systems; the held-out captions must not depend on the font.
HELD_OUT_NEWEST_UNICODE = 15.0
# A helmet and goggles: Noto draws the same picture for every tone.
TONE_NOT_VISIBLE = frozenset({"snowboarder"})

_TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
_TONE_AT_END = re.compile(r"(?:, (?:light|medium-light|medium|medium-dark|dark) skin tone)+$")
_GROUP = re.compile(r"(couple with heart|kiss|family)((?: (?:man|woman|person|adult|child|boy|girl))+)")
_TRAIT = re.compile(r"(man|woman|person) ((?:red|curly|white|blond) hair|beard)")
_BALD = re.compile(r"(man|woman|person) bald")
_ONE_PERSON = re.compile(r"\b(?:man|woman|person)\b")


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One fully qualified emoji: its text, its caption and the Unicode emoji version that introduced it."""

    text: str
    caption: str
    unicode_version: float

    @property
    def name(self) -> str:
        """The code points in hexadecimal, such as "1f3c3-1f3fe": unique, and safe as a file name."""
        return "-".join(f"{ord(character):x}" for character in self.text)


def list_emoji() -> list[Emoji]:
    """Return every fully qualified emoji that the installed ``emoji`` package knows, in code-point order.

    Raises ModuleNotFoundError, with the command that helps, when the package is missing.
    """
    try:
        import emoji
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the emoji data set needs the package 'emoji'; install it with: pip install 'glide-fast[train]'"
        ) from error
    fully_qualified: int = emoji.STATUS["fully_qualified"]
    return [
        Emoji(text=text, caption=_caption(text, facts["en"]), unicode_version=float(facts["E"]))
        for text, facts in sorted(emoji.EMOJI_DATA.items())
        if facts["status"] == fully_qualified
    ]


def skin_tone(caption: str) -> str | None:
    """Return the one skin tone that the caption names, one of ``SKIN_TONES``; None for no tone or for two."""
    tones = _tones_at_end(caption)
    return tones[0] if len(tones) == 1 else None


def tone_siblings(caption: str) -> list[str]:
    """Return the captions of the same emoji in the five tones, in the order of ``SKIN_TONES``.

    Raises ValueError when the caption does not name exactly one tone.
    """
    if skin_tone(caption) is None:
        raise ValueError(
            f"caption {caption!r} does not end in one skin tone; expected one of "
            + ", ".join(f"', {tone} skin tone'" for tone in SKIN_TONES)
        )
    base = _without_tone(caption)
    return [f"{base}, {tone} skin tone" for tone in SKIN_TONES]


def held_out_captions() -> list[str]:
    """Return the 100 captions, one person in one skin tone each, that training never sees.

    Twenty a tone, each of another emoji, so that the four other tones of that emoji stay in training. The
    choice follows from a hash of the fixed seed and the caption: the same on every machine.
    """
    everything = list_emoji()
    in_pairs = {_without_tone(item.caption) for item in everything if len(_tones_at_end(item.caption)) == 2}
    bases = {
        _without_tone(item.caption)
        for item in everything
        if skin_tone(item.caption) and item.unicode_version <= HELD_OUT_NEWEST_UNICODE
    }
    candidates = [
        base
        for base in bases - in_pairs - TONE_NOT_VISIBLE
        if _ONE_PERSON.search(base) and " and " not in base
    ]
    candidates.sort(key=lambda base: hashlib.sha256(f"{HELD_OUT_SEED}:{base}".encode()).hexdigest())
    return [
        f"{base}, {SKIN_TONES[index % len(SKIN_TONES)]} skin tone"
        for index, base in enumerate(candidates[:HELD_OUT_COUNT])
    ]


def _tones_at_end(caption: str) -> list[str]:
    found = _TONE_AT_END.search(caption)
    return _TONE.findall(found.group()) if found else []


def _without_tone(caption: str) -> str:
    return _TONE_AT_END.sub("", caption)


def _caption(text: str, short_name: str) -> str:
    words = short_name.strip(":").replace("_", " ").replace("’", "'")
    tones = _TONE.findall(words)
    base = _TONE.sub("", words)
    if _is_flag(text):
        base = f"flag of {base}"
    elif group := _GROUP.fullmatch(base):
        *people, last = group[2].split()
        base = f"{group[1]}, {', '.join(people)} and {last}"
    elif trait := _TRAIT.fullmatch(base):
        base = f"{trait[1]} with {trait[2]}"
    elif bald := _BALD.fullmatch(base):
        base = f"bald {bald[1]}"
    return ", ".join([base, *(f"{tone} skin tone" for tone in tones)])


def _is_flag(text: str) -> bool:
    """Tell the flags named by their country only: regional indicators, or a black flag with a tag."""
    return "\U0001f1e6" <= text[0] <= "\U0001f1ff" or text.endswith("\U000e007f")
