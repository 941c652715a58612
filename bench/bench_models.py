"""Whole networks, one evaluation each: the published models against everybody else who can compute them."""

from __future__ import annotations

from bench.conftest import Compare, Contest
from bench.networks import cases

__all__ = ["cases"]


def test_network(contest: Contest, peer: str, compare: Compare) -> None:
    """Same parameters, same inputs."""
    compare(contest, peer)
