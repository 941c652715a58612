"""What a person types: ``glide-fast sample | inpaint | vary | upscale | train | draw | judge | …``.

A command is a dataclass whose fields are its options; ``run`` does the work. A user's mistake ends in one
line on stderr and exit status 1 (2 where the command line itself is wrong), never in a traceback.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg, subcommand

from glide_fast import doctor
from glide_fast.cli.edit import Inpaint, Upscale, Vary
from glide_fast.cli.files import Convert, Data, Models
from glide_fast.cli.judge import Draw, Evaluate, Judge
from glide_fast.cli.learn import Plan, Train
from glide_fast.cli.sample import Sample
from glide_fast.cli.study import Study
from glide_fast.compat import run as compat
from glide_fast.training import LostProcessError, NonFiniteLossError


@dataclass(frozen=True)
class Run:
    """Run a script or notebook written for glide-text2im, guided-diffusion, improved-diffusion or CLIP."""

    arguments: Annotated[Positional[tuple[str, ...]], arg(metavar="[--out FOLDER] SCRIPT [ARGS ...]")]
    """The script, and what is handed to it unread."""

    def run(self) -> None:
        compat.main(self.arguments, "glide-fast run")


@dataclass(frozen=True)
class Doctor:
    """Say what this installation can do, and which implementation serves each op, and why."""

    def run(self) -> None:
        print(doctor.examine())


Command = (
    Annotated[Sample, subcommand("sample")]
    | Annotated[Inpaint, subcommand("inpaint")]
    | Annotated[Vary, subcommand("vary")]
    | Annotated[Upscale, subcommand("upscale")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Draw, subcommand("draw")]
    | Annotated[Judge, subcommand("judge")]
    | Annotated[Study, subcommand("study")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Models, subcommand("models")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Run, subcommand("run")]
    | Annotated[Doctor, subcommand("doctor")]
)


def main() -> None:
    """Entry point of the command ``glide-fast``."""
    if sys.argv[1:2] == ["run"]:  # a script's options and errors are its own
        Run(tuple(sys.argv[2:])).run()
        return
    warnings.showwarning = _show_warning
    try:
        command: Command = tyro.cli(
            Command, prog="glide-fast", description="Text to picture: sample, edit, train, judge."
        )
        command.run()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ModuleNotFoundError, NonFiniteLossError, LostProcessError) as error:
        sys.exit(f"glide-fast: {error}")


def _show_warning(message: Warning | str, *_where: Any, **_more: Any) -> None:
    print(f"glide-fast: warning: {message}", file=sys.stderr)
