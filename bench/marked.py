"""The part of a document that a command writes, between two lines that mark it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from glide_fast.files import replacing


class Markers(NamedTuple):
    """The two lines, which a document holds once each."""

    begin: str
    end: str

    @classmethod
    def of(cls, name: str, command: str) -> Markers:
        """The comments in Markdown that say what is between them, and which command wrote it."""
        return cls(f"<!-- {name}: begin, written by {command} -->", f"<!-- {name}: end -->")

    def fill(self, path: Path, content: str) -> None:
        """Put the content between a file's markers.

        Raises:
            ValueError: a marker is missing or out of place.
        """
        text = path.read_text(encoding="utf-8")
        once = text.count(self.begin) == text.count(self.end) == 1
        if not once or text.index(self.begin) > text.index(self.end):
            raise ValueError(
                f"{path} must hold the lines {self.begin!r} and {self.end!r} once each, in this order"
            )
        before, after = text.split(self.begin)[0], text.split(self.end)[1]
        with replacing(path) as temporary:
            whole = f"{before}{self.begin}\n\n{content.strip()}\n\n{self.end}{after}"
            temporary.write_text(whole, encoding="utf-8")
