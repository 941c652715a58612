"""Samplers and the pipeline by graphs, through a stand-in: the pictures and the noise are those without."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from glide_fast.diffusion import GaussianDiffusion, Schedule
from glide_fast.models import LoadedModel, MaskedImage, UNet
from glide_fast.sampling import (
    SAMPLERS,
    Conditioned,
    Graphs,
    PerImageNoise,
    along_gradient,
    classifier_free,
    ddim,
    ddim_encode,
    ddpm,
    euler,
    initial_noise,
    keep_known,
    within,
)
from glide_fast.sampling.graph import Unit
from glide_fast.sampling.graph_cuda import SHARED, shared_graphs
from glide_fast.sampling.guidance import MeanGuidedDiffusion
from glide_fast.sampling.pipeline import StageOptions, sample_stage
from glide_fast.sampling.run import Sampler, Step, _draws
from glide_fast.sampling.samplers import _ddim, _ddpm
from glide_fast.sampling.solvers import _dpm_solver, _plms
from tests import tiny
from tests.golden import normal
from tests.sampling.standin import StandIn
from tests.sampling.toy import toy_denoiser

SHAPE = (2, 3, 8, 8)
UNITS: tuple[Unit, ...] = ("step", "loop")


def diffusion_of(steps: int = 6, **kinds: Any) -> GaussianDiffusion:
    """A new object each time, of equal values."""
    return GaussianDiffusion(schedule=Schedule.create("cosine", 1000, str(steps)), **kinds)


class Toy(nn.Module):
    """The toy denoiser with a weight, and a shift as its condition."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.9), requires_grad=False)

    def forward(self, x: Tensor, timesteps: Tensor, shift: Tensor) -> Tensor:
        return toy_denoiser(diffusion_of())(x, timesteps) * self.weight + shift


def toy() -> nn.Module:
    return Toy().eval()


def shifted(network: nn.Module, shift: float, rows: int = 2) -> Conditioned:
    return Conditioned(network=network, conditions={"shift": torch.full((rows, 1, 1, 1), shift)})


def sampled(sampler: Sampler, denoise: Any, graphs: Graphs | None = None, **options: Any) -> Tensor:
    """A picture of two, from the same noise each time, with a diffusion of its own."""
    noise = PerImageNoise([1, 2])
    diffusion = options.pop("diffusion", None) or diffusion_of()
    return sampler(denoise, initial_noise(noise, SHAPE), diffusion, noise=noise, graphs=graphs, **options)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_paints_the_same_by_graphs(name: str, unit: Unit) -> None:
    recorder = StandIn()
    graphs, network = Graphs(recorder, unit), toy()
    for shift in (0.1, 0.1, -0.2, 0.3):
        denoise = shifted(network, shift)
        found = sampled(SAMPLERS[name], denoise, graphs)
        torch.testing.assert_close(found, sampled(SAMPLERS[name], denoise), rtol=0, atol=0)
        gc.collect()
    assert recorder.records == len(graphs) == 1
    steps = {"heun": 11}.get(name, 6)
    assert recorder.replays == (3 if unit == "loop" else 4 * steps - 1)


@pytest.mark.parametrize("unit", UNITS)
def test_the_way_up_is_the_same_by_graphs(unit: Unit) -> None:
    recorder, network = StandIn(), toy()
    for _ in range(3):
        found = sampled(ddim_encode, shifted(network, 0.1), Graphs(recorder, unit))
        assert torch.equal(found, sampled(ddim_encode, shifted(network, 0.1)))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("sampler", "eta"), [(ddim, 0.0), (ddim, 1.0), (ddpm, None)])
@pytest.mark.parametrize("kinds", [{"variance_type": "learned"}, {"mean_type": "x_start"}])
def test_other_kinds_of_diffusion_are_the_same_by_graphs(
    sampler: Sampler, eta: float | None, kinds: dict[str, Any], unit: Unit
) -> None:
    graphs, network = Graphs(StandIn(), unit), toy()
    for _ in range(3):
        options = {"eta": eta, "diffusion": diffusion_of(**kinds), "clip_denoised": False}
        found = sampled(sampler, shifted(network, 0.1), graphs, **options)
        assert torch.equal(found, sampled(sampler, shifted(network, 0.1), **options))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["ddpm", "ddim", "unipc"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_changes_without_another_recording(name: str, rescale: float, unit: Unit) -> None:
    recorder = StandIn()
    graphs, network = Graphs(recorder, unit), toy()
    condition = torch.tensor([0.1, 0.3, 0.0, 0.0]).view(4, 1, 1, 1)
    denoise = Conditioned(network=network, conditions={"shift": condition})
    for scale in (3.0, 3.0, 1.1, 7.25, 0.0):
        guided = classifier_free(denoise, scale, rescale=rescale and rescale - scale / 100)
        found = sampled(SAMPLERS[name], guided, graphs)
        torch.testing.assert_close(found, sampled(SAMPLERS[name], guided), rtol=1e-6, atol=1e-6)
    assert recorder.records == 1


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["ddpm", "ddim", "plms"])
def test_known_pixels_change_without_another_recording(name: str, unit: Unit) -> None:
    recorder = StandIn()
    graphs, network = Graphs(recorder, unit), toy()
    for seed in range(3):
        image = normal("image", SHAPE, seed).clamp(-1, 1)
        mask = torch.zeros(2, 1, 8, 8)
        mask[..., seed:] = 1
        options = {"denoised_fn": keep_known(image, mask)}
        found = sampled(SAMPLERS[name], shifted(network, 0.1), graphs, **options)
        assert torch.equal(found, sampled(SAMPLERS[name], shifted(network, 0.1), **options))
        assert torch.equal(found[..., seed:], image[..., seed:])
    assert recorder.records == 1


@pytest.mark.parametrize("unit", UNITS)
def test_steps_kinds_and_shapes_have_graphs_of_their_own(unit: Unit) -> None:
    recorder = StandIn()
    graphs, network = Graphs(recorder, unit, most=20), toy()
    for _ in range(3):
        for options in (
            {},
            {"diffusion": diffusion_of(7)},
            {"diffusion": diffusion_of(variance_type="learned")},
            {"clip_denoised": False},
            {"eta": 0.5},
        ):
            found = sampled(ddim, shifted(network, 0.1), graphs, **options)
            assert torch.equal(found, sampled(ddim, shifted(network, 0.1), **options))
        for sampler in (ddpm, euler):
            found = sampled(sampler, shifted(network, 0.1), graphs)
            assert torch.equal(found, sampled(sampler, shifted(network, 0.1)))
    assert recorder.records == len(graphs) == 6  # Euler's method is DDIM


@pytest.mark.parametrize("unit", UNITS)
def test_changed_weights_are_seen(unit: Unit) -> None:
    recorder = StandIn()
    graphs, network = Graphs(recorder, unit), toy()
    for factor in (1.0, 0.9, 1.2, 0.7):
        network.weight.mul_(factor)  # type: ignore[operator, union-attr]
        found = sampled(ddpm, shifted(network, 0.1), graphs)
        assert torch.equal(found, sampled(ddpm, shifted(network, 0.1)))
    assert recorder.records == 1
    old = network.weight
    network.weight = nn.Parameter(torch.tensor(0.3), requires_grad=False)
    for _ in range(3):
        found = sampled(ddpm, shifted(network, 0.1), graphs)
        assert torch.equal(found, sampled(ddpm, shifted(network, 0.1)))
    assert recorder.records == 2
    assert old is not network.weight


def test_the_stream_of_noise_is_the_same_by_graphs() -> None:
    network, following = toy(), []
    for graphs in (None, *(Graphs(StandIn(), unit) for unit in UNITS)):
        torch.manual_seed(5)
        for _ in range(3):
            ddpm(shifted(network, 0.1), normal("x", SHAPE, 0), diffusion_of(), graphs=graphs)
        following.append(torch.randn(4))
    assert torch.equal(following[0], following[1])
    assert torch.equal(following[0], following[2])


@pytest.mark.parametrize(
    ("rule", "eta", "draws"),
    [(_ddpm, 0.0, 7), (_ddim, 0.0, 7), (_dpm_solver, 0.0, 0), (_dpm_solver, 1.0, 6), (_plms, 0.0, 0)],
)
def test_a_loops_draws_are_counted(rule: Any, eta: float, draws: int) -> None:
    assert _draws(rule, 7, eta) == draws


def test_a_callback_sees_every_step_of_a_loop_and_may_sample_itself() -> None:
    graphs, network = Graphs(StandIn(), "loop"), toy()
    seen: list[Step] = []

    def watch(step: Step) -> None:
        seen.append(step)
        sampled(ddim, shifted(network, 0.4), graphs)

    for _ in range(3):
        found = sampled(ddim, shifted(network, 0.1), graphs, callback=watch)
        assert torch.equal(found, sampled(ddim, shifted(network, 0.1)))
    plain: list[Step] = []
    sampled(ddim, shifted(network, 0.1), callback=plain.append)
    assert len(seen) == 3 * len(plain)
    for mine, other in zip(seen, 3 * plain, strict=True):
        assert (mine.index, mine.timestep) == (other.index, other.timestep)
        assert torch.equal(mine.x, other.x)
        assert torch.equal(mine.x_start, other.x_start)


def gradient(x: Tensor, _timesteps: Tensor) -> Tensor:
    return -x


def refusals() -> list[Any]:
    return list(_refusals())


def _refusals() -> Iterator[Any]:
    network, diffusion = toy(), diffusion_of()
    denoise = shifted(network, 0.1)
    yield "toy_denoiser.<locals>.denoise does not say which tensors", toy_denoiser(diffusion), {}
    yield "along_gradient", along_gradient(denoise, gradient, diffusion), {}
    yield "within", within(denoise, denoise, first=0, last=500), {}
    guided = classifier_free(lambda x, t: shifted(network, 0.1, 4)(x, t), 3.0)
    yield "lambda", guided, {}
    yield "lambda", denoise, {"denoised_fn": lambda x: 0.9 * x}
    pushed = MeanGuidedDiffusion(schedule=diffusion.schedule, gradient=gradient)
    yield "MeanGuidedDiffusion pushes each step along a gradient", denoise, {"diffusion": pushed}
    yield r"training mode, .*call eval\(\)", shifted(Toy().train(), 0.1), {}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("reason", "denoise", "options"), refusals())
def test_what_no_graph_can_hold_is_said_and_sampled_without(
    reason: str, denoise: Any, options: dict[str, Any], unit: Unit
) -> None:
    recorder = StandIn()
    with pytest.warns(UserWarning, match=f"sampling goes on without a CUDA graph: .*{reason}"):
        found = sampled(ddpm, denoise, Graphs(recorder, unit), **options)
    assert torch.equal(found, sampled(ddpm, denoise, **options))
    assert recorder.warm_ups == 0


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> dict[Unit, StandIn]:
    """The process's graphs by stand-ins."""
    recorders: dict[Unit, StandIn] = {unit: StandIn() for unit in UNITS}
    for unit, recorder in recorders.items():
        monkeypatch.setitem(SHARED, unit, Graphs(recorder, unit))
    return recorders


def painted(stage: LoadedModel, prompt: str, seed: int, **changes: Any) -> Tensor:
    low_res = changes.pop("low_res", None)
    known = changes.pop("known", None)
    options = replace(StageOptions(steps=4), **changes)
    noise = PerImageNoise([seed])
    return sample_stage(stage, [prompt], noise=noise, options=options, low_res=low_res, known=known)


@pytest.mark.parametrize("unit", UNITS)
def test_the_pipeline_paints_by_graphs_unless_they_are_off(shared: dict[Unit, StandIn], unit: Unit) -> None:
    stage = tiny.model(tiny.config())
    for prompt, seed, guidance in [("key", 0, 3.0), ("sun", 1, 3.0), ("key", 2, 1.5), ("cat", 3, 5.0)]:
        found = painted(stage, prompt, seed, guidance=guidance, graph=unit)
        expected = painted(stage, prompt, seed, guidance=guidance, graph="off")
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert shared[unit].records == 1
    assert sum(recorder.records for recorder in shared.values()) == 1


def test_a_step_is_the_pipelines_default(shared: dict[Unit, StandIn]) -> None:
    painted(tiny.model(tiny.config()), "key", 0)
    assert (shared["step"].records, shared["loop"].warm_ups) == (1, 0)


def test_an_inpainting_upsampler_paints_by_graphs(shared: dict[Unit, StandIn]) -> None:
    stage = tiny.model(tiny.config(upsampler=True, inpaint=True))
    for seed in range(3):
        image = normal("known", (1, 3, tiny.SIZE, tiny.SIZE), seed).clamp(-1, 1)
        mask = (image[:, :1] > 0).float()
        given = {
            "low_res": normal("low", (1, 3, tiny.BASE_SIZE, tiny.BASE_SIZE), seed).clamp(-1, 1),
            "known": MaskedImage(image, mask),
            "guidance": 1.0,
        }
        found = painted(stage, "key", seed, **given)
        expected = painted(stage, "key", seed, graph="off", **given)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert shared["step"].records == 1


def test_graphs_are_chosen_by_device() -> None:
    for choice in ("step", "loop"):
        assert shared_graphs(choice, torch.device("cuda", 0)) is SHARED[choice]  # type: ignore[index]
        assert shared_graphs(choice, torch.device("cpu")) is None  # type: ignore[arg-type]
    assert shared_graphs("off", torch.device("cuda", 0)) is None
    with pytest.raises(ValueError, match="unknown graph 'all'; known: step, loop, off"):
        shared_graphs("all", torch.device("cpu"))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        painted(tiny.model(tiny.config()), "key", 0)  # on the CPU no word is said


class Moves(TorchDispatchMode):
    """What comes from the CPU to another device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.seen = device, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        arguments = [each for each in (*args, *(kwargs or {}).values()) if isinstance(each, Tensor)]
        if any(each.device.type == "cpu" for each in arguments):
            results = result if isinstance(result, tuple | list) else [result]
            if any(isinstance(each, Tensor) and each.device.type == self.device for each in results):
                self.seen.append(str(func))
        return result


@pytest.mark.parametrize("name", ["ddpm", "ddim", "heun"])
def test_after_the_first_step_nothing_is_moved_to_the_device(name: str) -> None:
    """Such a copy cannot be captured; seen on the meta device, which the CPU has to fill as well."""
    config = tiny.config(upsampler=True)
    with torch.device("meta"):
        network = UNet(config.unet).eval().requires_grad_(False)
        text = network.text(torch.zeros(4, 8, dtype=torch.int64), torch.ones(4, 8, dtype=torch.bool))
        low_res, x = torch.zeros(4, 3, 8, 8), torch.zeros(2, 3, 16, 16)
    conditions = {"text": text, "low_res": low_res}
    denoise = classifier_free(Conditioned(network=network, conditions=conditions), 3.0)
    diffusion = diffusion_of()
    with Moves("meta") as watch:
        SAMPLERS[name](denoise, x, diffusion)
        assert watch.seen
        watch.seen.clear()
        SAMPLERS[name](denoise, x, diffusion)
    assert watch.seen == []
