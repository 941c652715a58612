"""What a model can do, it can do while it is served: copies, pickles, hooks, replicas, conversions."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import glide_fast
from glide_fast.accelerate import report
from tests.accelerate.compare import kinds, noise, plain_and_served, randomised
from tests.accelerate.foreign import GroupNorm32, ResBlock, UNet
from tests.accelerate.foreign_text import ResidualAttentionBlock, causal

GIVEN = (noise(2, 3, 8, 8), torch.tensor([3, 700]))
BLOCK = (noise(2, 16, 4, 4), noise(2, 12, seed=2))


def unet(**options: bool) -> UNet:
    model = UNet("guided", **options)
    randomised(model)
    return model


def block() -> ResBlock:
    made = ResBlock("guided", 16, 12, film=True, dropout=0.2)
    randomised(made)
    return made


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_a_file],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_served_and_has_weights_of_its_own(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = glide_fast.accelerate(unet())
    before = model(*GIVEN)
    twin = duplicate(model)
    assert kinds(twin) == kinds(model)
    assert torch.equal(twin(*GIVEN), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(model(*GIVEN), before)
    plain = unet()
    plain.load_state_dict(twin.state_dict())
    torch.testing.assert_close(twin(*GIVEN), plain(*GIVEN), rtol=1e-4, atol=1e-4)
    glide_fast.restore(twin)
    assert type(twin.middle_block[0]) is ResBlock
    assert torch.equal(twin(*GIVEN), plain(*GIVEN))


def test_a_data_parallel_replica_uses_its_own_weights() -> None:
    served = glide_fast.accelerate(block()).eval()
    replica = served._replicate_for_data_parallel()
    replica.in_layers = copy.deepcopy(served.in_layers)
    nn.init.zeros_(replica.in_layers[2].weight)
    plain = glide_fast.restore(copy.deepcopy(served))
    nn.init.zeros_(plain.in_layers[2].weight)
    torch.testing.assert_close(replica(*BLOCK), plain(*BLOCK), rtol=0, atol=2e-5)


def test_distributed_training_goes_on(tmp_path: Path) -> None:
    plain, served = plain_and_served(unet(checkpoint=False))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        grads = []
        for model in (plain, served):
            nn.parallel.DistributedDataParallel(model)(*GIVEN).square().mean().backward()
            grads.append([parameter.grad for parameter in model.parameters()])
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)


def test_wrappers_are_looked_into() -> None:
    wrapped = nn.DataParallel(unet())
    expected = wrapped(*GIVEN)
    torch.testing.assert_close(glide_fast.accelerate(wrapped)(*GIVEN), expected, rtol=0, atol=2e-5)
    assert len(report(wrapped).served) == 19
    assert report(wrapped).served[0].path == "module.input_blocks.1.0"


def test_names_parameters_and_attributes_stay() -> None:
    model = unet()
    state = model.state_dict()
    pointers = {name: value.data_ptr() for name, value in state.items()}
    contents = {path: set(vars(part)) for path, part in model.named_modules()}
    drawn = repr(model)
    glide_fast.accelerate(model)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == pointers
    assert list(model.state_dict()) == list(state)
    assert {path: set(vars(part)) for path, part in model.named_modules()} == contents
    assert repr(model) == drawn
    assert isinstance(model.middle_block[0], ResBlock)
    assert type(model.middle_block[0]).__qualname__ == "ResBlock"


def test_acceleration_leaves_no_trace() -> None:
    model = unet().train()
    model(*GIVEN).sum().backward()
    model.middle_block.eval()
    fired = []
    for part in model.modules():
        part.register_forward_hook(lambda *_: fired.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    modes = [part.training for part in model.modules()]
    stream = torch.get_rng_state()
    glide_fast.accelerate(model)
    report(model)
    assert torch.equal(torch.get_rng_state(), stream)
    assert not fired
    assert [part.training for part in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, grads[name])


def test_the_callers_settings_do_not_matter() -> None:
    model = unet()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            glide_fast.accelerate(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(report(model).served) == 19
    torch.testing.assert_close(model(*GIVEN), unet()(*GIVEN), rtol=0, atol=2e-5)


def test_twice_is_once() -> None:
    model = glide_fast.accelerate(unet())
    classes = [type(part) for part in model.modules()]
    assert [type(part) for part in glide_fast.accelerate(model).modules()] == classes
    assert [type(part) for part in glide_fast.restore(model).modules()] == [
        type(part) for part in unet().modules()
    ]
    glide_fast.restore(model)


def test_parts_first_then_the_whole() -> None:
    served = block().eval()
    expected = served(*BLOCK)
    glide_fast.accelerate(served.in_layers)
    glide_fast.accelerate(served)
    assert kinds(served) == {"ResBlock": 1}
    torch.testing.assert_close(served(*BLOCK), expected, rtol=0, atol=2e-5)
    pickle.loads(pickle.dumps(served))
    assert torch.equal(glide_fast.restore(served)(*BLOCK), expected)


def test_exchanged_parameters_are_used() -> None:
    plain, served = plain_and_served(block().eval())
    for model in (plain, served):
        model.in_layers[0].weight = nn.Parameter(torch.linspace(-1, 1, 16))
        model.out_layers[0].bias.data = torch.linspace(0, 2, 16)
    torch.testing.assert_close(served(*BLOCK), plain(*BLOCK), rtol=0, atol=2e-5)


class Negative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


@pytest.mark.parametrize(("layers", "index"), [("in_layers", 0), ("in_layers", 1), ("out_layers", 1)])
def test_exchanged_inner_modules_are_used(layers: str, index: int) -> None:
    plain, served = plain_and_served(block().eval())
    before = served(*BLOCK)
    for model in (plain, served):
        getattr(model, layers)[index] = Negative()
    assert torch.equal(served(*BLOCK), plain(*BLOCK))
    assert not torch.allclose(served(*BLOCK), before, atol=1e-2)


def test_exchanged_convolutions_are_used_by_the_served_block() -> None:
    plain, served = plain_and_served(block().eval())
    for model in (plain, served):
        parametrizations.weight_norm(model.in_layers[2])
        model.out_layers[3] = nn.Sequential(model.out_layers[3], Negative())
    output = served(*BLOCK)
    torch.testing.assert_close(output, plain(*BLOCK), rtol=0, atol=2e-5)
    assert kinds(served) == {"ResBlock": 1}


@pytest.mark.parametrize(
    "path", ["", "in_layers", "in_layers.0", "in_layers.1", "in_layers.2", "out_layers.0", "out_layers.1"]
)
def test_hooks_fire_wherever_they_sit(path: str) -> None:
    plain, served = plain_and_served(block().eval())
    seen: list[Tensor] = []
    for model in (plain, served):
        part = model.get_submodule(path)
        part.register_forward_hook(lambda _module, _inputs, output: seen.append(output) or output * 0.5)
    expected, actual = plain(*BLOCK), served(*BLOCK)
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def test_a_forward_patched_onto_an_inner_module_is_used() -> None:
    plain, served = plain_and_served(block().eval())
    before = served(*BLOCK)
    for model in (plain, served):
        model.out_layers[1].forward = torch.sin
    assert torch.equal(served(*BLOCK), plain(*BLOCK))
    assert not torch.allclose(served(*BLOCK), before, atol=1e-2)


def test_a_hook_on_clips_attention_fires() -> None:
    served = glide_fast.accelerate(ResidualAttentionBlock(32, 2, causal(5)))
    seen = []
    handle = served.attn.register_forward_hook(lambda *_: seen.append(1))
    served(noise(5, 2, 32))
    handle.remove()
    served(noise(5, 2, 32))
    assert seen == [1]


def test_a_slice_of_served_output_layers_is_that_slice() -> None:
    model = glide_fast.accelerate(unet())
    x = noise(2, 16, 4, 4)
    torch.testing.assert_close(model.out[1:](x), model.out[2](nn.functional.silu(x)))
    torch.testing.assert_close(model.out[2:](model.out[:2](x)), model.out(x))


def test_a_shared_module_is_served_once_and_everywhere() -> None:
    norm = GroupNorm32(4, 16)
    model = nn.Sequential(norm, nn.Conv2d(16, 16, 1), norm)
    plain, served = plain_and_served(model)
    assert served[0] is served[2]
    assert kinds(served) == {"GroupNorm32": 1}
    x = noise(2, 16, 4, 4)
    torch.testing.assert_close(served(x), plain(x), rtol=0, atol=2e-5)


def test_to_double_and_back() -> None:
    plain, served = plain_and_served(block().eval())
    exact = [each.double() for each in BLOCK]
    output = served.double()(*exact)
    assert output.dtype == torch.float64
    torch.testing.assert_close(output.float(), plain(*BLOCK), rtol=0, atol=2e-5)
    torch.testing.assert_close(served.float()(*BLOCK), plain(*BLOCK), rtol=0, atol=2e-5)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = UNet("guided", new_order=True)
    glide_fast.accelerate(model)
    assert len(report(model).served) == 19
    assert all(parameter.is_meta for parameter in model.parameters())
    plain = unet(new_order=True)
    model = model.to_empty(device="cpu")
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(*GIVEN), plain(*GIVEN), rtol=0, atol=2e-5)


def test_torchs_checkpointing_around_a_served_block() -> None:
    served = glide_fast.accelerate(block().eval())
    grads = []
    for recompute in (False, True):
        x = BLOCK[0].clone().requires_grad_()
        if recompute:
            output = torch.utils.checkpoint.checkpoint(served, x, BLOCK[1], use_reentrant=False)
        else:
            output = served(x, BLOCK[1])
        output.square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_autocast_goes_on() -> None:
    plain, served = plain_and_served(unet())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = plain(*GIVEN), served(*GIVEN)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.1)


def test_restore_says_when_it_cannot() -> None:
    norm = glide_fast.accelerate(GroupNorm32(4, 16))
    nn.utils.parametrize.register_parametrization(norm, "weight", Negative())
    with pytest.raises(ValueError, match="undo that before restore"):
        glide_fast.restore(norm)
    nn.utils.parametrize.remove_parametrizations(norm, "weight")
    assert type(glide_fast.restore(norm)) is GroupNorm32


def test_importing_the_package_loads_nothing() -> None:
    code = (
        "import sys, glide_fast\n"
        "assert 'torch' not in sys.modules\n"
        "assert callable(glide_fast.accelerate) and callable(glide_fast.restore)\n"
        "from glide_fast.accelerate import accelerate, report\n"
        "assert glide_fast.accelerate.report is report and glide_fast.accelerate.accelerate is accelerate\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'accelerated'"):
        glide_fast.accelerated  # noqa: B018
