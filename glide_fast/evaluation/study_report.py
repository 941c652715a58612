"""What the study of guidance found, as text, plot and numbers; the answer in words follows from the data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from glide_fast.evaluation.equal_diversity import Interval, advantage
from glide_fast.evaluation.study import DISTRACTORS, NEAREST, Kind, Measurement, Models, StudySettings
from glide_fast.files import replacing

METRICS = {
    "precision": "precision",
    "r_precision": "R-precision",
    "nearest": "nearest by pixels",
    "distance": "Fréchet distance",
}
LOWER_IS_BETTER = ("distance",)
KINDS: dict[Kind, str] = {"classifier-free": "classifier-free guidance", "clip": "CLIP guidance"}
_COLOURS: dict[Kind, str] = {"classifier-free": "#1f5fa8", "clip": "#dd8452"}

_TEMPLATE = """\
# Classifier-free guidance against CLIP guidance

GLIDE (arXiv 2112.10741, section 5.1) reports that classifier-free guidance trades diversity for fidelity
better than guidance by a noise-aware CLIP. Does it win at equal diversity here, on the embedded emoji model?

**{answer}.**

{leads}

![Fidelity over recall for both kinds of guidance](study.png)

Numbers at the points are guidance scales, bars are 95 % intervals over seeds.

| guidance | Fréchet distance | precision | recall | R-precision | nearest by pixels |
| --- | --- | --- | --- | --- | --- |
{rows}

## What was done

Each of {seeds} seeds draws {captions} captions of the training set. They are painted at 32 px with {steps}
steps of {sampler}, with the same noise at every scale: by classifier-free guidance (1 would be the plain
conditional model), and by pushing the conditional model along scale × the gradient of the similarity that a
noise-aware CLIP sees between x_t and the caption (section 2.4).

A second CLIP of the same size, trained with another seed, judges and never guides. Fréchet distance,
precision and recall are taken of its picture embeddings, against the whole training set, with {neighbours}
neighbours; R-precision is the share of pictures that are nearer to their own caption than to {distractors}
others. So few pictures bias the Fréchet distance upwards, equally for all. As gradients that deceive one
network can deceive its like, the last column asks no network: it is the share of pictures whose caption's own
picture is among the {nearest} of the training set that are nearest in pixels.

At equal diversity means: for each seed, the best value on a kind's line that keeps at least a given recall,
averaged over all recalls that both kinds reach; the difference of the two averages, with Student's 95 %
interval over the seeds.

    make study

runs it again; stopped, it goes on where it was. All numbers are in [study.json](study.json).
"""

Table = dict[tuple[Kind, float], dict[str, Interval]]  # kind and scale -> metric -> over seeds


@dataclass(frozen=True, kw_only=True)
class Lead:
    """By how much classifier-free guidance is better in a metric at equal recall."""

    metric: str
    over_seeds: Interval

    @property
    def winner(self) -> Kind | None:
        """Who is better beyond the interval."""
        if self.over_seeds.low <= 0 <= self.over_seeds.high:
            return None
        return "classifier-free" if self.over_seeds.mean > 0 else "clip"

    def sentence(self) -> str:
        """The finding in words."""
        name = METRICS[self.metric]
        mean, low, high = self.over_seeds.mean, self.over_seeds.low, self.over_seeds.high
        if self.winner is None:
            facts = f"difference {mean:+.3g}, 95 % interval {low:+.3g} to {high:+.3g}"
            return f"{name}: undecided ({facts}; positive is in favour of classifier-free guidance)."
        if self.winner == "clip":
            mean, low, high = -mean, -high, -low
        return (
            f"{name}: {KINDS[self.winner]} is better by {mean:.3g} on average over equal recalls "
            f"(95 % interval {low:.3g} to {high:.3g})."
        )


def leads(measurements: Sequence[Measurement]) -> list[Lead]:
    """The comparison at equal recall, metric by metric."""
    seeds = sorted({each.seed for each in measurements})
    found = []
    for metric in METRICS:
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        differences = [
            advantage(*(_line(measurements, kind, seed, metric, sign) for kind in KINDS)) for seed in seeds
        ]
        found.append(Lead(metric=metric, over_seeds=Interval.of(differences)))
    return found


def answer(found: Sequence[Lead]) -> str:
    """Whether classifier-free guidance wins at equal diversity, in a sentence."""
    by_winner = {
        winner: [METRICS[lead.metric] for lead in found if lead.winner == winner]
        for winner in ("classifier-free", "clip", None)
    }
    if len(by_winner["classifier-free"]) == len(found):
        return "Yes: at equal recall, classifier-free guidance is better in " + _listed(
            by_winner["classifier-free"]
        )
    if len(by_winner["clip"]) == len(found):
        return "No: at equal recall, CLIP guidance is better in " + _listed(by_winner["clip"])
    parts = [
        f"{KINDS[winner]} is better in {_listed(by_winner[winner])}" for winner in KINDS if by_winner[winner]
    ]
    if by_winner[None]:
        parts.append(f"{_listed(by_winner[None])} {'is' if len(by_winner[None]) == 1 else 'are'} undecided")
    if by_winner["classifier-free"] and not by_winner["clip"]:
        return "In part: at equal recall, " + "; ".join(parts)
    if by_winner["clip"] and not by_winner["classifier-free"]:
        return "No, not here: at equal recall, " + "; ".join(parts)
    if by_winner["clip"]:
        return "It depends on the metric: at equal recall, " + "; ".join(parts)
    return "Undecided: at equal recall no metric tells the two apart"


def tabulate(measurements: Sequence[Measurement]) -> Table:
    """Means over seeds with their intervals."""
    cells = list(dict.fromkeys((each.kind, each.scale) for each in measurements))
    return {
        cell: {
            metric: Interval.of(
                [getattr(each, metric) for each in measurements if (each.kind, each.scale) == cell]
            )
            for metric in ("distance", "precision", "recall", "r_precision", "nearest")
        }
        for cell in cells
    }


def write_report(
    measurements: Sequence[Measurement], settings: StudySettings, models: Models, folder: Path
) -> str:
    """Write study.md, study.png and study.json; the answer is returned."""
    table, found = tabulate(measurements), leads(measurements)
    plot(table, folder / "study.png")
    numbers = {
        "answer": answer(found),
        "leads": [{"metric": lead.metric, **asdict(lead.over_seeds)} for lead in found],
        "settings": asdict(settings),
        "model_sha256": models.hashes(),
        "measurements": [asdict(each) for each in measurements],
    }
    with replacing(folder / "study.json") as temporary:
        temporary.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    with replacing(folder / "study.md") as temporary:
        temporary.write_text(_text(table, found, settings), encoding="utf-8")
    return answer(found)


def plot(table: Table, path: Path) -> None:
    """The metrics over recall, a line a kind, with the intervals; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (metric, name) in zip(figure.subplots(2, 2).flat, METRICS.items(), strict=True):
        for kind, label in KINDS.items():
            cells = _cells(table, kind)
            x, y = ([table[cell][each] for cell in cells] for each in ("recall", metric))
            axes.errorbar(
                [each.mean for each in x],
                [each.mean for each in y],
                xerr=[each.half for each in x],
                yerr=[each.half for each in y],
                color=_COLOURS[kind],
                label=label,
                marker="o",
                markersize=4,
                elinewidth=0.6,
            )
            for cell, across, up in zip(cells[1:], x[1:], y[1:], strict=True):
                axes.annotate(
                    f"{cell[1]:g}",
                    (across.mean, up.mean),
                    textcoords="offset points",
                    xytext=(5, 4),
                    fontsize=7,
                    color=_COLOURS[kind],
                )
        for kind, marker, label in (
            ("plain", "*", "no guidance"),
            ("data", "x", "the captions' own pictures"),
        ):
            points = [each for cell, each in table.items() if cell[0] == kind]
            axes.plot(
                [each["recall"].mean for each in points],
                [each[metric].mean for each in points],
                marker,
                color="black",
                markersize=9,
                label=label,
                zorder=5,
            )
        axes.set_xlabel("recall (diversity)")
        axes.set_ylabel(name + (", lower is better" if metric in LOWER_IS_BETTER else ""))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def _text(table: Table, found: Sequence[Lead], settings: StudySettings) -> str:
    """study.md."""
    rows = [
        f"| {_named(cell)} | "
        + " | ".join(f"{each.mean:.3g} ± {each.half:.2g}" for each in row.values())
        + " |"
        for cell, row in table.items()
    ]
    return _TEMPLATE.format(
        answer=answer(found),
        leads="\n".join(f"- {lead.sentence()}" for lead in found),
        rows="\n".join(rows),
        distractors=DISTRACTORS,
        nearest=NEAREST,
        **asdict(settings),
    )


def _line(
    measurements: Sequence[Measurement], kind: Kind, seed: int, metric: str, sign: float
) -> list[tuple[float, float]]:
    """(recall, fidelity) of a kind in order of its scale, from the plain model on."""
    rows = [each for each in measurements if each.seed == seed and each.kind in ("plain", kind)]
    rows.sort(key=lambda each: (each.kind != "plain", each.scale))
    return [(each.recall, sign * getattr(each, metric)) for each in rows]


def _cells(table: Table, kind: Kind) -> list[tuple[Kind, float]]:
    return [cell for cell in table if cell[0] in ("plain", kind)]


def _named(cell: tuple[Kind, float]) -> str:
    kind, scale = cell
    if kind == "plain":
        return "none"
    return "the captions' own pictures" if kind == "data" else f"{kind}, {scale:g}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
