"""Values that NumPy, pybind11 or Python itself refuse in words of their own: the message names the argument.

The programs in tests/fuzz found these kinds.
"""

from __future__ import annotations

import re

import fastadam
import numpy as np
import pytest

F32 = np.float32
W = np.ones(3, F32)


def deep_list():
    values = []
    for _ in range(5000):
        values = [values]
    return values


def dict_of_itself():
    values = {}
    values["a"] = values
    return values


class Interface:
    def __init__(self, **value):
        self.__array_interface__ = {"shape": (3,), "version": 3, **value}


class HugeLength:
    def __len__(self):
        return 2**62

    def __getitem__(self, at):
        return 1.0


class Index:
    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


class Exporter:
    """A DLPack device is a pair of numbers."""

    def __dlpack__(self, **_):
        return 3

    def __dlpack_device__(self):
        return "cpu"


KINDS = {
    "deep list": deep_list,
    "dict of itself": dict_of_itself,
    "int of 5000 digits": lambda: 10**5000,
    "interface without a type": Interface,
    "interface of text": lambda: Interface(typestr="<f4", shape="x"),
    "interface without data": lambda: Interface(typestr="<f4", data=(0, False)),
    "huge length": HugeLength,
    "array of objects": lambda: np.array([None, None]),
    "records": lambda: np.zeros(2, [("a", F32)]),
}
schedules = fastadam.schedules


def set_to(name):
    return lambda value: setattr(fastadam.Adam(), name, value)


def build_own(value):
    fastadam.Adam().add_weight("own", dtype=value)


TAKES = {
    **{name: set_to(name) for name in ("learning_rate", "beta_1", "epsilon", "decay", "clipnorm", "weight_decay")},
    **{name: set_to(name) for name in ("use_ema", "ema_momentum", "amsgrad", "sparse_update", "iterations")},
    "threads": lambda value: fastadam.Adam().begin_step(threads=value),
    "zero_grads": lambda value: fastadam.Adam().apply_gradients([(W, W.copy())], zero_grads=value),
    "seed": lambda value: fastadam.Adam(seed=value),
    "name": lambda value: fastadam.Adam(name=value),
    "var_names": lambda value: fastadam.Adam().exclude_from_weight_decay(var_names=[value]),
    "custom_objects": lambda value: schedules.deserialize({"class_name": "x", "config": {}}, value),
    "decay_steps": lambda value: schedules.CosineDecay(0.1, value),
    "step": lambda value: schedules.CosineDecay(0.1, 10)(value),
    "values": lambda value: schedules.PiecewiseConstantDecay([1], value),
    "axes": lambda value: schedules.plot(lambda step: 0.1, 3, value),
    "prefix": lambda value: fastadam.Telemetry(["a"], np.ones((1, 6))).to_dict(value),
    "dtype": build_own,
    "path": lambda value: fastadam.exchange.read_keras3_file(value),
    "var": lambda value: fastadam.reference.adam_step(value, 1, 0, 0, step=1),
    "loss": lambda value: fastadam.LossScaleOptimizer(fastadam.Adam()).scale_loss(value),
    "indices": lambda value: fastadam.IndexedSlices(np.ones((2, 2)), value),
    "grads[0]": lambda value: fastadam.global_norm([value]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TAKES)
def test_a_value_that_cannot_be_read_is_refused_by_the_name_of_its_argument(name, kind):
    value = KINDS[kind]()
    with pytest.raises((TypeError, ValueError, MemoryError, OverflowError, AttributeError)) as refusal:
        TAKES[name](value)
    assert not isinstance(refusal.value, (AttributeError, RecursionError))
    assert re.search(rf"\b{re.escape(name)}", str(refusal.value)), refusal.value


@pytest.mark.parametrize(
    "call",
    [
        lambda value: fastadam.Adam.from_config({}, value),
        lambda value: fastadam.LossScaleOptimizer.from_config({}, value),
        lambda value: fastadam.Adam.load("unused", [], value),
        lambda value: fastadam.LossScaleOptimizer.load("unused", [], value),
        lambda value: schedules.deserialize({}, value),
    ],
)
def test_classes_by_name_come_in_a_dict(call):
    with pytest.raises(TypeError, match="custom_objects: list, expected a dict of classes by name"):
        call([fastadam.Adam])


@pytest.mark.parametrize("config", [3, [1], {1: 2}])
def test_the_configuration_of_a_schedule_is_a_dict_with_names(config):
    with pytest.raises(TypeError, match="config: .*, expected a dict as get_config gives it"):
        schedules.CosineDecay.from_config(config)


@pytest.mark.parametrize("threads", [1025, 2**62, Index(1025)])
@pytest.mark.parametrize("wrap", [lambda o: o, fastadam.LossScaleOptimizer])
def test_a_step_in_buckets_takes_no_more_threads_than_the_library(threads, wrap):
    optimizer = fastadam.Adam()
    with pytest.raises(ValueError, match="threads: .*, expected an integer from 1 to 1024"):
        wrap(optimizer).begin_step(threads=threads)
    optimizer.begin_step(threads=Index(1))  # no step is open
    optimizer.abort_step()


@pytest.mark.parametrize("value", [1.5, "1"])
def test_an_index_that_is_no_integer_is_refused(value):
    with pytest.raises(TypeError, match="threads: "):
        fastadam.Adam().begin_step(threads=Index(value))


def test_a_name_that_no_message_could_show_is_refused():
    for name in ("\udcff", "w\ud800"):
        with pytest.raises(ValueError, match="name: .*, expected a string that UTF-8 can encode"):
            fastadam.Variable(W, name)
        variable = fastadam.Variable(W.copy(), "\u03b8")
        with pytest.raises(ValueError, match="name: "):
            variable.name = name
        assert variable.name == "\u03b8"


def test_metadata_of_another_type_is_refused_without_types_of_cpp():
    for call in (fastadam.Adam().sync, fastadam.Variable(W.copy()).assign):
        with pytest.raises(
            ValueError, match="with invalid metadata, expected values of the types that DLPack"
        ) as found:
            call(Exporter())
        assert "C++" not in str(found.value)


def test_gather_calls_its_argument_by_its_name():
    table = np.ones((3, 2), F32)
    with pytest.raises(TypeError, match="indices: dtype bool, expected integers"):
        fastadam.Adam().gather(table, np.array([True]))


def test_a_shape_that_no_memory_holds_is_refused_by_name():
    with pytest.raises((MemoryError, ValueError), match="shape: "):
        fastadam.Adam().add_weight("own", (2**40, 2**20))


def test_a_negative_length_of_a_weight_is_refused_by_name():
    with pytest.raises(ValueError, match=r"shape: \(2, -1\), expected no negative length"):
        fastadam.Adam().add_weight("own", (2, -1))


@pytest.mark.parametrize(("argument", "value"), [("step", "1"), ("beta_1", [0.9]), ("grad", np.ones(2)), ("m", "x")])
def test_the_reference_names_its_arguments(argument, value):
    given = {"var": W, "grad": W, "m": W, "v": W, "step": 1} | {argument: value}
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: "):
        fastadam.reference.adam_step(**given)
