"""The table of presets that ``glide-fast models`` prints."""

from __future__ import annotations

from glide_fast.download import cached_path
from glide_fast.models.clip import CLIPConfig
from glide_fast.models.configs import Config, ModelConfig, describe
from glide_fast.models.encoder import EncoderConfig
from glide_fast.models.presets import PUBLISHED, Published

_HEADINGS = ("name", "task", "parameters", "pixels", "weights")
_TO_THE_RIGHT = ("parameters", "pixels")


def catalogue() -> str:
    """One line a preset: name, task, number of parameters, pixels of its pictures, where its weights are."""
    rows = [_HEADINGS, *(_row(name, entry) for name, entry in PUBLISHED.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if heading in _TO_THE_RIGHT else cell.ljust(width)
            for cell, width, heading in zip(row, widths, _HEADINGS, strict=True)
        ).rstrip()
        for row in rows
    )


def _row(name: str, entry: Published) -> tuple[str, ...]:
    parameters = sum(parameter.numel() for parameter in describe(entry.config).parameters())
    return (
        name,
        _task(entry.config),
        f"{parameters / 1e6:,.1f} M",
        str(_pixels(entry.config)),
        _weights(entry),
    )


def _task(config: Config) -> str:
    if isinstance(config, EncoderConfig):
        return "noised picture → class"
    if isinstance(config, CLIPConfig):
        return "picture, text → likeness"
    if not isinstance(config, ModelConfig):
        return "noised picture, text → likeness"
    unet = config.unet
    conditions = {
        "text": unet.text is not None,
        "class": unet.classes is not None,
        "small picture": unet.low_res,
        "part": unet.inpaint,
    }
    return f"{', '.join(name for name, given in conditions.items() if given) or 'noise'} → picture"


def _pixels(config: Config) -> int:
    if isinstance(config, ModelConfig):
        return config.unet.image_size
    return config.trunk.image_size if isinstance(config, EncoderConfig) else config.image_size


def _weights(entry: Published) -> str:
    if not entry.files:
        return "never published"
    return "in the cache" if all(cached_path(file.url).is_file() for file in entry.files) else "to download"
