"""Maps that the decoder reads as the next stage's first block hands them on: gradients join there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glide_fast.models import UNet, blocks, trunk
from tests.models.tiny import noise, prompt, tiny

T = torch.tensor([3, 700])
SHAPE: dict[str, Any] = {"norm_groups": 8}  # more channels in a group than one, or biases count for nothing
VARIANTS: dict[str, dict[str, Any]] = {
    "resampling blocks": SHAPE,
    "resampling with convolution": SHAPE | {"resblock_updown": False},
    "added embedding and dropout": SHAPE | {"scale_shift_norm": False, "dropout": 0.3},
    "volumes": SHAPE | {"dims": 3, "text": None},
}
INNER = "input_blocks.1.0"  # the first residual block, which hands on the stem's map


def gradients(model: UNet, call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """The output, and the gradients of the pictures and of every parameter."""
    dims = model.config.dims
    x = noise(2, 3, *[8] * dims).requires_grad_()
    given = {} if model.config.text is None else prompt()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # for dropout
    out = (model if call is None else call)(x, T, **given)
    (out * noise(*out.shape, seed=9)).sum().backward()
    assert x.grad is not None
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"output": out.detach(), "x": x.grad, **found}


def apart(model: UNet, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The same where every stage is called, and autograd adds what comes back for a map."""
    with monkeypatch.context() as patch:
        patch.setattr(trunk, "is_plain", lambda *_: False)
        return gradients(model)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert torch.equal(actual["output"], expected["output"])
    for name, right in expected.items():
        assert (actual[name] - right).norm() <= 2e-6 * right.norm() + 1e-9, name


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """As between ways of computing that round differently."""
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        assert (actual[name] - right).norm() <= 1e-4 * right.norm() + 1e-7, name


def sums_by_autograd(model: UNet) -> int:
    """How many pairs of maps autograd adds in a backward pass."""
    out = model(noise(2, 3, 8, 8), T, **prompt())
    with torch.profiler.profile(record_shapes=True) as profile:
        out.sum().backward()
    sums = (each for each in profile.events() if each.name in ("aten::add", "aten::add_"))
    maps = (each for each in sums if [len(shape) for shape in each.input_shapes[:2]] == [4, 4])
    return sum("evaluate_function" in each.cpu_parent.name for each in maps)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_learns_the_same(variant: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(**VARIANTS[variant]).train()
    expected = apart(model, monkeypatch)
    for stage in model.stages():
        stage.recompute = recompute
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_learns_the_same_from_inputs_apart(
    variant: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(**VARIANTS[variant]).train()
    expected = gradients(model)
    monkeypatch.setattr(blocks, "stay_apart", lambda _x: True)  # as on a GPU
    for stage in model.stages():
        stage.recompute = recompute
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("layer", ["in_layers.0", "in_layers.2"])
def test_a_watched_layer_learns_the_same_from_inputs_apart(
    layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = tiny(**SHAPE).train(), []
    expected = gradients(model)
    monkeypatch.setattr(blocks, "stay_apart", lambda _x: True)
    watched = model.get_submodule(f"output_blocks.1.0.{layer}")
    watched.register_forward_hook(lambda *call: seen.append(call[2]))
    actual = gradients(model)
    assert len(seen) == 1
    assert_close(actual, expected)


def test_autograd_has_no_maps_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sums_by_autograd(tiny()) == 0
    assert sums_by_autograd(tiny(resblock_updown=False)) == 1  # before a stage that is a convolution alone
    monkeypatch.setattr(trunk, "is_plain", lambda *_: False)
    assert sums_by_autograd(tiny()) == 4


def test_without_gradients_the_maps_are_the_stages_own() -> None:
    model, seen = tiny(), []
    hooks = [stage.register_forward_hook(lambda *call: seen.append(call[2])) for stage in model.input_blocks]
    embedding, text = noise(2, 128), noise(2, 5, 32)
    with torch.no_grad():
        maps = model.encode(noise(2, 3, 8, 8), embedding, text)
        for hook in hooks:
            hook.remove()
        again = model.encode(noise(2, 3, 8, 8), embedding, text)
    assert all(torch.equal(*both) for both in zip(maps, again, strict=True))
    assert all(one is other for one, other in zip(maps, seen, strict=False))


@pytest.mark.parametrize("name", ["input_blocks.1", "middle_block", INNER, f"{INNER}.in_layers.0"])
@pytest.mark.parametrize("backward", [False, True])
def test_a_hook_sees_its_layer(name: str, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny(**SHAPE).train(), []
    expected = apart(model, monkeypatch)
    layer = model.get_submodule(name)
    register = layer.register_full_backward_hook if backward else layer.register_forward_hook
    register(lambda *call: seen.append(call[2]))
    actual = gradients(model)
    assert len(seen) == 1
    assert not (isinstance(seen[0], tuple) and len(seen[0]) != 1)
    assert_close(actual, expected)


def test_a_hook_on_all_modules_sees_blocks_and_stages() -> None:
    model, seen = tiny(), []
    hook = nn.modules.module.register_module_forward_hook(lambda *call: seen.append(call[0]))
    gradients(model)
    hook.remove()
    assert all(any(stage is each for each in seen) for stage in model.stages())
    assert all(any(block is each for each in seen) for block in model.residual_blocks())


@pytest.mark.parametrize("name", ["input_blocks.1", INNER])
def test_a_forward_of_its_own_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny(**SHAPE).train(), []
    expected = apart(model, monkeypatch)
    layer: Any = model.get_submodule(name)
    own = layer.forward
    layer.forward = lambda *inputs: seen.append(1) or own(*inputs)
    assert_same(gradients(model), expected)
    assert seen == [1]


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_networks_learn_the_same(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(**SHAPE, text=None).train()
    expected = apart(model, monkeypatch)
    if whole:
        actual = gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    else:
        model.input_blocks[1].compile(backend="aot_eager")
        actual = gradients(model)
    assert_close(actual, expected)
