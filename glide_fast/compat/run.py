"""Run an unmodified script or notebook of the original projects: ``glide-fast run SCRIPT [ARGS...]``.

    glide-fast run scripts/image_sample.py --model_path model.pt --num_samples 4
    python -m glide_fast.compat notebooks/text2im.ipynb

Their package names are taken from us (:mod:`glide_fast.compat.aliases`). A script runs as ``python SCRIPT``
would run it, and its errors and exit status are its own.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from glide_fast.compat.aliases import projects
from glide_fast.compat.distributed import replicas_on_cpu
from glide_fast.compat.notebook import code_cells, run_notebook

__all__ = ["main", "run"]


def run(script: Path, arguments: Sequence[str] = (), out: Path | None = None) -> None:
    """Run a .py script or an .ipynb notebook with ``arguments`` as its command line.

    Pictures that a notebook displays are written to the folder ``out``, by default the working one.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not script.is_file():
        raise FileNotFoundError(f"no script {script}")
    before = sys.argv, sys.path[:]
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        with projects(), replicas_on_cpu():
            if script.suffix == ".ipynb":
                run_notebook(script, (out or Path.cwd()).resolve())
            else:
                runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before


def main(arguments: Sequence[str], program: str) -> None:
    """The command line: options, the script, and what is handed to it unread."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Run a script or notebook written for glide-text2im, guided-diffusion, "
        "improved-diffusion or CLIP, unmodified, on glide_fast.",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder for a notebook's pictures; default: this one"
    )
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="a .py file or an .ipynb notebook")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="the script's own")
    options = parser.parse_args(arguments)
    if not options.script.is_file():
        parser.error(f"no script {options.script}; give the path of a .py or .ipynb file")
    if options.script.suffix == ".ipynb":
        try:
            code_cells(options.script)
        except ValueError as error:
            parser.error(str(error))
    run(options.script, options.arguments, options.out)
