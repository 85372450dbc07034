"""What a type checker finds in a user's program, and what it knows of the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fastadam
import pytest
from absent import need
from helpers import weekly
from test_public_surface import EVERY_MODULE

PACKAGE = Path(fastadam.__file__).parent

GOOD = """
from __future__ import annotations

from typing import Any

import fastadam
import numpy as np
import numpy.typing as npt


class Warmup(fastadam.schedules.LearningRateSchedule):
    def __call__(self, step: int) -> float:
        return 0.1 * min(1.0, (step + 1) / 100)


class Own(fastadam.Adam):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


def train(w: npt.NDArray[np.float32], table: fastadam.Variable) -> float:
    rate = np.float32(0.1)
    opt = fastadam.Adam(rate, clipnorm=1, sparse_update="deferred", max_staleness=10)
    opt.learning_rate *= 0.5
    opt.learning_rate = Warmup()
    opt.beta_1 = lambda: 0.8
    opt.clipvalue = None
    opt.sparse_update = "lazy"
    rows = fastadam.IndexedSlices(np.ones((1, 2)), [0], dense_shape=table.shape)
    opt.apply_gradients([(w * 2, w), (rows, table), (None, w), ([0.5, 0.5], w)])
    opt.apply_gradients(zip([w], [w]))
    opt.minimize(lambda: (table.value**2).sum(), [table], gradient="torch")
    opt.minimize(lambda: 1.0, {"a": [table]}, gradient=lambda loss, variables: [2 * v.value for v in variables])
    again: Own = Own.from_config(opt.get_config())
    other: fastadam.AdamW = fastadam.AdamW.load("a.safetensors", [w, table])
    scaled = fastadam.LossScaleOptimizer(other, initial_scale=2.0**10)
    scaled.apply_gradients([(w, w)])
    fastadam.exchange.from_keras_weights(again, [1, w, w], [w])
    fastadam.adam_step([w, w], [w, w], [w, w], [w, w], step=1, sparse_update="lazy")
    fastadam.adam_step(w, [0.5, 0.5], w, w, step=1)
    fastadam.global_norm([w, None, rows])
    return opt.beta_1 * opt.epsilon + again.decay + scaled.dynamic_scale
"""
BAD = {
    "a mistyped keyword": "fastadam.Adam(global_clipnrom=1.0)",
    "a mistyped keyword of AdamW": "fastadam.AdamW(wieght_decay=1.0)",
    "a mode that does not exist": 'fastadam.Adam(sparse_update="defered")',
    "a mode set later": 'fastadam.Adam().sparse_update = "defered"',
    "a mode that needs an optimizer": 'fastadam.adam_step(w, w, w, w, step=1, sparse_update="deferred")',
    "a keyword of adam_step": "fastadam.adam_step(w, w, w, w, step=1, lr=0.1)",
    "a missing step": "fastadam.adam_step(w, w, w, w)",
    "a schedule's class": "fastadam.Adam(fastadam.schedules.CosineDecay)",
    "a function of the step": "fastadam.Adam(lambda step: 0.1)",
    "a schedule's keyword": "fastadam.schedules.CosineDecay(0.1, total_steps=5)",
    "a provider": 'fastadam.set_gradient_provider("tensorflow")',
    "a flag as text": 'fastadam.Adam(amsgrad="yes")',
    "variables alone": "fastadam.Adam().apply_gradients([w])",
    "an attribute that does not exist": "fastadam.Adam().learning_rte",
}


def check(tool, folder):
    """The lines of ``bad.py`` that a checker complains of, and everything that it says of ``good.py``."""
    pytest.importorskip(tool)  # of the dependency group "lint"
    (folder / "good.py").write_text(GOOD)
    header = "import fastadam\nimport numpy as np\n\nw = np.zeros(2)\n"
    (folder / "bad.py").write_text(header + "".join(f"{line}\n" for line in BAD.values()))
    source = PACKAGE.parent
    environment = {**os.environ, "PYTHONPATH": str(source)}
    if source.name == "site-packages":
        del environment["PYTHONPATH"]
    elif tool == "mypy":
        environment["MYPYPATH"] = str(source)
    options = {
        "mypy": ["--strict", "--follow-imports=silent", "--no-error-summary", "--show-absolute-path"],
        "pyright": ["--pythonpath", sys.executable],
    }[tool]
    command = [sys.executable, "-m", tool, *options, "good.py", "bad.py"]
    output = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in output.stdout.splitlines()]
    found = {int(line.split("bad.py:")[1].split(":")[0]) for line in lines if "bad.py:" in line}
    first = header.count("\n") + 1
    return {name for i, name in enumerate(BAD) if first + i in found}, [line for line in lines if "good.py:" in line]


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["pyright", *weekly("mypy")])
def test_a_type_checker_finds_mistakes_and_nothing_else(tool, tmp_path):
    found, complaints = check(tool, tmp_path)
    assert complaints == []
    assert found == set(BAD)


@pytest.mark.slow
def test_types_are_complete_and_of_public_names_only():
    pytest.importorskip("pyright")
    need("torch", "jax", "keras")  # base classes of an adapter whose framework is absent have no types
    command = [
        sys.executable,
        "-m",
        "pyright",
        "--pythonpath",
        sys.executable,
        "--verifytypes",
        "fastadam",
        "--ignoreexternal",
        "--outputjson",
    ]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # whose `python` has torch
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PATH": path}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout
    report = json.loads(output)["typeCompleteness"]
    incomplete = [symbol["name"] for symbol in report["symbols"] if not symbol["isTypeKnown"]]
    assert report["completenessScore"] >= 0.99, incomplete
    exported = {symbol["name"] for symbol in report["symbols"] if symbol["isExported"]}
    assert "fastadam.Adam" in exported
    public = {f"{name}.{key}" for name in EVERY_MODULE for key in [*names_in(name), "__dir__", "__getattr__"]}
    public |= set(EVERY_MODULE)
    assert exported - public == {"fastadam.__main__.main"}


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()


def names_in(module):
    """``__all__``, without importing what may not be installed."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    namespace = {}
    exec("__all__ = [" + source.split("__all__ = [")[1].split("]")[0] + "]", namespace)
    return namespace["__all__"]
