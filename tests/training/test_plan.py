"""Plans: FLOPs against formulas by hand, memory against real passes, advice that holds when it is taken."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from glide_fast import ops
from glide_fast.models import ModelConfig, TextConfig, UNet, UNetConfig, preset
from glide_fast.models.configs import describe
from glide_fast.models.modulation import projected
from glide_fast.ops import memory
from glide_fast.training.hardware import GPUS
from glide_fast.training.plan import Memory, Plan, Setup, plan
from glide_fast.training.trace import Meter, trace
from tests.test_cli import fail, run

ROOT = Path(__file__).parents[2]
BATCH, SIZE, TEXT = 2, 8, 6

TINY = ModelConfig(
    unet=UNetConfig(
        image_size=SIZE,
        channels=32,
        channel_mult=(1, 2),
        res_blocks=1,
        attention_strides=(2,),
        head_channels=32,
        dropout=0.1,
        text=TextConfig(vocabulary=50, context=TEXT, width=32, layers=1, heads=2),
    )
)
# Large enough for its activations to outweigh everything that a pass allocates besides.
SMALL = ModelConfig(
    unet=replace(TINY.unet, image_size=32, channels=64, attention_strides=(2,), dropout=0.0, text=None)
)


def setup(**changes: Any) -> Setup:
    return Setup(**({"gpus": 1, "batch": 8, "images": 1e6} | changes))


def flops_of(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[int, int]:
    """FLOPs of a forward pass and of the backward pass, by our meter, which agrees with torch's counter."""
    counts = []
    for meter in (Meter(()), FlopCounterMode(display=False)):
        with meter:
            output = function(*inputs)
            forward = meter.flops if isinstance(meter, Meter) else meter.get_total_flops()
            output.sum().backward()
            total = meter.flops if isinstance(meter, Meter) else meter.get_total_flops()
        counts.append((forward, total - forward))
    assert counts[0] == counts[1]
    return counts[0]


def test_flops_of_a_convolution_and_of_a_linear_layer() -> None:
    x = torch.empty(BATCH, 16, 8, 8, device="meta", requires_grad=True)
    forward = 2 * BATCH * 16 * 24 * 3 * 3 * 4 * 4
    layer = nn.Conv2d(16, 24, 3, stride=2, padding=1, device="meta")
    assert flops_of(layer, x) == (forward, 2 * forward)
    x = torch.empty(BATCH, 5, 16, device="meta", requires_grad=True)
    forward = 2 * BATCH * 5 * 16 * 24
    assert flops_of(nn.Linear(16, 24, device="meta"), x) == (forward, 2 * forward)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("text", [0, 3])
def test_flops_of_our_attention(device: str, text: int) -> None:
    queries, heads, dim = 5, 2, 4
    shapes = [queries] * 3 + [text] * (2 if text else 0)
    tensors = [torch.zeros(BATCH, n, heads, dim, device=device, requires_grad=True) for n in shapes]

    def attend(*inputs: Tensor) -> Tensor:
        query, key, value = inputs[:3]
        keys, values = inputs[3:] if text else (None, None)
        return ops.attention(query, key, value, text_key=keys, text_value=values)

    product = 2 * BATCH * heads * queries * (queries + text) * dim
    # Backward: scores again, then the gradients of value, probabilities, query and key.
    assert flops_of(attend, *tensors) == (2 * product, 5 * product)


def test_flops_of_a_whole_model_are_the_sum_by_hand() -> None:
    def convolution(inputs: int, outputs: int, side: int, kernel: int = 3) -> int:
        return 2 * inputs * outputs * kernel**2 * side**2

    def linear(inputs: int, outputs: int, tokens: int = 1) -> int:
        return 2 * inputs * outputs * tokens

    def res_block(inputs: int, outputs: int, side: int) -> int:
        skip = 0 if inputs == outputs else convolution(inputs, outputs, side, 1)
        layers = convolution(inputs, outputs, side) + convolution(outputs, outputs, side)
        return layers + linear(128, 2 * outputs) + skip

    def attention(channels: int, pixels: int) -> int:
        projections = linear(channels, 3 * channels, pixels) + linear(channels, channels, pixels)
        return projections + linear(32, 2 * channels, TEXT) + 4 * pixels * (pixels + TEXT) * channels

    timestep = linear(32, 128) + linear(128, 128)
    encoder = convolution(3, 32, 8) + res_block(32, 32, 8) + res_block(32, 32, 4)
    encoder += res_block(32, 64, 4) + attention(64, 16)
    middle = 2 * res_block(64, 64, 4) + attention(64, 16)
    decoder = res_block(64 + 64, 64, 4) + res_block(64 + 32, 64, 4) + 2 * attention(64, 16)
    decoder += res_block(64, 64, 8) + res_block(64 + 32, 32, 8) + res_block(32 + 32, 32, 8)
    perceptron = linear(32, 128, TEXT) + linear(128, 32, TEXT)
    text = linear(32, 96, TEXT) + 4 * TEXT * TEXT * 32 + linear(32, 32, TEXT) + perceptron + linear(32, 128)
    expected = timestep + encoder + middle + decoder + convolution(32, 6, 8) + text

    plain = trace(TINY, BATCH, dtype=torch.float32)
    assert plain.forward_flops == BATCH * expected
    assert plain.step_flops == pytest.approx(3 * plain.forward_flops, rel=0.05)
    again = trace(TINY, BATCH, dtype=torch.float32, recompute=True)
    assert again.forward_flops == plain.forward_flops
    assert 3.4 * plain.forward_flops < again.step_flops <= plain.step_flops + plain.forward_flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_traced_without_memory_is_what_a_real_pass_keeps(
    dtype: torch.dtype, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glide_fast.models.trunk.modulations", projected)  # as on a GPU
    options: dict[str, Any] = {"dtype": dtype, "recompute": recompute}
    planned, real = trace(TINY, BATCH, **options), trace(TINY, BATCH, device="cpu", **options)
    assert planned.copies == real.copies
    assert (planned.forward_flops, planned.step_flops) == (real.forward_flops, real.step_flops)
    assert planned.activations == pytest.approx(real.activations, rel=0.01)
    assert planned.peak == pytest.approx(real.peak, rel=0.03)
    assert (planned.copies > 0) == (dtype is torch.bfloat16)


def allocated(model: UNet, batch: int) -> tuple[int, int]:
    """Bytes that torch's CPU allocator handed out and has not got back after a forward pass; their peak."""
    x, t = torch.zeros(batch, 3, 32, 32), torch.zeros(batch)
    memory_only = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )
    with memory_only as profiler:
        loss = model(x, t).square().mean()
    assert loss.requires_grad  # its graph holds the activations until here
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return now, peak


def test_activations_are_what_a_real_model_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SMALLEST", sys.maxsize)  # blocks that wait to be used again would count
    model = UNet(SMALL.unet).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    batch = 4
    planned = trace(SMALL, batch, dtype=torch.float32)
    now, peak = allocated(model, batch)
    assert now > 10e6
    assert planned.activations + planned.copies == pytest.approx(now, rel=0.03)
    assert planned.peak == pytest.approx(peak, rel=0.1)


def test_activations_grow_with_the_batch_and_shrink_where_they_are_computed_again() -> None:
    one, four = (trace(TINY, batch, dtype=torch.bfloat16) for batch in (1, 4))
    again = trace(TINY, 4, dtype=torch.bfloat16, recompute=True)
    assert four.activations == pytest.approx(4 * one.activations, rel=0.01)
    assert four.copies == one.copies
    assert again.activations < four.activations / 2
    assert again.peak < four.peak


def test_memory_adds_up_and_fsdp_divides_what_belongs_to_the_weights() -> None:
    weights = 4 * sum(parameter.numel() for parameter in describe(TINY).parameters())
    ddp, fsdp = (plan("tiny", TINY, setup(gpus=4, sharding=kind)) for kind in ("ddp", "fsdp"))
    for found, shards in ((ddp, 1), (fsdp, 4)):
        memory = found.memory
        assert memory.weights == memory.gradients == memory.average == weights / shards
        assert memory.optimizer == 2 * weights / shards
        assert memory.total == sum(getattr(memory, part.name) for part in fields(Memory))
    assert ddp.memory.gathered == 0
    assert 0 < fsdp.memory.gathered <= 2 * weights
    assert ddp.memory.activations == fsdp.memory.activations
    assert plan("tiny", TINY, setup(gpus=1, sharding="fsdp")).memory.gathered == 0


def test_speed_follows_from_flops_peak_and_bandwidth() -> None:
    found = plan("tiny", TINY, setup(gpus=2, batch=8, gpu="A100", dtype="float32", utilisation=0.5))
    flops = 4 * found.step_flops / (0.5 * 19.5e12)
    state = found.parameters * 36 / 2.039e12
    assert found.step_seconds == pytest.approx(flops + state)
    assert found.images_per_second == pytest.approx(8 / found.step_seconds)
    assert found.days == pytest.approx(1e6 / found.images_per_second / 86_400)
    assert GPUS["A100"].peak_flops("bfloat16") == 312e12


def test_the_largest_model_is_planned_in_seconds_without_its_memory() -> None:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    config = preset("glide-3.5b-base")
    found = plan("glide-3.5b-base", config, setup(gpus=64, batch=2048, sharding="fsdp"))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (
        1 if sys.platform == "darwin" else 1024
    )
    assert found.parameters == sum(parameter.numel() for parameter in describe(config).parameters())
    assert found.parameters == pytest.approx(3.55e9, rel=0.002)
    assert found.fits
    assert found.memory.total > 30e9
    assert grown < 0.3e9
    assert time.process_time() - started < 30


@pytest.mark.parametrize(("size", "billions"), [(256, 1120), (512, 1983)])
def test_flops_of_adm_are_those_that_dit_lists(size: int, billions: int) -> None:
    """Peebles & Xie, arXiv 2212.09748, tables 2 and 3, count a multiplication and an addition as one."""
    found = plan("adm", preset(f"guided-{size}x{size}-diffusion"), setup(gpu="H200", batch=1))
    assert found.forward_flops == pytest.approx(2e9 * billions, rel=0.01)


def options_of(remedy: str) -> dict[str, Any]:
    words = remedy.split(" (")[0].split()
    changes: dict[str, Any] = {}
    if "--sharding" in words:
        changes["sharding"] = words[words.index("--sharding") + 1]
    if "--checkpoint-activations" in words:
        changes["checkpoint_activations"] = True
    if "--accumulate" in words:
        changes["accumulate"] = int(words[words.index("--accumulate") + 1])
    return changes


def wide(channels: int) -> ModelConfig:
    """Few layers with many weights."""
    return replace(TINY, unet=replace(TINY.unet, channels=channels, image_size=64))


def test_every_remedy_makes_the_plan_fit() -> None:
    wanted = setup(gpus=4, gpu="RTX-3090", batch=1024)
    found = plan("wide", wide(960), wanted)
    assert not found.fits
    assert len(found.remedies) == 4
    assert options_of(found.remedies[0]).keys() == {"accumulate"}
    assert options_of(found.remedies[3]).keys() >= {"sharding", "checkpoint_activations"}
    for remedy in found.remedies:
        assert plan("wide", wide(960), replace(wanted, **options_of(remedy))).fits, remedy
    assert "does not fit in 24.00 GB: " in str(found)
    assert f"it fits with {found.remedies[0]}" in str(found)


def test_where_nothing_helps_the_plan_says_so() -> None:
    found = plan("wide", wide(1920), setup(gpu="RTX-3090", batch=1))
    assert not found.fits
    assert found.remedies == ()
    state = f"{20 * found.parameters / 1e9:.2f} GB"
    assert "no option makes it fit on 1 x RTX-3090" in str(found)
    assert f"{state}; take more GPUs with --sharding fsdp, or larger ones" in str(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "V100"}, "unknown GPU 'V100'; known: B200, H200, H100, A100, "),
        ({"gpus": 8, "batch": 100}, "batch 100 is not divisible by 8 GPUs; the nearest that is: 96"),
        ({"gpus": 8, "batch": 3}, "the nearest that is: 8"),
        ({"gpus": 2, "batch": 18, "accumulate": 4}, "by 2 GPUs x 4 parts; the nearest that is: 16"),
        ({"gpus": 0}, "gpus 0 must be at least 1"),
        ({"accumulate": 0}, "accumulate 0 must be at least 1"),
        ({"images": 0}, "images 0 must be at least 1"),
        ({"utilisation": 0.0}, "utilisation 0 must lie in 0 .. 1"),
        ({"batch": -1, "utilisation": 40}, "batch -1 must be at least 1; utilisation 40 must lie"),
    ],
)
def test_a_setup_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        setup(**changes)


def test_the_command_plans_a_preset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "plan", "glide-base", "--gpus", 2, "--gpu", "L40S", "--checkpoint-activations")
    printed = capsys.readouterr().out
    wanted = setup(gpus=2, gpu="L40S", batch=64, images=1e8, checkpoint_activations=True)
    found: Plan = plan("glide-base", preset("glide-base"), wanted)
    assert printed == f"{found}\n"
    assert "2 x L40S, ddp, bfloat16, activations computed again; a batch of 64, 32 at a time" in printed
    assert "100,000,000 pictures take" in printed
    assert "assuming 40% of the GPU's 362 TFLOP/s" in printed
    shown = [
        float(line.split()[1]) for line in printed.splitlines() if line.startswith("  ") and "." in line[:22]
    ]
    assert shown[-1] == pytest.approx(sum(shown[:-1]), abs=0.05)


def test_the_command_plans_a_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ROOT / "configs" / "emoji_upsampler.toml"
    run(monkeypatch, "plan", recipe, "--gpu", "RTX-4090")
    printed = capsys.readouterr().out
    assert "1 x RTX-4090, ddp, bfloat16; a batch of 16, 16 at a time on each GPU" in printed
    assert "24,000 pictures take" in printed  # 1,500 steps of 16
    assert "fits in 24.00 GB" in printed
    run(monkeypatch, "plan", recipe, "--batch", 8, "--dtype", "float32", "--images", "1e6")
    printed = capsys.readouterr().out
    assert "float32; a batch of 8, 8 at a time" in printed
    assert "1,000,000 pictures take" in printed
    assert "copies" not in printed


def test_mistakes_in_the_command_are_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def message(*arguments: object) -> str:
        return fail(monkeypatch, capsys, "plan", *arguments)

    assert "no task trains preset 'clip-rn50'; choose one of glide-base, " in message("clip-rn50")
    assert "unknown model 'glide-bse'" in message("glide-bse")
    assert "unknown GPU 'V100'; known: " in message("glide-base", "--gpu", "V100")
    assert "the nearest that is: 96" in message("glide-base", "--gpus", 8, "--batch", 100)
    assert "no config file" in message(tmp_path / "missing.toml")
