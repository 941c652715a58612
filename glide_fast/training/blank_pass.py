"""A training pass of any network on pictures without content, to be counted rather than learned from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_fast.diffusion import GaussianDiffusion, Schedule, hybrid_loss, simple_loss
from glide_fast.models import ModelConfig, UNet
from glide_fast.models.blocks import ResBlock
from glide_fast.models.configs import Config
from glide_fast.models.encoder import EncoderConfig, EncoderUNet
from glide_fast.models.noisy_clip import NoisyCLIPConfig, Tower
from glide_fast.models.trunk import Stage
from glide_fast.training.tasks.clip import LearningCLIP


def training_model(config: Config, dtype: torch.dtype, *, recompute: bool, device: str) -> nn.Module:
    """The network as the trainer has it, and dropout as a GPU does it, which keeps nothing of its mask."""
    with torch.device(device):
        model = _network(config, dtype)
    for module in model.modules():
        if isinstance(module, Stage | Tower):
            module.recompute = recompute
        if isinstance(module, ResBlock):
            module.out_layers["2"] = _GpuDropout(float(module.out_layers["2"].p))  # type: ignore[arg-type]  # nn.Dropout
    return model.train()


def _network(config: Config, dtype: torch.dtype) -> nn.Module:
    if isinstance(config, NoisyCLIPConfig):
        return LearningCLIP(config, dtype)
    if isinstance(config, EncoderConfig):
        model: UNet | EncoderUNet = EncoderUNet(config, compute_dtype=dtype)
    elif isinstance(config, ModelConfig):
        model = UNet(config.unet, compute_dtype=dtype)
    else:
        raise ValueError(f"training a {type(config).__name__} is not planned: no task trains one")
    if model.config.dims == 2:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    return model


def training_loss(model: nn.Module, config: Config, batch: int, device: str) -> Tensor:
    """The trainer's loss for ``batch`` pictures of noise."""
    if isinstance(config, ModelConfig):
        return _diffusion_loss(model, config, batch, device)
    with torch.device(device):
        t, own = torch.zeros(batch, dtype=torch.int64), torch.arange(batch)
        if isinstance(config, EncoderConfig):
            sides = [config.trunk.image_size] * config.trunk.dims
            return F.cross_entropy(model(torch.zeros(batch, config.trunk.image_channels, *sides), t), own * 0)
        if not isinstance(config, NoisyCLIPConfig):
            raise ValueError(f"training a {type(config).__name__} is not planned: no task trains one")
        x = torch.zeros(batch, 3, config.image_size, config.image_size)
        tokens = torch.zeros(batch, config.context, dtype=torch.int64)
        pictures, texts, scale = model(x, t, tokens, t + 1)
    similar = scale * pictures @ texts.T
    return F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)


def _diffusion_loss(model: nn.Module, config: ModelConfig, batch: int, device: str) -> Tensor:
    unet = config.unet
    diffusion = GaussianDiffusion(
        schedule=Schedule.create(config.schedule, config.steps, ""),
        mean_type=config.prediction,
        variance_type=config.variance,
        rescale_timesteps=config.rescale_timesteps,
    )
    with torch.device(device):
        sides = [unet.image_size] * unet.dims
        x_start, noise = (torch.zeros(batch, unet.image_channels, *sides) for _ in range(2))
        t = torch.zeros(batch, dtype=torch.int64)
        conditions: dict[str, Tensor] = {}
        if unet.text is not None:
            conditions["tokens"] = torch.zeros(batch, unet.text.context, dtype=torch.int64)
            conditions["mask"] = torch.ones(batch, unet.text.context, dtype=torch.bool)
        if unet.low_res:
            conditions["low_res"] = torch.zeros(batch, 3, *(side // 2 for side in sides))
        if unet.classes is not None:
            conditions["labels"] = torch.zeros(batch, dtype=torch.int64)
    x_t = diffusion.q_sample(x_start, t, noise)
    output = model(x_t, diffusion.model_timesteps(t), **conditions)
    if diffusion.learns_variance:
        return hybrid_loss(diffusion, output, x_start, x_t, t, noise).loss.mean()
    return simple_loss(diffusion, output, x_start, x_t, t, noise).mean()


class _GpuDropout(nn.Dropout):
    """What dropout inside a GPU's norm leaves: its result, the mask being computed again (Philox)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone() if self.p else x


def storage_key(tensor: Tensor) -> int:
    """What tensors that share their memory have in common, as long as one of them is alive."""
    address: int = tensor.untyped_storage()._cdata
    return address
