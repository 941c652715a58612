"""What the tests of the ops share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from glide_fast.ops import dispatch

LIBRARY = dispatch.cpp_library()


@pytest.fixture(params=LIBRARY.capabilities() if LIBRARY else ["reference"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this CPU can run, one after the other."""
    if LIBRARY is None:
        yield request.param
        return
    before = LIBRARY.capability()
    LIBRARY.select(request.param)
    yield request.param
    LIBRARY.select(before)
