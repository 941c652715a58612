"""A run's record: ``log.jsonl``, one line every few steps, and the loss curve drawn from it."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glide_fast.files import replacing

NO_LOSSES = ("step", "grad_norm", "loss_scale", "images_per_second")


class RunLog:
    """Appends records to a JSONL file; resumed at a step, it forgets what came after that step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        records = [record for record in read_log(path) if record["step"] <= step]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        """Add one record; a kill after this returns cannot lose it."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log, oldest first; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def require_matplotlib() -> None:
    """Raise ``ModuleNotFoundError`` where matplotlib is missing: before a run, not hours into it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "a training run draws its loss curve with matplotlib, which is not installed; "
            "pip install 'glide-fast[train]'",
            name="matplotlib",
        )


def plot_losses(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the losses over the steps as PNG; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [record["step"] for record in records]
    for name in [name for name in records[-1] if name not in NO_LOSSES]:
        axes.plot(steps, [record.get(name, math.nan) for record in records], label=name, linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="training loss")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
