"""A GPU's suites rehearsed on the CPU: dtypes, peers, the clock of events, memory on the device."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import machine, networks
from bench.networks import small
from bench.peers.runtimes import PEERS, SDPA, Unavailable, forget, prepare
from bench.place import CPU, EventClock, Place
from bench.subject import Plain, Subject
from glide_fast.models.presets import preset
from tests.bench.test_subjects import TINY, TINY_ADM, line

ROOT = Path(__file__).parents[2]
REHEARSAL = Place.of("rehearsal")


class Event:
    """Stands in for torch.cuda.Event: the device is one millisecond further at each record."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.ready = False

    def record(self) -> None:
        Event.now += 1.0
        self.time = Event.now

    def synchronize(self) -> None:
        self.ready = True

    def elapsed_time(self, end: Event) -> float:
        assert end.ready
        return end.time - self.time


def test_a_place_has_the_habits_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Place.of("cpu") == CPU == Place("cpu", torch.float32, gpu=False)
    assert Place("cpu", torch.float16, gpu=True) == REHEARSAL
    assert REHEARSAL.training_dtype is torch.bfloat16
    assert REHEARSAL.single == Place("cpu", torch.float32, gpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Place.of("cuda") == Place("cuda", torch.float16, gpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="can use no GPU here; use --device cpu"):
        Place.of("cuda")


def test_the_clock_of_a_gpu_is_the_time_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Place("cuda", gpu=True).clock()
    assert isinstance(clock, EventClock)
    start = clock()
    assert clock() - start == pytest.approx(1e-3)


def test_the_limits_of_a_gpu_are_measured_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert machine.gpu_gflops("cpu", 16) == pytest.approx(2 * 16**3 / 1e-3 / 1e9)
    assert machine.gpu_copy_gbs("cpu", 500) == pytest.approx(2 * 500 / 1e-3 / 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(machine, "gpu_gflops", lambda: 7.0)
    monkeypatch.setattr(machine, "gpu_copy_gbs", lambda: 3.0)
    facts = machine.facts.__wrapped__("cuda")
    assert (facts["device"], facts["peak_gflops"], facts["copy_gbs"]) == ("a GPU", 7.0, 3.0)


def test_the_memory_of_a_call_on_a_gpu_is_its_peak_beyond_what_was_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    assert Place("cuda", gpu=True).peak(lambda: done.append("called")) == 250
    assert done == ["waited", "reset", "called", "waited"]


def test_both_sides_have_the_same_weights_in_half_precision() -> None:
    subject = networks.text_step(TINY, 2, place=REHEARSAL)
    layers = [
        each for each in subject.plain.module.modules() if not isinstance(each, nn.GroupNorm | nn.LayerNorm)
    ]
    kinds = {each.dtype for layer in layers for each in layer._parameters.values() if each is not None}
    assert kinds == {torch.float16}
    assert all(each.dtype is not torch.float32 for each in subject.plain.inputs)
    assert 0 < subject.gate("a step", "ours", subject.ours()) <= 1
    assert subject.needed.call()[0].dtype is torch.float16


def test_networks_of_every_kind_pass_their_gates_as_on_a_gpu() -> None:
    adm = networks.step(TINY_ADM, 2, REHEARSAL)
    assert 0 < adm.gate("a step", "ours", adm.ours()) <= 1
    clip = preset("clip-vit-b-32", networks.CLIPConfig)
    vision = networks.VisionTransformerConfig(width=128, layers=1, patch_size=32)
    clip = replace(clip, vision=vision, width=128, layers=1, heads=2, image_size=64)
    subject = networks.clip_embeddings(clip, 2, REHEARSAL)
    assert 0 < subject.gate("embeddings", "ours", subject.ours()) <= 1


def test_a_gpus_cases_have_a_gpus_peers() -> None:
    cases = {case.name: case.peers for case in networks.cases(quick=False, place=REHEARSAL)}
    assert len(cases) == 5
    for name, peers in cases.items():
        assert set(peers) <= set(PEERS)
        assert {"upstream", "compile, CUDA graphs"} <= set(peers)
        assert (set(SDPA) <= set(peers)) == ("CLIP" not in name)
        assert not {"openvino", "onnxruntime"} & set(peers)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return networks.text_step(TINY, 1)


@pytest.mark.parametrize("peer", SDPA)
def test_pytorchs_attention_gives_the_originals_answer_or_a_reason(subject: Subject, peer: str) -> None:
    try:
        function = prepare(peer, subject.needed)
    except Unavailable as reason:
        if peer == "SDPA, flash":  # which the CPU has too
            raise
        pytest.skip(str(reason))
    torch.testing.assert_close(function(*subject.needed.inputs), subject.needed.call(), rtol=1e-4, atol=1e-5)
    plain = Plain(module=nn.Identity(), inputs=(torch.zeros(1),))
    with pytest.raises(Unavailable, match="no attention of the U-Net's kind"):
        prepare(peer, plain)


@pytest.mark.parametrize("gradient", [False, True])
def test_what_is_compiled_for_a_gpu_answers_with_memory_of_its_own(gradient: bool) -> None:
    plain = line(gradient)
    function = prepare("compile, CUDA graphs", plain)
    first, again = function(*plain.inputs), function(*plain.inputs)
    torch.testing.assert_close(first, plain.call(), rtol=1e-5, atol=1e-6)
    assert first[0].data_ptr() != again[0].data_ptr()
    forget()


def test_a_small_upsampler_is_rehearsed_too() -> None:
    config = small(preset("glide-upsample").unet, channels=32, size=32, levels=3)
    subject = networks.text_step(replace(config, attention_strides=(4,)), 1, place=REHEARSAL)
    assert 0 < subject.gate("a step", "ours", subject.ours()) <= 1


# Without compilers, which need a minute each; of the networks those that are quick in float16 on a CPU.
@pytest.mark.parametrize(
    ("suite", "chosen"),
    [
        ("ops", "not compile"),
        ("models", "CLIP and not compile"),
        ("sampling", "not compile"),
        ("training", "not compile"),
        ("end_to_end", "not compile"),
    ],
)
def test_every_suite_runs_to_its_end_as_on_a_gpu(suite: str, chosen: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--quick", "--seconds", "0.01", "--device", "rehearsal"]
    done = subprocess.run(
        [*command, "--suite", suite, "-k", chosen, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert rows["speed"]
    assert not rows["red"]


def test_a_gpus_numbers_do_not_change_the_readme() -> None:
    command = [sys.executable, "-m", "bench", "--readme", "--device", "rehearsal"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the CPU's numbers" in done.stderr
