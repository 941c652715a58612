"""The published models of the family, by name: config, and where the weights are.

Sources: READMEs and model lists of openai/glide-text2im, guided-diffusion, improved-diffusion and CLIP; the
GLIDE paper (arXiv 2112.10741, section 4) for the models whose weights were never published.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, overload

from glide_fast.models.clip import CLIPConfig, VisionTransformerConfig
from glide_fast.models.conditioning import TextConfig
from glide_fast.models.configs import Config, ModelConfig
from glide_fast.models.encoder import EncoderConfig
from glide_fast.models.noisy_clip import NoisyCLIPConfig
from glide_fast.models.resnet import ResNetConfig
from glide_fast.models.trunk import UNetConfig

_DIFFUSION = "https://openaipublic.blob.core.windows.net/diffusion"
_CLIP = "https://openaipublic.azureedge.net/clip/models"
_LEVELS: dict[int, tuple[float, ...]] = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}

Kind = TypeVar("Kind", ModelConfig, EncoderConfig, CLIPConfig, NoisyCLIPConfig)


class WeightFile(NamedTuple):
    """Where a file of weights is, and its SHA-256 where that is published."""

    url: str
    sha256: str | None = None


class Published(NamedTuple):
    """A model whose weights were published (``files``), or only its sizes (none)."""

    config: Config
    files: tuple[WeightFile, ...] = ()


def _at(path: str) -> tuple[WeightFile, ...]:
    return (WeightFile(url=f"{_DIFFUSION}/{path}"),)


def _glide(
    size: int,
    *,
    channels: int = 192,
    text: TextConfig | None = None,
    inpaint: bool = False,
) -> ModelConfig:
    """GLIDE's base model (64 px, cosine) or upsampler (256 px, linear)."""
    upsampler = size == 256
    unet = UNetConfig(
        image_size=size,
        channels=channels,
        channel_mult=_LEVELS[size],
        res_blocks=2 if upsampler else 3,
        attention_strides=(8, 16, 32) if upsampler else (2, 4, 8),
        dropout=0.1,
        text=text or TextConfig(),
        low_res=upsampler,
        inpaint=inpaint,
    )
    return ModelConfig(unet=unet, schedule="linear" if upsampler else "cosine")


_GLIDE_CLIP = NoisyCLIPConfig(
    embedding=512,
    image_size=64,
    patch_size=4,
    image_heads=12,
    image_head_channels=64,
    image_layers=12,
    text_heads=8,
    text_head_channels=64,
    text_layers=12,
)
_GLIDE_CLIP_FILES = (
    WeightFile(url=f"{_DIFFUSION}/dec-2021/clip_image_enc.pt"),
    WeightFile(url=f"{_DIFFUSION}/dec-2021/clip_text_enc.pt"),
)

# The paper gives widths and depths; the width of a head and the patches are those of the published models.
_GLIDE_PAPER_TEXT = TextConfig(width=2048, layers=24, heads=32)
_GLIDE_PAPER_UPSAMPLER_TEXT = TextConfig(width=1024, layers=16, heads=16)
_GLIDE_CLIP_VIT_L = replace(
    _GLIDE_CLIP, embedding=768, image_heads=16, image_layers=24, text_heads=12, text_layers=12
)


def _guided(
    size: int,
    *,
    classes: int | None = None,
    head_channels: int | None = 64,
    heads: int = 4,
    dropout: float = 0.0,
) -> UNetConfig:
    """guided-diffusion's U-Net above 64 px, without a head_channels ``heads`` heads."""
    return UNetConfig(
        image_size=size,
        channels=256,
        channel_mult=_LEVELS[size],
        res_blocks=2,
        attention_strides=(size // 32, size // 16, size // 8),
        head_channels=head_channels,
        heads=heads,
        dropout=dropout,
        classes=classes,
    )


_GUIDED_64 = replace(
    _guided(64, classes=1000, dropout=0.1), channels=192, res_blocks=3, attention_order="by_role"
)
_GUIDED_UPSAMPLER = replace(_guided(256, classes=1000, head_channels=None), channels=192, low_res=True)
_GUIDED_UPSAMPLER_512 = replace(
    _GUIDED_UPSAMPLER, image_size=512, attention_strides=(16, 32), head_channels=64
)


def _linear(unet: UNetConfig) -> ModelConfig:
    return ModelConfig(unet=unet, schedule="linear")


def _classifier(size: int, res_blocks: int = 2) -> EncoderConfig:
    """guided-diffusion's classifier of ImageNet's classes."""
    trunk = replace(_guided(size), channels=128, res_blocks=res_blocks, out_channels=1000)
    return EncoderConfig(trunk=trunk, pool="attention")


def _improved(
    size: int, *, channels: int = 128, heads: int = 4, dropout: float = 0.0, classes: int | None = None
) -> UNetConfig:
    """improved-diffusion's U-Net: as many heads at every level, convolutions between the levels."""
    return UNetConfig(
        image_size=size,
        channels=channels,
        channel_mult=_LEVELS[size],
        res_blocks=2 if size == 256 else 3,
        attention_strides=(size // 16, size // 8),
        head_channels=None,
        heads=heads,
        dropout=dropout,
        resblock_updown=False,
        classes=classes,
    )


_IMPROVED_64 = ModelConfig(unet=_improved(64), steps=4000, rescale_timesteps=True)
_IMPROVED_32 = replace(_IMPROVED_64, unet=_improved(32, dropout=0.3))
_IMPROVED_64_CLASSES = ModelConfig(unet=_improved(64, channels=192, classes=1000), steps=4000)
_IMPROVED_UPSAMPLER = ModelConfig(
    unet=replace(_improved(256, channels=192, classes=1000), low_res=True), schedule="linear", steps=4000
)
_IMPROVED_LSUN = _linear(replace(_improved(256, heads=1), scale_shift_norm=False, attention_strides=(16,)))


def _clip(
    image_size: int, vision: VisionTransformerConfig | ResNetConfig, embedding: int, width: int
) -> CLIPConfig:
    return CLIPConfig(
        embedding=embedding, image_size=image_size, vision=vision, width=width, layers=12, heads=width // 64
    )


def _clip_file(sha256: str, name: str) -> tuple[WeightFile, ...]:
    return (WeightFile(url=f"{_CLIP}/{sha256}/{name}", sha256=sha256),)


_VIT_L = VisionTransformerConfig(width=1024, layers=24, patch_size=14)

PUBLISHED: dict[str, Published] = {
    "glide-base": Published(_glide(64), _at("dec-2021/base.pt")),
    "glide-upsample": Published(_glide(256), _at("dec-2021/upsample.pt")),
    "glide-base-inpaint": Published(_glide(64, inpaint=True), _at("dec-2021/base_inpaint.pt")),
    "glide-upsample-inpaint": Published(_glide(256, inpaint=True), _at("dec-2021/upsample_inpaint.pt")),
    "glide-clip": Published(_GLIDE_CLIP, _GLIDE_CLIP_FILES),
    "glide-3.5b-base": Published(_glide(64, channels=512, text=_GLIDE_PAPER_TEXT)),
    "glide-1.5b-upsample": Published(_glide(256, channels=384, text=_GLIDE_PAPER_UPSAMPLER_TEXT)),
    "glide-clip-vit-l": Published(_GLIDE_CLIP_VIT_L),
    "guided-64x64-diffusion": Published(ModelConfig(unet=_GUIDED_64), _at("jul-2021/64x64_diffusion.pt")),
    "guided-128x128-diffusion": Published(
        _linear(_guided(128, classes=1000, head_channels=None)),
        _at("jul-2021/128x128_diffusion.pt"),
    ),
    "guided-256x256-diffusion": Published(
        _linear(_guided(256, classes=1000)), _at("jul-2021/256x256_diffusion.pt")
    ),
    "guided-256x256-diffusion-uncond": Published(
        _linear(_guided(256)), _at("jul-2021/256x256_diffusion_uncond.pt")
    ),
    "guided-512x512-diffusion": Published(
        _linear(_guided(512, classes=1000)), _at("jul-2021/512x512_diffusion.pt")
    ),
    "guided-64-256-upsampler": Published(_linear(_GUIDED_UPSAMPLER), _at("jul-2021/64_256_upsampler.pt")),
    "guided-128-512-upsampler": Published(
        _linear(_GUIDED_UPSAMPLER_512), _at("jul-2021/128_512_upsampler.pt")
    ),
    "guided-64x64-classifier": Published(_classifier(64, 4), _at("jul-2021/64x64_classifier.pt")),
    "guided-128x128-classifier": Published(_classifier(128), _at("jul-2021/128x128_classifier.pt")),
    "guided-256x256-classifier": Published(_classifier(256), _at("jul-2021/256x256_classifier.pt")),
    "guided-512x512-classifier": Published(_classifier(512), _at("jul-2021/512x512_classifier.pt")),
    "guided-lsun-bedroom": Published(_linear(_guided(256, dropout=0.1)), _at("jul-2021/lsun_bedroom.pt")),
    "guided-lsun-cat": Published(_linear(_guided(256, dropout=0.1)), _at("jul-2021/lsun_cat.pt")),
    "guided-lsun-horse": Published(_linear(_guided(256, dropout=0.1)), _at("jul-2021/lsun_horse.pt")),
    "guided-lsun-horse-nodropout": Published(_linear(_guided(256)), _at("jul-2021/lsun_horse_nodropout.pt")),
    "improved-imagenet64-uncond": Published(_IMPROVED_64, _at("march-2021/imagenet64_uncond_100M_1500K.pt")),
    "improved-imagenet64-uncond-vlb": Published(
        _IMPROVED_64, _at("march-2021/imagenet64_uncond_vlb_100M_1500K.pt")
    ),
    "improved-imagenet64-cond": Published(
        _IMPROVED_64_CLASSES, _at("march-2021/imagenet64_cond_270M_250K.pt")
    ),
    "improved-upsample-cond": Published(_IMPROVED_UPSAMPLER, _at("march-2021/upsample_cond_500K.pt")),
    "improved-cifar10-uncond": Published(_IMPROVED_32, _at("march-2021/cifar10_uncond_50M_500K.pt")),
    "improved-cifar10-uncond-vlb": Published(_IMPROVED_32, _at("march-2021/cifar10_uncond_vlb_50M_500K.pt")),
    "improved-lsun-bedroom": Published(_IMPROVED_LSUN, _at("march-2021/lsun_uncond_100M_1200K_bs128.pt")),
    "improved-lsun-bedroom-bs64": Published(_IMPROVED_LSUN, _at("march-2021/lsun_uncond_100M_2400K_bs64.pt")),
    "clip-rn50": Published(
        _clip(224, ResNetConfig(width=64, layers=(3, 4, 6, 3)), 1024, 512),
        _clip_file("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "RN50.pt"),
    ),
    "clip-rn101": Published(
        _clip(224, ResNetConfig(width=64, layers=(3, 4, 23, 3)), 512, 512),
        _clip_file("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", "RN101.pt"),
    ),
    "clip-rn50x4": Published(
        _clip(288, ResNetConfig(width=80, layers=(4, 6, 10, 6)), 640, 640),
        _clip_file("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", "RN50x4.pt"),
    ),
    "clip-rn50x16": Published(
        _clip(384, ResNetConfig(width=96, layers=(6, 8, 18, 8)), 768, 768),
        _clip_file("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", "RN50x16.pt"),
    ),
    "clip-rn50x64": Published(
        _clip(448, ResNetConfig(width=128, layers=(3, 15, 36, 10)), 1024, 1024),
        _clip_file("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", "RN50x64.pt"),
    ),
    "clip-vit-b-32": Published(
        _clip(224, VisionTransformerConfig(width=768, layers=12, patch_size=32), 512, 512),
        _clip_file("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    ),
    "clip-vit-b-16": Published(
        _clip(224, VisionTransformerConfig(width=768, layers=12, patch_size=16), 512, 512),
        _clip_file("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    ),
    "clip-vit-l-14": Published(
        _clip(224, _VIT_L, 768, 768),
        _clip_file("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    ),
    "clip-vit-l-14-336px": Published(
        _clip(336, _VIT_L, 768, 768),
        _clip_file("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
    ),
}
PRESETS: dict[str, Config] = {name: row.config for name, row in PUBLISHED.items()}


def published(name: str) -> Published:
    """The row of a published model: config and files.

    Raises:
        ValueError: names those that are spelled alike.
    """
    if name not in PUBLISHED:
        alike = difflib.get_close_matches(name, PUBLISHED, cutoff=0.4) or list(PUBLISHED)
        raise ValueError(
            f"unknown model {name!r}; `glide-fast models` lists the known ones, such as {', '.join(alike)}"
        )
    return PUBLISHED[name]


@overload
def preset(name: str) -> ModelConfig: ...
@overload
def preset(name: str, kind: type[Kind]) -> Kind: ...
def preset(name: str, kind: type[Any] = ModelConfig) -> Any:
    """The config of a published model of the ``kind`` expected, a diffusion model's unless said.

    Raises:
        ValueError: no such model (those spelled alike are named), or one of another kind.
    """
    config = published(name).config
    if not isinstance(config, kind):
        actual = type(config).__name__
        raise ValueError(
            f"model {name!r} has a {actual}, not a {kind.__name__}; ask for preset({name!r}, {actual})"
        )
    return config
