"""Layers that are computed together are still called one by one where somebody watches or replaces them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glide_fast.models.layers import Conv2d, ResBlock


def block() -> ResBlock:
    torch.manual_seed(0)
    made = ResBlock(32, 32, 16)
    nn.init.normal_(made.out_layers["3"].weight, std=0.1)
    return made.eval()


@torch.no_grad()
def run(made: ResBlock) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, embedding = torch.randn(2, 32, 16, 16, generator=generator), torch.randn(2, 16, generator=generator)
    return made(x, embedding)  # type: ignore[no-any-return]


def test_a_hook_sees_its_layer_and_the_result_stays() -> None:
    made = block()
    expected = run(made)
    for name in ("in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3"):
        seen: list[Tensor] = []
        hook = made.get_submodule(name).register_forward_hook(lambda *call, seen=seen: seen.append(call[2]))
        torch.testing.assert_close(run(made), expected, rtol=1e-4, atol=1e-4)
        hook.remove()
        assert len(seen) == 1, name


def test_a_replaced_layer_is_called() -> None:
    class Doubled(Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    made = block()
    x = run(made)
    doubled = Doubled(32, 32, 3, padding=1)
    doubled.load_state_dict(made.out_layers["3"].state_dict())
    made.out_layers["3"] = doubled
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(2, 32, 16, 16, generator=generator)
    torch.testing.assert_close(run(made) - start, 2 * (x - start), rtol=1e-3, atol=1e-3)
