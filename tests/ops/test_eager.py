"""Ops know whether eager or compiled code calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glide_fast import ops
from glide_fast.ops.eager import eagerly, is_eager


class Listener(TorchDispatchMode):
    """Notes of each op of ours whether it was called by eager code."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "glide_fast":
            self.heard.append(is_eager())
        return func(*args, **(kwargs or {}))


def product(x: Tensor, weight: Tensor) -> Tensor:
    return ops.linear(x, weight)


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    return ops.norm_convolution(x[None, None], weight[None, None, :3, :3])


@pytest.mark.parametrize("function", [product, convolution])
def test_compiled_code_is_told_from_eager_code(function: Any) -> None:
    x, weight = torch.randn(4, 4), torch.randn(4, 4)
    modules: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        modules.append(module)
        return module.forward

    expected = torch.compile(function, backend=keep, fullgraph=True)(x, weight)
    with Listener() as eager:
        assert torch.equal(function(x, weight), expected)
    with Listener() as compiled:
        modules[0](x, weight)
    assert eager.heard == [True]
    assert compiled.heard == [False]


def test_an_error_ends_the_call() -> None:
    with pytest.raises(ValueError, match="could not convert"):
        eagerly(float, "no number")
    assert not is_eager()
