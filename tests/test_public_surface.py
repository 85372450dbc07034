"""What a user sees of the package: names, signatures, types, and what is said of a keyword that does not exist."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import fastadam
import numpy as np
import pytest

PACKAGE = Path(fastadam.__file__).parent
MODULES = {"fastadam", *(f"fastadam.{name}" for name in ("cuda", "exchange", "reference", "schedules"))}
ADAPTERS = {"fastadam.torch": ["torch"], "fastadam.jax": ["jax"], "fastadam.keras": ["keras"]}
EVERY_MODULE = sorted([*MODULES, *ADAPTERS])


def need(*frameworks):
    for framework in frameworks:
        if importlib.util.find_spec(framework) is None:
            pytest.skip(f"{framework} is not installed")


def load(name):
    need(*ADAPTERS.get(name, []))
    with pytest.MonkeyPatch.context() as patch:  # Keras chooses its backend when it is imported
        patch.setenv("KERAS_BACKEND", "numpy")
        return importlib.import_module(name)


def defined(module):
    """Public functions and classes by name."""
    found = {name: getattr(module, name) for name in module.__all__}
    return {name: value for name, value in found.items() if callable(value)}


# ---- names ---------------------------------------------------------------------------------------------------------


def test_modules_that_are_not_public_have_an_underscore_on_their_way():
    found = {module.name for module in pkgutil.walk_packages(fastadam.__path__, "fastadam.")}
    without = {name for name in found if not any(part.startswith("_") for part in name.split(".")[1:])}
    assert without | {"fastadam"} == MODULES | set(ADAPTERS)


@pytest.mark.parametrize("name", EVERY_MODULE)
def test_dir_shows_the_public_names(name):
    module = load(name)
    lazy = {adapter.partition(".")[2] for adapter in ADAPTERS} if name == "fastadam" else set()
    assert set(module.__all__) <= set(dir(module)) <= set(module.__all__) | lazy
    assert all(hasattr(module, public) for public in module.__all__)


@pytest.mark.parametrize("name", EVERY_MODULE)
def test_public_classes_and_functions_say_that_they_are_of_the_public_module(name):
    assert {key: value.__module__ for key, value in defined(load(name)).items()} == dict.fromkeys(
        defined(load(name)), name
    )


def test_a_pickle_names_the_public_module():
    held = fastadam.Adam(), fastadam.schedules.CosineDecay(0.1, 10), fastadam.LossScaleOptimizer(fastadam.AdamW())
    data = pickle.dumps(held, protocol=0)  # in which modules are in plain text
    assert b"cfastadam\nAdam\n" in data
    assert b"cfastadam.schedules\nCosineDecay\n" in data
    assert b"_core.optimizer" not in data
    assert pickle.loads(data)[1] == held[1]


@pytest.mark.parametrize("name", EVERY_MODULE)
def test_every_public_name_has_a_docstring_with_an_example(name):
    without = {
        key for key, value in defined(load(name)).items() if ">>>" not in (value.__doc__ or "") and not is_state(value)
    }
    assert without <= {"show_config", "register"}


def is_state(value):
    return isinstance(value, type) and issubclass(value, tuple)


# ---- signatures ----------------------------------------------------------------------------------------------------


def signatures(module):
    """Of public functions, constructors and methods."""
    for name, value in defined(module).items():
        yield name, inspect.signature(value)
        if not isinstance(value, type) or is_state(value):
            continue
        for key in dir(value):
            method = inspect.getattr_static(value, key)
            of_package = str(getattr(getattr(value, key, None), "__module__", "")).startswith("fastadam")
            if not key.startswith("_") and callable(getattr(value, key, None)) and of_package:
                yield f"{name}.{key}", inspect.signature(getattr(method, "__func__", method))


@pytest.mark.parametrize("name", EVERY_MODULE)
def test_every_argument_is_in_the_signature(name):
    collected = {
        f"{where}(*{parameter.name})"
        for where, signature in signatures(load(name))
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    assert collected == set()


@pytest.mark.parametrize("cls", [fastadam.Adam, fastadam.AdamW])
def test_the_signature_shows_every_default(cls):
    parameters = inspect.signature(cls).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    opt = cls(**defaults)
    kept = {name: getattr(opt, name) for name in defaults if name != "lr"}
    assert kept == {**{name: default for name, default in defaults.items() if name != "lr"}}
    assert set(opt.get_config()) <= set(parameters)
    assert list(parameters)[:6] == list(inspect.signature(cls.__init__).parameters)[1:7]


def test_adam_and_adamw_have_the_same_arguments():
    adam, adamw = (inspect.signature(cls).parameters for cls in (fastadam.Adam, fastadam.AdamW))
    assert set(adam) == set(adamw)
    differing = {name for name in adam if adam[name].default != adamw[name].default}
    assert differing == {"name", "weight_decay"}
    assert list(adam)[:6] == ["learning_rate", "beta_1", "beta_2", "epsilon", "amsgrad", "name"]  # TensorFlow's
    assert list(adamw)[:3] == ["learning_rate", "weight_decay", "beta_1"]  # Keras's


def test_a_subclass_that_passes_keywords_on_keeps_working():
    class Own(fastadam.Adam):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)

    opt = Own(learning_rate=0.5, clipnorm=1.0)
    again = Own.from_config(opt.get_config())
    assert type(again) is Own
    assert (again.learning_rate, again.clipnorm) == (0.5, 1.0)
    with pytest.raises(TypeError, match="passed to optimizer: clip_norm; did you mean clipnorm?"):
        Own(clip_norm=1.0)


# ---- keywords that do not exist ------------------------------------------------------------------------------------

W = np.zeros(2)
STEP = {"vars": W, "grads": W, "m": W, "v": W, "step": 1}
SUGGESTED = {
    "eps": "epsilon",
    "betas": "beta_1 and beta_2",
    "beta1": "beta_1",
    "b2": "beta_2",
    "clip_norm": "clipnorm",
    "clip_value": "clipvalue",
    "global_clip_norm": "global_clipnorm",
    "weight_decay_rate": "weight_decay",
}
OF_OPTIMIZERS = {
    "lr_schedule": "learning_rate",
    "scheduler": "learning_rate",
    "ema": "use_ema",
    "ema_decay": "ema_momentum",
    "accumulation_steps": "gradient_accumulation_steps",
    "loss_scale": "loss_scale_factor",
    "sparse": "sparse_update",
}
TYPOS = {"learning_rte": "learning_rate", "epsilom": "epsilon", "global_clipnrom": "global_clipnorm"}


def refusal(call, **keywords):
    with pytest.raises(TypeError) as caught:
        call(**keywords)
    assert caught.value.__cause__ is None
    return str(caught.value)


@pytest.mark.parametrize(("keyword", "meant"), [*SUGGESTED.items(), *OF_OPTIMIZERS.items(), *TYPOS.items()])
@pytest.mark.parametrize("cls", [fastadam.Adam, fastadam.AdamW])
def test_an_optimizer_suggests_the_keyword_that_was_meant(cls, keyword, meant):
    text = refusal(cls, **{keyword: 0.5})
    assert text.startswith(f"Unexpected keyword argument passed to optimizer: {keyword}; did you mean {meant}?")


@pytest.mark.parametrize(("keyword", "meant"), [*SUGGESTED.items(), ("lr", "learning_rate"), *TYPOS.items()])
def test_adam_step_suggests_the_keyword_that_was_meant(keyword, meant):
    text = refusal(fastadam.adam_step, **STEP, **{keyword: 0.5})
    assert text.startswith(f"Unexpected keyword argument passed to adam_step: {keyword}; did you mean {meant}?")
    assert not W.any()


@pytest.mark.parametrize(
    ("call", "given", "keyword", "meant"),
    [
        (fastadam.reference.adam_step, {**STEP, "var": W, "grad": W}, "eps", "epsilon"),
        (fastadam.LossScaleOptimizer, {"inner_optimizer": fastadam.Adam()}, "init_scale", "initial_scale"),
        (fastadam.LossScaleOptimizer, {}, "optimizer", "inner_optimizer"),
        (fastadam.schedules.CosineDecay, {"decay_steps": 10}, "learning_rate", "initial_learning_rate"),
        (fastadam.schedules.CosineDecay, {"initial_learning_rate": 0.1}, "T_max", "decay_steps"),
        (fastadam.schedules.CosineDecayRestarts, {"initial_learning_rate": 0.1}, "T_0", "first_decay_steps"),
        (fastadam.schedules.ExponentialDecay, {"initial_learning_rate": 0.1}, "gamma", "decay_rate"),
        (fastadam.schedules.PiecewiseConstantDecay, {"values": [1]}, "milestones", "boundaries"),
        (fastadam.schedules.PolynomialDecay, {"initial_learning_rate": 0.1}, "end_lr", "end_learning_rate"),
        (fastadam.schedules.plot, {"schedule": None, "steps": 3}, "ax", "axes"),
        (fastadam.IndexedSlices, {"values": W, "indices": [0, 1]}, "shape", "dense_shape"),
        (fastadam.Variable, {}, "initial_value", "value"),
        (fastadam.exchange.to_torch_state_dict, {"optimizer": None, "variables": []}, "eps", "epsilon"),
    ],
)
def test_other_constructors_and_functions_do_so_too(call, given, keyword, meant):
    given = {name: value for name, value in given.items() if name in inspect.signature(call).parameters}
    text = refusal(call, **given, **{keyword: 1})
    assert f"passed to {call.__name__ if call is not fastadam.LossScaleOptimizer else 'optimizer'}: {keyword}; " in text
    assert f"did you mean {meant}?" in text


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [
        ("learning_rate", "did you mean lr?"),
        ("beta_1", "did you mean betas?"),
        ("epsilon", "did you mean eps? It is added after the bias correction"),
        ("weight_decay_rate", "did you mean weight_decay?"),
        ("amsgard", "did you mean amsgrad?"),
        ("clipnorm", "torch.nn.utils.clip_grad_norm_"),
        ("clip_value", "torch.nn.utils.clip_grad_value_"),
        ("ema_decay", "torch.optim.swa_utils.AveragedModel"),
    ],
)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_torch_suggests_its_own_names(name, keyword, hint):
    torch = pytest.importorskip("torch")
    adapter = load("fastadam.torch")
    text = refusal(getattr(adapter, name), params=[torch.nn.Parameter(torch.ones(2))], **{keyword: 0.5})
    assert text.startswith(f"Unexpected keyword argument passed to optimizer: {keyword}; ")
    assert hint in text


@pytest.mark.parametrize(
    ("function", "keyword", "hint"),
    [
        ("adam", "lr", "did you mean learning_rate?"),
        ("adam", "beta_1", "did you mean b1?"),
        ("adamw", "betas", "did you mean b1 and b2?"),
        ("scale_by_adam", "epsilon", "did you mean eps?"),
        ("fused_update", "lr", "did you mean learning_rate?"),
        ("fused_update", "clip_norm", "optax.clip_by_global_norm"),
        ("sparse_update", "sparse_update", "did you mean mode?"),
        ("step_arrays", "eps", "did you mean epsilon?"),
        ("init", "amsgard", "did you mean amsgrad?"),
    ],
)
def test_jax_suggests_optax_names(function, keyword, hint):
    pytest.importorskip("jax")
    assert hint in refusal(getattr(load("fastadam.jax"), function), **{keyword: 0.5})


def test_epsilon_comes_with_what_differs_from_pytorch():
    assert refusal(fastadam.Adam, eps=1e-8).endswith("before the bias correction, PyTorch's eps after it.")


def test_a_keyword_like_no_other_gets_no_suggestion():
    assert refusal(fastadam.Adam, qqqq=1) == "Unexpected keyword argument passed to optimizer: qqqq"


def test_other_type_errors_stay_as_they_are():
    with pytest.raises(TypeError, match=r"^amsgrad: 'yes', expected True or False$"):
        fastadam.Adam(amsgrad="yes")
    with pytest.raises(TypeError, match="positional argument"):
        fastadam.Adam(0.1, 0.9, 0.999, 1e-7, False, "Adam", 1.0)


# ---- type checkers -------------------------------------------------------------------------------------------------

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
@pytest.mark.parametrize("tool", ["mypy", "pyright"])
def test_a_type_checker_finds_mistakes_and_nothing_else(tool, tmp_path):
    found, complaints = check(tool, tmp_path)
    assert complaints == []
    assert found == set(BAD)


@pytest.mark.slow
def test_types_are_complete_and_of_public_names_only():
    pytest.importorskip("pyright")
    need("torch", "jax", "keras")  # base classes of an adapter whose framework is absent have no types
    command = [sys.executable, "-m", "pyright", "--verifytypes", "fastadam", "--ignoreexternal", "--outputjson"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
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
