"""A training that writes files, and what must be in them: for the programs that kill it or fill the disk."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import campaign  # noqa: F401  (the path of the tests' helpers)
import fastadam
import numpy as np
from delta_cases import Training

KINDS = ("save", "save_delta", "merge_deltas", "rebase")
STEPS = {"save": 1, "save_delta": 1, "merge_deltas": 1, "rebase": 2}


class Files:
    """A training three steps old, and its base file in a folder."""

    def __init__(self, folder: Path, training: Training | None = None) -> None:
        self.folder, self.base = folder, folder / "base"
        self.training = new_training() if training is None else training
        if training is None:
            self.training.steps(3)
            self.training.optimizer.save(self.base, values=True)

    def write(self, kind: str) -> None:
        """Make a step or two, and bring the files up to date."""
        optimizer = self.training.optimizer
        self.training.steps(1)
        if kind == "save":
            optimizer.save(self.base, values=True)
            return
        optimizer.save_delta(self.folder / f"delta_{self.training.time:07d}")
        if kind == "merge_deltas":
            fastadam.merge_deltas(self.base, self._read()[1], self.base)
        elif kind == "rebase":
            self.training.steps(1)
            optimizer.save(self.base, values=True)
        if kind != "save_delta":
            for delta in self.deltas():
                delta.unlink()

    def deltas(self) -> list[Path]:
        return sorted(self.folder.glob("delta_*"))

    def load(self) -> Files:
        """A training that goes on from the files. Those that others have replaced are removed."""
        return Files(self.folder, self._read()[0])

    def _read(self) -> tuple[Training, list[Path]]:
        deltas = self.deltas()
        while True:
            try:
                training = self.training.load(self.base, deltas)
                training.time = int(training.optimizer.iterations)
                return training, deltas
            except ValueError as error:
                place = re.match(r"deltas\[(\d+)\]: ", str(error))
                if place is None:
                    raise
                if "expected one of the two: the later one" in str(error):  # the call of the earlier one has failed
                    deltas.pop(int(place[1]) - 1).unlink()
                elif place[1] == "0" and any(text in str(error) for text in ("another base", "once more", "is older")):
                    deltas.pop(0).unlink()  # a base that was written later has all that is in it
                else:
                    raise


class Truth:
    """The state after each number of steps of a training that was never interrupted."""

    def __init__(self) -> None:
        self._training, self._states = new_training(), {}

    def check(self, training: Training) -> None:
        """The training has the bits of as many steps as it counts."""
        while self._training.time < training.time:
            self._training.steps(1)
            self._states[self._training.time] = state_of(self._training)
        for found, expected in zip(state_of(training), self._states[training.time], strict=True):
            assert found.dtype == expected.dtype
            assert found.tobytes() == expected.tobytes(), f"the files are not those of step {training.time}"


def new_training() -> Training:
    return Training(width=(64,), sparse_update="deferred")


def state_of(training: Training) -> list[np.ndarray]:
    training.optimizer.sync()
    return [*(np.array(w) for w in training.variables), *training.optimizer.get_weights()]


def lines_of_saving(at_line):
    """A trace function that calls ``at_line`` before each line of Python of the code that writes files."""

    def trace(frame, event, _argument):
        name = frame.f_code.co_filename
        if "fastadam" not in name or not ("saving" in name or name.endswith("files.py")):
            return None
        if event == "line":
            at_line()
        return trace

    return trace


def count_lines(call) -> int:
    counted = []
    sys.settrace(lines_of_saving(lambda: counted.append(1)))
    try:
        call()
    finally:
        sys.settrace(None)
    return len(counted)
