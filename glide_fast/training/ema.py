"""An exponential moving average of a model's weights (Improved DDPM, section 2.5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glide_fast.training.distributed import whole


class ExponentialMovingAverage:
    """Float32 average of the parameters, by name.

    The decay of step n is min(decay, (1 + n) / (10 + n)), so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def share(self, step: int) -> float:
        """By how much of the way the average moves after optimiser step ``step`` (from 0)."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the parameters after optimiser step ``step`` (from 0)."""
        parameters = [parameter.detach() for parameter in model.parameters()]
        torch._foreach_lerp_(list(self.average.values()), parameters, self.share(step))

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, by parameter name."""
        return self.average

    def whole(self, *, keep: bool) -> dict[str, Tensor]:
        """The averaged weights, gathered on the CPU where they are sharded, for processes that ``keep`` them.

        Every process must ask for them at the same time.
        """
        found = {}
        for name, tensor in self.average.items():
            gathered = whole(tensor)
            if keep:
                found[name] = gathered if gathered is tensor else gathered.cpu()
        return found

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from averaged weights."""
        for name, tensor in self.average.items():
            tensor.copy_(state[name])
