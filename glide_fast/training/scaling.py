"""The scale of the loss in float16 (Mixed Precision Training, arXiv 1710.03740, section 3.2).

Gradients of activations below 6e-8 vanish in float16, so the loss is multiplied by a power of two and the
weights' gradients are divided by it again, in float32, exactly. Where they overflow, the step is taken
again at half the scale: no batch is skipped, and a run does not depend on how often that happened.
"""

from __future__ import annotations

from glide_fast.training.config import LARGEST_SCALE, ScalingConfig


class LossScale:
    """One for a run; without a config it is always 1.

    ``halvings`` counts those in a row, ``since`` the steps since the scale last changed.
    """

    def __init__(self, config: ScalingConfig | None) -> None:
        self.config = config
        self.value = 1.0 if config is None else config.initial
        self.halvings = self.since = 0

    def halve(self) -> bool:
        """After gradients that are not finite: whether half the scale is to be tried."""
        if self.config is None or self.halvings >= self.config.most_halvings:
            return False
        self.value /= 2
        self.halvings, self.since = self.halvings + 1, 0
        return True

    def succeed(self) -> None:
        """After a step with finite gradients; as many as the config says double the scale."""
        if self.config is None:
            return
        self.halvings, self.since = 0, self.since + 1
        if self.since >= self.config.growth_interval:
            self.value, self.since = min(2 * self.value, LARGEST_SCALE), 0

    def state_dict(self) -> dict[str, float]:
        """What the next step depends on; nothing without a config."""
        return {} if self.config is None else {"value": self.value, "since": self.since}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a state; from the config's where a run had no scale before."""
        if self.config is not None and state:
            self.value, self.since = float(state["value"]), int(state["since"])

    def __str__(self) -> str:
        if self.config is None:
            return ""
        return f", the loss scaled by {self.value:g} after {self.halvings} halvings in a row"
