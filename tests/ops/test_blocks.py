"""Memory that is used again: only when nobody holds it, and not without limit."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch

from glide_fast.ops import memory, norm_convolution

FLOATS = memory.SMALLEST // 4


def block(rows: int = 1) -> torch.Tensor:
    return memory.empty((rows, FLOATS), (FLOATS, 1))


@pytest.fixture(autouse=True)
def _nothing_waits() -> None:
    memory.release()


def test_a_block_is_used_again_when_its_last_holder_is_gone() -> None:
    first = block()
    address, view, array = first.data_ptr(), first[:, 5:], first.numpy()
    for holder in ("first", "view", "array"):
        assert block().data_ptr() != address, holder
        if holder == "first":
            del first
        elif holder == "view":
            del view
    del array
    memory_of_others = [block(), block()]
    assert address in {other.data_ptr() for other in memory_of_others}


def test_small_results_and_other_sizes_have_memory_of_their_own() -> None:
    before = memory.kept_bytes()
    del_me = memory.empty((3, 4), (4, 1))
    assert del_me.shape == (3, 4)
    del del_me
    assert memory.kept_bytes() == before
    address = block().data_ptr()
    assert block(2).data_ptr() != address
    assert memory.kept_bytes() == before + 3 * memory.SMALLEST


def test_what_waits_is_limited_and_can_be_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_FREE", 4 * memory.SMALLEST)
    for rows in range(1, 9):
        block(rows)
    assert memory.kept_bytes() <= (4 + 8) * memory.SMALLEST
    memory.release()
    assert memory.kept_bytes() == 0


def test_threads_do_not_share_blocks() -> None:
    address, others = block().data_ptr(), []
    thread = threading.Thread(target=lambda: others.append(block()))
    thread.start()
    thread.join()
    assert others[0].data_ptr() != address


def test_results_survive_later_calls() -> None:
    x = torch.randn(2, 64, 32, 32)
    weights = [torch.randn(64, 64, 3, 3) for _ in range(3)]
    with torch.inference_mode():
        results = [norm_convolution(x, weight) for weight in weights]
        again = [norm_convolution(x, weight) for weight in weights]
    for result, other in zip(results, again, strict=True):
        assert torch.equal(result, other)


def _convolve_in_child(
    x: torch.Tensor, weight: torch.Tensor, sums: multiprocessing.SimpleQueue[float]
) -> None:
    torch.set_num_threads(1)  # as every library that forks has to, because threads do not survive a fork
    sums.put(float(norm_convolution(x, weight).sum()))


def test_a_fork_after_threads_computes_the_same() -> None:
    x, weight = torch.randn(2, 64, 32, 32), torch.randn(64, 64, 3, 3)
    expected = float(norm_convolution(x, weight).sum())
    context = multiprocessing.get_context("fork")
    sums = context.SimpleQueue()
    child = context.Process(target=_convolve_in_child, args=(x, weight, sums))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert sums.get() == pytest.approx(expected, abs=1e-2)
