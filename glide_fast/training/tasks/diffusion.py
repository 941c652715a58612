"""Diffusion models: text, or a class, or nothing → picture; and a degraded small picture → large picture.

The loss is the hybrid of Improved DDPM (arXiv 2102.09672, equation 16) where the variance is learned, else
the simple one. Upsamplers: GLIDE (arXiv 2112.10741, section 4) and ADM (arXiv 2105.05233, section 5).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_fast.data.dataset import CaptionedPictures
from glide_fast.data.images import to_tensor
from glide_fast.diffusion import GaussianDiffusion, Schedule, hybrid_loss, simple_loss, v_weight
from glide_fast.models import LoadedModel, MaskedImage, UNet
from glide_fast.models.configs import Config
from glide_fast.sampling.denoiser import Conditioned, PerImageNoise, initial_noise
from glide_fast.sampling.graph_cuda import shared_graphs
from glide_fast.sampling.pipeline import StageOptions, quantise, sample_stage
from glide_fast.sampling.samplers import find_sampler
from glide_fast.text.tokenizer import get_tokenizer
from glide_fast.training.config import LowResConfig, TrainConfig
from glide_fast.training.draws import Draws
from glide_fast.training.tasks.task import Batch


class DiffusionTask:
    """Text, class or nothing → picture.

    Captions are dropped at random, so that the model also learns to paint without one.
    """

    samples_show_data = False  # whether samples start from pictures of the data set

    def __init__(self, config: TrainConfig, pictures: CaptionedPictures | None) -> None:
        """``pictures`` is the data set where it is in memory: samples may start from its pictures.

        Raises:
            ValueError: the vocabulary is not the tokenizer's, or a prompt has no picture to start from.
        """
        self.config = config
        self.model = config.diffusion_model
        self.diffusion = GaussianDiffusion(
            schedule=Schedule.create(self.model.schedule, self.model.steps, ""),
            mean_type=self.model.prediction,
            variance_type=self.model.variance,
            rescale_timesteps=self.model.rescale_timesteps,
        )
        self.text = self.model.unet.text
        if self.text is not None:
            self.tokenizer = get_tokenizer(self.text.tokenizer)
            if self.tokenizer.size != self.text.vocabulary:
                raise ValueError(
                    f"model.unet.text.vocabulary {self.text.vocabulary} is not the size of tokenizer "
                    f"{self.text.tokenizer!r}; use {self.tokenizer.size}"
                )
        self.shown = self._find_shown(pictures) if self.samples_show_data else None

    def network(self) -> nn.Module:
        """The U-Net, with activations of the config's dtype and channels-last weights."""
        unet = UNet(self.model.unet, compute_dtype=getattr(torch, self.config.compute_dtype))
        return unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def batch(self, pictures: CaptionedPictures, draws: Draws) -> Batch:
        x_start = to_tensor(pictures.images)
        if self.config.data.flip:
            x_start = mirror(x_start, draws)
        batch = Batch(x_start, labels=pictures.label_tensor() if self.model.unet.classes else None)
        if self.text is None:
            return batch
        kept = draws.uniform() >= self.config.caption_drop
        captions = [each if keep else "" for each, keep in zip(pictures.captions, kept, strict=True)]
        words = self.tokenizer.batch(captions, self.text.context)
        return batch._replace(tokens=words.tokens, mask=words.mask)

    def loss(self, model: nn.Module, batch: Batch, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Loss, its squared error, and its variational bound where the variance is learned, each [B]."""
        diffusion, x_start = self.diffusion, batch.x_start
        x_t = diffusion.q_sample(x_start, t, noise)
        output = model(x_t, diffusion.model_timesteps(t), **self.conditions(batch))
        weight = v_weight(diffusion, t) if self.config.weighting == "v" else 1.0
        if diffusion.learns_variance:
            return hybrid_loss(diffusion, output, x_start, x_t, t, noise, mse_weight=weight)._asdict()
        mse = simple_loss(diffusion, output, x_start, x_t, t, noise) * weight
        return {"loss": mse, "mse": mse}

    def conditions(self, batch: Batch) -> dict[str, Any]:
        """What the U-Net is told besides the noised picture."""
        given = {name: getattr(batch, name) for name in ("tokens", "mask", "low_res", "labels")}
        conditions = {name: value for name, value in given.items() if value is not None}
        if batch.known is not None:
            conditions["known"] = MaskedImage(batch.x_start, batch.known)
        return conditions

    def export(self, state: dict[str, Tensor]) -> tuple[Config, dict[str, Tensor]]:
        return self.model, state

    def samples(self, state: dict[str, Tensor]) -> Tensor | None:
        """A picture for each of the config's prompts, or ``count`` of them."""
        settings = self.config.samples
        if not (settings.prompts or settings.count):
            return None
        with torch.device("meta"):
            model = UNet(self.model.unet)
        model.load_state_dict(state, assign=True)
        return self.draw(LoadedModel(model.eval(), self.model), {})

    def draw(self, stage: LoadedModel, conditions: dict[str, Any]) -> Tensor:
        """The samples of a model that is also told ``low_res`` or ``known``."""
        settings = self.config.samples
        options = StageOptions(steps=settings.steps, guidance=settings.guidance)
        if self.text is not None:
            noise = PerImageNoise(range(len(settings.prompts)))
            return sample_stage(stage, settings.prompts, noise=noise, options=options, **conditions)
        if self.model.unet.classes:
            conditions["labels"] = torch.arange(settings.count) % self.model.unet.classes
        noise, size = PerImageNoise(range(settings.count)), self.model.unet.image_size
        device = next(stage.network.parameters()).device
        conditions = {name: value.to(device) for name, value in conditions.items()}
        return find_sampler(options.sampler)(
            Conditioned(network=stage.network, conditions=conditions),
            initial_noise(noise, (settings.count, self.model.unet.image_channels, size, size), device=device),
            options.diffusion(self.model),
            noise=noise,
            graphs=shared_graphs(options.graph, device),
        )

    def _find_shown(self, pictures: CaptionedPictures | None) -> CaptionedPictures | None:
        """The pictures that samples start from: of the prompts, or the first ones of the data."""
        settings = self.config.samples
        if not (settings.prompts or settings.count):
            return None
        if pictures is None:
            raise ValueError(
                f"task {self.config.task!r} starts its samples from pictures of a data set in memory, which "
                f"{self.config.data.source!r} is not; leave samples.prompts and samples.count out"
            )
        if self.text is None:
            return pictures.select(range(min(settings.count, len(pictures))))
        rows = {caption: row for row, caption in enumerate(pictures.captions)}
        missing = [prompt for prompt in settings.prompts if prompt not in rows]
        if missing:
            source = self.config.data.source
            raise ValueError(f"samples.prompts: {missing[0]!r} is not a caption of {source!r}")
        return pictures.select([rows[prompt] for prompt in settings.prompts])


class UpsamplerTask(DiffusionTask):
    """Small picture, and text or class → picture; the small one is degraded, as a model's are."""

    samples_show_data = True

    def batch(self, pictures: CaptionedPictures, draws: Draws) -> Batch:
        batch = super().batch(pictures, draws)
        return batch._replace(low_res=degrade(self._small(batch.x_start), self.config.low_res, draws))

    def draw(self, stage: LoadedModel, conditions: dict[str, Any]) -> Tensor:
        """The prompts' own pictures, made small and enlarged again."""
        if self.shown is not None:
            conditions["low_res"] = self._small(to_tensor(self.shown.images))
        return super().draw(stage, conditions)

    def _small(self, pictures: Tensor) -> Tensor:
        return shrink(pictures, self.config.low_res.factor)


def mirror(pictures: Tensor, draws: Draws) -> Tensor:
    """Half of the pictures [B, 3, H, W], drawn at random, with left and right exchanged."""
    chosen = draws.uniform(1, 1, 1) < 0.5
    return torch.where(chosen, pictures.flip(3), pictures)


def shrink(pictures: Tensor, factor: int) -> Tensor:
    """[B, 3, H, W] averaged over squares and rounded to 8 bits: what a base model would hand over."""
    return quantise(F.avg_pool2d(pictures, factor))


def degrade(pictures: Tensor, config: LowResConfig, draws: Draws) -> Tensor:
    """Blur and noise of a strength drawn for each picture [B, 3, H, W] (Cascaded Diffusion, section 4.2)."""
    blur, noise = draws.uniform(2, 1, 1, 1).unbind(1)
    blurred = gaussian_blur(pictures, config.blur * blur)
    return blurred + config.noise * noise * draws.normal(*pictures.shape[1:])


def gaussian_blur(pictures: Tensor, sigma: Tensor) -> Tensor:
    """Blur [B, C, H, W] by a 5×5 Gaussian of ``sigma`` [B, 1, 1, 1] pixels; 0 leaves a picture sharp."""
    offsets = torch.arange(-2, 3, dtype=pictures.dtype)
    weights = torch.exp(-(offsets**2) / (2 * sigma.flatten(1).clamp(min=1e-3) ** 2))  # [B, 5]
    weights = weights / weights.sum(1, keepdim=True)
    batch, channels = pictures.shape[:2]
    kernel = (weights[:, :, None] * weights[:, None, :]).repeat_interleave(channels, 0)[:, None]
    padded = F.pad(pictures, (2, 2, 2, 2), mode="replicate").flatten(0, 1)[None]
    return F.conv2d(padded, kernel, groups=batch * channels).view_as(pictures)
