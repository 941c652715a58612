"""GLIDE's central comparison on the embedded model: classifier-free guidance against CLIP guidance.

The same captions and seeds are painted at every scale of both kinds, and judged by a CLIP that did no
guiding: fidelity (Fréchet distance, precision), diversity (recall), recognised captions (R-precision).
As gradients can deceive one network in a way that deceives its like, pixels are a judge as well: is the
caption's own picture among the five nearest?
GLIDE reports that classifier-free guidance is the better trade (arXiv 2112.10741, section 5.1, figure 6).

CLIP guidance pushes the conditional model along the gradient of the similarity that a noise-aware CLIP sees
between x_t and the caption (section 2.4); the scale is a factor of that gradient. Nothing is lost when the
sweep is stopped: each cell, a kind at a scale with a seed, is a drawing of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from glide_fast.data.dataset import CaptionedPictures
from glide_fast.data.images import to_uint8
from glide_fast.evaluation.drawing import DrawingPlan, draw, read_drawing
from glide_fast.evaluation.extractors import EMBEDDED_JUDGE
from glide_fast.evaluation.features import clip_captions, clip_features
from glide_fast.evaluation.metrics import fid, r_precision
from glide_fast.evaluation.nearest import nearest_rank, squared_distances
from glide_fast.evaluation.neighbours import precision_recall
from glide_fast.files import sha256_of
from glide_fast.models import LoadedModel, NoisyCLIP, load_model, load_network
from glide_fast.models.kept import keep_if_it_fits
from glide_fast.sampling.denoiser import PerImageNoise, initial_noise
from glide_fast.sampling.gradients import noisy_clip_gradient
from glide_fast.sampling.guidance import along_gradient
from glide_fast.sampling.pipeline import ASSETS, EMBEDDED, StageOptions, sample_stage
from glide_fast.sampling.samplers import find_sampler
from glide_fast.text.framing import framed
from glide_fast.text.tokenizer import get_tokenizer
from glide_fast.training.distributed import World

Kind = Literal["plain", "classifier-free", "clip", "data"]
GUIDE = ASSETS / "emoji_clip.safetensors"
SIZE = 32  # pixels, of the embedded base model
SEED_STRIDE = 100_000  # so that no two seeds share a picture's noise
DISTRACTORS = 99
NEAREST = 5  # pictures of the data among which a caption's own must be


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What is swept: every scale of both kinds, for each seed with captions of its own.

    Raises:
        ValueError: too few seeds for an interval, too few captions, or scales that are not increasing.
    """

    captions: int = 150
    """Pictures at each scale for each seed."""
    seeds: int = 5
    """Repetitions, at least 3."""
    steps: int = 20
    """Steps of the sampler, 2 to 1000."""
    sampler: str = "dpm++2m"
    """How to go from noise to picture."""
    batch: int = 32
    """Pictures painted at a time."""
    classifier_free: tuple[float, ...] = (1.1, 1.25, 1.5, 2.0, 3.0, 5.0)
    """Scales of classifier-free guidance, above 1."""
    clip: tuple[float, ...] = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
    """Scales of CLIP guidance, above 0."""
    neighbours: int = 3
    """Of precision and recall."""

    def __post_init__(self) -> None:
        if self.seeds < 3:
            raise ValueError(f"seeds {self.seeds} must be at least 3, or the intervals say nothing")
        if self.captions <= self.neighbours:
            raise ValueError(f"captions {self.captions} must be more than neighbours {self.neighbours}")
        for name, first, scales in (
            ("classifier_free", 1.0, self.classifier_free),
            ("clip", 0.0, self.clip),
        ):
            if not scales or any(a >= b for a, b in pairwise((first, *scales))):
                raise ValueError(f"{name} {scales} must be scales above {first:g} that increase")

    @property
    def cells(self) -> list[tuple[Kind, float]]:
        """Kinds and scales, from the plain conditional model on."""
        cells: list[tuple[Kind, float]] = [("plain", 1.0)]
        cells += [("classifier-free", scale) for scale in self.classifier_free]
        cells += [("clip", scale) for scale in self.clip]
        return cells


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What the judges say of one kind at one scale with one seed; ``distance`` is Fréchet's.

    ``nearest`` is the share of pictures to which few other pictures of the data are nearer, by pixels, than
    the caption's own.
    """

    kind: Kind
    scale: float
    seed: int
    distance: float
    precision: float
    recall: float
    r_precision: float
    nearest: float


@dataclass(frozen=True, kw_only=True)
class Models:
    """The files of a study: a base model, the CLIP that guides and the CLIP that judges."""

    base: Path = EMBEDDED[0]
    """The text model that paints."""
    guide: Path = GUIDE
    """The noise-aware CLIP that guides."""
    judge: Path = EMBEDDED_JUDGE
    """The CLIP that judges."""

    def check(self) -> None:
        """Raise FileNotFoundError where one is missing, ValueError where the judge is the guide."""
        for path in (self.base, self.guide, self.judge):
            if not path.is_file():
                raise FileNotFoundError(f"model {path} does not exist or is not a file")
        if sha256_of(self.guide) == sha256_of(self.judge):
            raise ValueError(f"{self.judge} is what guides; a judge must have been trained apart")

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each."""
        return {name: sha256_of(Path(path)) for name, path in asdict(self).items()}


def sweep(
    settings: StudySettings,
    models: Models,
    data: CaptionedPictures,
    folder: Path,
    world: World,
    *,
    progress: bool = False,
) -> None:
    """Paint every cell into ``folder``, but for what is there; any number of processes share the work.

    Raises:
        FileNotFoundError, ValueError: a model is missing or none of its kind, or as :func:`draw`.
    """
    models.check()
    base, guide = load_model(models.base), load_network(models.guide, NoisyCLIP)
    for network in (base.network, guide):
        network.to(world.device)
    orders = [(seed, *cell) for seed in range(settings.seeds) for cell in settings.cells]
    for seed, kind, scale in tqdm(orders, desc="study", unit="cell", disable=not progress):
        made_by = {
            "kind": kind,
            "scale": scale,
            "steps": settings.steps,
            "sampler": settings.sampler,
            "model_sha256": models.hashes()["base"],
            "guide_sha256": models.hashes()["guide"] if kind == "clip" else None,
        }
        plan = replace(_plan(settings, data, seed), made_by=made_by)
        paint = partial(_paint, base, guide, settings, kind, scale)
        draw(paint, plan, _cell(folder, seed, kind, scale), world)


def measure(
    settings: StudySettings,
    models: Models,
    data: CaptionedPictures,
    folder: Path,
    world: World,
    *,
    progress: bool = False,
) -> list[Measurement]:
    """What the judge says of each cell that :func:`sweep` painted, and of the captions' own pictures."""
    judge = load_network(models.judge, NoisyCLIP).to(world.device)
    look = clip_features(judge)
    references, captions = look(data.images), clip_captions(judge, data.captions)
    distractors = min(DISTRACTORS, len(captions) - 1)
    row = {caption: index for index, caption in enumerate(data.captions)}
    measurements = []
    cells: list[tuple[Kind, float]] = [("data", 0.0), *settings.cells]
    orders = [(seed, *cell) for seed in range(settings.seeds) for cell in cells]
    for seed, kind, scale in tqdm(orders, desc="judging", unit="cell", disable=not progress):
        plan = _plan(settings, data, seed)
        own = np.array([row[caption] for caption in plan.captions_of(range(settings.captions))])
        pictures, samples = data.images[own], references[own]
        if kind != "data":
            shards = read_drawing(_cell(folder, seed, kind, scale))
            pictures = np.concatenate([shard.pictures for shard in shards])
            samples = look(pictures)
        overlap = precision_recall(samples, references, neighbours=settings.neighbours)
        ranks = nearest_rank(squared_distances(pictures, data.images), own)
        right = r_precision(samples, captions, own, distractors=distractors, seed=seed)
        measurements.append(
            Measurement(
                kind=kind,
                scale=scale,
                seed=seed,
                distance=fid(samples, references),
                precision=overlap.precision,
                recall=overlap.recall,
                r_precision=right.share,
                nearest=float((ranks < NEAREST).mean()),
            )
        )
    return measurements


def _plan(settings: StudySettings, data: CaptionedPictures, seed: int) -> DrawingPlan:
    """The captions and seeds of a cell: those of its seed, whatever its kind and scale."""
    if settings.captions > len(data):
        raise ValueError(f"captions {settings.captions} must be at most the {len(data)} of the data")
    return DrawingPlan(
        number=settings.captions,
        captions=data.captions,
        seed=seed * SEED_STRIDE,
        batch=settings.batch,
        shard=2 * settings.batch,
        made_by={},
    )


def _cell(folder: Path, seed: int, kind: Kind, scale: float) -> Path:
    return folder / f"seed{seed}-{kind}-{scale:g}"


def _paint(
    base: LoadedModel,
    guide: NoisyCLIP,
    settings: StudySettings,
    kind: Kind,
    scale: float,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> NDArray[np.uint8]:
    """Pictures of the base model's size, guided by one kind at one scale."""
    noise = PerImageNoise(seeds)
    options = StageOptions(sampler=settings.sampler, steps=settings.steps, guidance=scale)
    if kind == "clip":
        return to_uint8(clip_guided(base, guide, prompts, noise=noise, options=options))
    return to_uint8(sample_stage(base, prompts, noise=noise, options=options))


def clip_guided(
    base: LoadedModel,
    guide: NoisyCLIP,
    prompts: Sequence[str],
    *,
    noise: PerImageNoise,
    options: StageOptions,
) -> torch.Tensor:
    """One picture a prompt, [B, 3, H, W] in [-1, 1], guided by a noise-aware CLIP at scale ``guidance``.

    Raises:
        ValueError: the CLIP reads pictures of another size than the model paints, or no text conditions it.
    """
    network, config = base
    text, size = config.unet.text, config.unet.image_size
    if text is None or guide.config.image_size != size:
        raise ValueError(
            f"a model of text at {guide.config.image_size} px, which this CLIP reads, is needed; "
            f"this one paints {size} px"
        )
    keep_if_it_fits(network)
    device = next(network.parameters()).device
    words = get_tokenizer(text.tokenizer).batch(prompts, text.context)
    tokens, lengths = framed(guide.config.tokenizer, prompts, guide.config.context)
    with torch.no_grad():
        encoded = network.text(words.tokens.to(device), words.mask.to(device))
        embeddings = guide.text_embeddings(tokens.to(device), lengths.to(device))
    diffusion = options.diffusion(config)
    gradient = noisy_clip_gradient(guide, embeddings, options.guidance or 0.0)
    guided = along_gradient(lambda x, t: network(x, t, text=encoded), gradient, diffusion)
    start = initial_noise(noise, (len(prompts), 3, size, size), device=device)
    return find_sampler(options.sampler)(guided, start, diffusion, noise=noise, eta=options.eta)
