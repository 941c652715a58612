"""Peak memory of inference, measured where nothing else is: in a process of its own.

python -m bench.memory --who ours --model glide-base --steps 2

prints one line of JSON. The peak is that of the whole process, interpreter and libraries included, and so
what the machine must have.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.networks import TextStep, small, text_step
from glide_fast.models.presets import preset

SIDES = ("ours", "ours, low memory", "upstream")
BATCH = 2  # classifier-free guidance of one picture
_STATUS = Path("/proc/self/status")


class Peak(NamedTuple):
    """Bytes of a process at its worst, and of the network's weights in float32."""

    peak: int
    weights: int

    @property
    def in_weights(self) -> float:
        """The peak in units of the weights."""
        return self.peak / self.weights


def measure(who: str, *, model: str = "glide-base", quick: bool = False, steps: int = 2) -> Peak:
    """Run some steps of the model in a new process.

    Raises:
        RuntimeError: the process fails; its last words are in the message.
    """
    command = [sys.executable, "-m", "bench.memory", "--who", who, "--model", model, "--steps", str(steps)]
    command += ["--threads", str(torch.get_num_threads()), *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr[-1000:]}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def peak_bytes() -> int:
    """The most memory that this process has had.

    Linux' ``ru_maxrss`` begins with what the process that started this one had; its own status does not.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Run the steps and print the peak."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory")
    parser.add_argument("--who", choices=SIDES, required=True)
    parser.add_argument("--model", default="glide-base")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = preset(options.model).unet
    config = small(config, size=32) if options.quick else config
    run: Callable[[], Any]
    if options.who == "upstream":
        subject = text_step(config, BATCH, "low")
        run, network = subject.plain.call, subject.plain.module
    else:  # without the twin, whose construction takes memory too
        step = TextStep(config, BATCH, "full" if options.who == "ours" else "low")
        run, network = step.ours, step.network
    for _ in range(options.steps):
        run()
    weights = sum(4 * parameter.numel() for parameter in network.parameters())
    peak = peak_bytes()
    print(json.dumps(Peak(peak, weights)._asdict()))


if __name__ == "__main__":
    main()
