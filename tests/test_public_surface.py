"""What a user sees of the package: names, signatures, types, and what is said of a keyword that does not exist."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil

import fastadam
import numpy as np
import pytest
from absent import need

MODULES = {"fastadam", *(f"fastadam.{name}" for name in ("cuda", "exchange", "reference", "schedules"))}
ADAPTERS = {"fastadam.torch": ["torch"], "fastadam.jax": ["jax"], "fastadam.keras": ["keras"]}
EVERY_MODULE = sorted([*MODULES, *ADAPTERS])


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
    kept = {name: getattr(opt, name) for name in defaults if name not in ("lr", "telemetry")}  # the last is a method
    assert kept == {name: default for name, default in defaults.items() if name in kept}
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
        ("max_grad_norm", "did you mean global_clipnorm?"),
        ("clip_value", "did you mean clipvalue?"),
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
