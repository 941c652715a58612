"""``glide-fast study``: classifier-free guidance against CLIP guidance, as GLIDE compares them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from glide_fast.data.emoji import load_emoji, split
from glide_fast.evaluation.study import SIZE, Models, StudySettings, measure, sweep
from glide_fast.evaluation.study_report import write_report
from glide_fast.training.distributed import joined
from glide_fast.training.log import require_matplotlib


@dataclass(frozen=True, kw_only=True)
class Study:
    """Sweep both kinds of guidance on the embedded model, and say which is better at equal diversity.

    Writes study.md, study.png and study.json. Stopped, the same command goes on; torchrun shares the work.
    """

    out: Path = Path("docs")
    """Folder for the report."""
    work: Path = Path("build/study")
    """Folder for the pictures."""
    models: Models = field(default_factory=Models)
    settings: OmitArgPrefixes[StudySettings] = field(default_factory=StudySettings)

    def run(self) -> None:
        require_matplotlib()
        data, _ = split(load_emoji(SIZE))
        with joined() as world:
            shown = world.rank == 0 and sys.stderr.isatty()
            sweep(self.settings, self.models, data, self.work, world, progress=shown)
            if world.rank == 0:
                found = measure(self.settings, self.models, data, self.work, world, progress=shown)
                print(write_report(found, self.settings, self.models, self.out))
                print(f"{self.out / 'study.md'} has the plot and the table")
