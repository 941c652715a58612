"""Inpainting: known pixels are pasted into every guess of the clean picture (GLIDE, arXiv 2112.10741)."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glide_fast.sampling.graph import Capturable


@dataclass(frozen=True, kw_only=True, eq=False)
class KeepKnown(Capturable):
    """What :func:`keep_known` gives: ``image`` where ``known`` [B, 1, H, W] is true, else the guess."""

    known: Tensor
    image: Tensor

    def __call__(self, x_start: Tensor) -> Tensor:
        return torch.where(self.known, self.image, x_start)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return ()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.known, self.image

    @property
    def recipe(self) -> Hashable:
        return type(self)

    def reading(self, inputs: Sequence[Tensor]) -> "KeepKnown":
        known, image = inputs
        return KeepKnown(known=known, image=image)


def keep_known(image: Tensor, mask: Tensor) -> KeepKnown:
    """A `denoised_fn` for the samplers that keeps `image` [B, C, H, W] where `mask` [B, 1, H, W] is 1.

    The picture that comes out has exactly these pixels there. One image and mask (B = 1) may serve a batch.

    Raises:
        ValueError: the shapes do not fit, the mask has values besides 0 and 1, or known pixels leave [-1, 1].
    """
    if image.dim() != 4 or mask.shape != (image.shape[0], 1, *image.shape[2:]):
        raise ValueError(
            f"image has shape {tuple(image.shape)} and mask {tuple(mask.shape)}; "
            "they must be [B, C, H, W] and [B, 1, H, W]"
        )
    known = mask == 1
    if not (known | (mask == 0)).all():
        raise ValueError(
            f"mask has values in [{mask.min():.3g}, {mask.max():.3g}] but must be 1 where the picture is "
            "known and 0 where it is to be painted; round it"
        )
    if not image.abs().where(known, 0.0).max() <= 1:
        raise ValueError("known pixels must lie in [-1, 1]; scale the picture by x / 127.5 - 1")

    return KeepKnown(known=known, image=image)
