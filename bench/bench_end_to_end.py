"""What a user sees: from the prompt to pixels, what a second thread brings, how much memory it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench import memory, pictures
from bench.conftest import Measure
from bench.networks import small, text_step
from bench.parity import ParityError, picture_excess, require
from bench.place import Place
from bench.rows import Labels, MemoryRow, Record
from glide_fast.models.presets import preset
from glide_fast.sampling.pipeline import StageOptions, TextToImage

STEPS, QUICK_STEPS = 20, 2
LIKENESS = 40.0  # decibels between pictures of 8 bits, where a rounding may fall either way


def test_prompt_to_pixels(
    request: pytest.FixtureRequest, record: Record, suite: str, measure: Measure, place: Place
) -> None:
    """The embedded pipeline as it is called: tokens, both stages, 8-bit pictures."""
    steps = QUICK_STEPS if request.config.getoption("--quick") else STEPS
    batch = len(pictures.PROMPTS)
    ours = pictures.ours(place)
    theirs = pictures.of_peer(ours, "upstream", batch)
    options = StageOptions(steps=steps, guidance=pictures.GUIDANCE)
    last = StageOptions(steps=steps, guidance=1.0, temperature=0.997)

    def paint(models: TextToImage) -> np.ndarray:
        return models(pictures.PROMPTS, seeds=range(batch), base_options=options, upsampler_options=last)

    name = f"embedded prompt → 64 px, {steps} steps, batch {batch}, everything"
    actual, expected = (torch.from_numpy(paint(each)) / 127.5 - 1 for each in (ours, theirs))
    error = _gate(record, name, picture_excess(actual, expected, LIKENESS))
    work = pictures.flops(ours, batch, steps)
    labels = Labels(suite=suite, case=name, peer="upstream", work=work)
    measure(labels, lambda: paint(ours), lambda: paint(theirs), (error, 0.0))


def test_threads(
    request: pytest.FixtureRequest, record: Record, suite: str, measure: Measure, place: Place
) -> None:
    """The base model's step on all of torch's threads against one."""
    if place.gpu:
        pytest.skip("threads are the CPU's")
    threads = torch.get_num_threads()
    config = preset("glide-base").unet
    if request.config.getoption("--quick"):
        config = small(config, size=32)
    name = f"GLIDE base {config.channels} channels, CFG batch 2, {threads} threads"
    if threads < 2:
        record.absent.append((name, "ours, 1 thread", "torch has one thread alone here"))
        pytest.skip("torch has one thread alone here")
    subject = text_step(config, 2)

    def alone() -> tuple[torch.Tensor, ...]:
        torch.set_num_threads(1)
        try:
            return subject.ours()
        finally:
            torch.set_num_threads(threads)

    limit = 1e-5 * subject.ours()[0].abs().max()
    error = _gate(record, name, float((alone()[0] - subject.ours()[0]).abs().max() / limit))
    labels = Labels(suite=suite, case=name, peer="ours, 1 thread", work=subject.flops)
    measure(labels, subject.ours, alone, (error, 0.0))


def test_peak_memory(request: pytest.FixtureRequest, record: Record, place: Place) -> None:
    """The base model's inference, in a process of its own, in units of its float32 weights."""
    if place.gpu:
        pytest.skip("the process' memory is the host's; what a call needs on the device is in the rows")
    quick = request.config.getoption("--quick")
    *ours, theirs = (memory.measure(who, quick=quick) for who in memory.SIDES)
    for peak, mode in zip(ours, ("", ", low memory"), strict=True):
        record.memory.append(
            MemoryRow(
                case=f"peak of {'small ' if quick else ''}GLIDE base, CFG batch 2, whole process{mode}",
                peer="upstream",
                ours=peak.in_weights,
                theirs=theirs.in_weights,
                unit="× float32 weights",
            )
        )


def _gate(record: Record, name: str, part: float) -> float:
    try:
        return require(name, "ours", part)
    except ParityError as red:
        record.red.append(str(red))
        raise
