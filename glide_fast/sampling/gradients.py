"""Gradients that guide a sampler: of a classifier, of a noise-aware CLIP, of an ordinary CLIP.

Each is a function of x_t [B, C, H, W] and the timesteps [B], for
:func:`glide_fast.sampling.guidance.along_gradient`. Samplers run in inference mode; these leave it for the
time of their own forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from glide_fast.diffusion.process import GaussianDiffusion
from glide_fast.models.clip import CLIP, PIXEL_MEAN, PIXEL_STD
from glide_fast.models.noisy_clip import NoisyCLIP
from glide_fast.sampling.denoiser import Denoiser
from glide_fast.sampling.guidance import GradientFunction

Score = Callable[[Tensor, Tensor], Tensor]  # x_t [B, C, H, W], timesteps [B] -> [B], higher is better


def gradient_of(score: Score, scale: float = 1.0) -> GradientFunction:
    """``scale`` times the gradient of the score by x, float32 [B, C, H, W].

    The score's parameters get no gradients. Tensors that it closes over (labels, embeddings) must have been
    made outside inference mode.
    """

    def gradient(x: Tensor, timesteps: Tensor) -> Tensor:
        with torch.inference_mode(mode=False), torch.enable_grad():
            x, timesteps = x.clone().requires_grad_(), timesteps.clone()
            (found,) = torch.autograd.grad(score(x, timesteps).sum(), x)
        return found.float() * scale

    return gradient


def classifier_gradient(classifier: Score, labels: Tensor, scale: float = 1.0) -> GradientFunction:
    """Of log p(label | x_t) under a classifier of noised pictures (ADM, arXiv 2105.05233, section 4).

    ``classifier`` maps x_t and timesteps to logits [B, classes]; ``labels`` are class indices [B].
    """
    chosen = labels.long()[:, None]
    return gradient_of(lambda x, t: classifier(x, t).float().log_softmax(1).gather(1, chosen), scale)


def noisy_clip_gradient(clip: NoisyCLIP, text: Tensor, scale: float = 3.0) -> GradientFunction:
    """Of the similarity of x_t and its text under a CLIP of noised pictures (GLIDE, arXiv 2112.10741, 2.3).

    ``text`` holds the embeddings of ``clip.text_embeddings`` [B or 1, embedding].
    """
    text = text.detach()
    return gradient_of(lambda x, t: clip.similarity(x, t, text), scale)


def clip_gradient(
    clip: CLIP, text: Tensor, denoise: Denoiser, diffusion: GaussianDiffusion, scale: float = 100.0
) -> GradientFunction:
    """Of the cosine of the predicted x_0 and its text under an ordinary CLIP, through the denoiser.

    Dearer than a noise-aware CLIP, as the denoiser is run again and differentiated, but any CLIP will do.
    ``text`` holds the embeddings of ``clip.encode_text`` [B or 1, embedding]; the guess of x_0 is resized to
    CLIP's pictures without being clipped, so that no pixel loses its gradient.
    """
    text = F.normalize(text.detach().float(), dim=1)

    def score(x: Tensor, timesteps: Tensor) -> Tensor:
        t = diffusion.steps_of(timesteps)
        x_start = diffusion.predict(denoise(x, timesteps), x, t, clip_denoised=False).x_start
        pictures = clip.encode_image(clip_pixels(x_start, clip.config.image_size)).float()
        return (F.normalize(pictures, dim=1) * text).sum(1)

    return gradient_of(score, scale)


def clip_pixels(pictures: Tensor, size: int) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] as CLIP reads them, [B, 3, size, size] with mean 0 and deviation 1."""
    pictures = F.interpolate(pictures, size=(size, size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(each, device=pictures.device).view(3, 1, 1) for each in (PIXEL_MEAN, PIXEL_STD))
    return ((pictures + 1) / 2 - mean) / std
