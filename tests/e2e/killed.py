"""The command, ended by SIGKILL at a chosen place: ``python killed.py PLACE ARGUMENTS``.

PLACE is ``LABEL:STEP`` (a training and a step of it), ``write:STEP`` (half-way through writing that checkpoint) or
``evaluate:1`` (the evaluation after training).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    import safetensors.torch

    from filtrun.callbacks import Log
    from filtrun.cli import main as command
    from filtrun.tasks.classify import Classify
    from filtrun.tasks.diffuse import Diffuse

    label, _, number = sys.argv[1].partition(":")
    step = int(number)
    after_step, save_file = Log.after_step, safetensors.torch.save_file

    def dies_after_step(self, run):
        after_step(self, run)
        if (run.label, run.step) == (label, step):
            die()

    def dies_writing(tensors, path, metadata=None):
        save_file(tensors, path, metadata)
        if label == "write" and f"step-{step:09d}" in str(path):
            Path(path).write_bytes(Path(path).read_bytes()[:1000])
            die()

    def dies_evaluating(evaluate):
        def inner(self, run):
            if label == "evaluate" and run.step:
                die()
            return evaluate(self, run)

        return inner

    Log.after_step = dies_after_step
    safetensors.torch.save_file = dies_writing
    for task in (Classify, Diffuse):
        task.evaluate = dies_evaluating(task.evaluate)
    return command(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
