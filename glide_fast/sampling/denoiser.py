"""What a sampler calls, a denoiser, and where its randomness comes from, a noise source.

A denoiser hides the model, its conditioning and its guidance: it maps x [B, C, H, W] and the timesteps of the
training schedule [B] to the model's output [B, C or 2C, H, W]. A noise source is asked for one tensor of
standard normals at the start and one a step, always for the whole batch, so that one seed means one picture.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from glide_fast.sampling.graph import Capturable

Denoiser: TypeAlias = Callable[[Tensor, Tensor], Tensor]
NoiseSource: TypeAlias = Callable[[Sequence[int], torch.device], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioned(Capturable):
    """A network with what it is told besides x and the timesteps: a denoiser that a graph can hold.

    ``conditions`` are the network's keyword arguments: tensors, or named tuples of them, or None.
    """

    network: nn.Module
    conditions: Mapping[str, Any]

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        output: Tensor = self.network(x, timesteps, **self.conditions)
        return output

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.network,)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in tree_flatten(dict(self.conditions))[0] if isinstance(leaf, Tensor))

    @property
    def recipe(self) -> Hashable:
        leaves, structure = tree_flatten(dict(self.conditions))
        return type(self), structure, tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)

    def reading(self, inputs: Sequence[Tensor]) -> "Conditioned":
        leaves, structure = tree_flatten(dict(self.conditions))
        rest = iter(inputs)
        leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return replace(self, conditions=tree_unflatten(leaves, structure))


def global_noise(shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normals, float32 and contiguous, from torch's own generator of the device.

    After `torch.manual_seed` this is the stream of the published samplers, draw by draw.
    """
    return torch.randn(*shape, device=device, dtype=torch.float32)


class PerImageNoise:
    """A noise source with a generator for each picture: picture k depends on seeds[k], not on its neighbours.

    Draws happen on the CPU and are then moved, so that a seed means the same noise on every device. A GPU is
    not waited for.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(seeds)
        self._generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def __call__(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """The next standard normals of each picture, float32 [B, ...] for shape (B, ...).

        Raises:
            ValueError: B is not the number of seeds.
        """
        if shape[0] != len(self._generators):
            raise ValueError(
                f"noise for {shape[0]} pictures wanted but there are {len(self._generators)} seeds; "
                "give PerImageNoise one seed a picture"
            )
        noise = torch.empty(*shape, dtype=torch.float32, pin_memory=device.type == "cuda")
        for row, generator in zip(noise, self._generators, strict=True):
            torch.randn(row.shape, generator=generator, out=row)
        return noise.to(device, non_blocking=True)


def initial_noise(
    noise: NoiseSource, shape: Sequence[int], *, device: torch.device | str = "cpu", temperature: float = 1.0
) -> Tensor:
    """The start x_T [B, C, H, W] of a sampler: the source's next draw, scaled by `temperature`.

    GLIDE's upsampler starts at temperature 0.997, a little below the noise it was trained with.

    Raises:
        ValueError: the temperature is not in (0, 2].
    """
    if not 0 < temperature <= 2:
        raise ValueError(
            f"temperature {temperature} must lie in (0, 2]; use 1, or 0.997 for GLIDE's upsampler"
        )
    return noise(shape, torch.device(device)) * temperature
