"""The fixtures' toy model, and noise sources that record what is drawn."""

from collections.abc import Sequence

import torch
from torch import Tensor

from glide_fast.diffusion.process import GaussianDiffusion
from glide_fast.sampling.denoiser import Denoiser


def toy_denoiser(diffusion: GaussianDiffusion) -> Denoiser:
    """eps and v [B, C, H, W] of tests/parity/README.md; v only where the variance is learned."""

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        phase = timesteps.float().view(-1, 1, 1, 1) / 1000
        epsilon = 0.7 * x + 0.3 * torch.sin(3 * x + 6 * phase)
        if not diffusion.learns_variance:
            return epsilon
        return torch.cat([epsilon, torch.sin(2 * x - 4 * phase)], dim=1)

    return denoise


class RecordingNoise:
    """torch's global stream, drawn for `factor` times the rows, of which the first are kept."""

    def __init__(self, factor: int = 1) -> None:
        self.factor = factor
        self.shapes: list[list[int]] = []

    def __call__(self, shape: Sequence[int], device: torch.device) -> Tensor:
        drawn = [self.factor * shape[0], *shape[1:]]
        self.shapes.append(drawn)
        return torch.randn(*drawn, device=device)[: shape[0]].contiguous()


def expected_shapes(rng_calls: list[list[object]]) -> list[object]:
    """The shapes of every draw in the manifest's `rng_calls`."""
    return [shape for _, shape, count in rng_calls for _ in range(int(str(count)))]
