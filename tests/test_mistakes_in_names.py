"""Mistakes in names: attributes that an optimizer does not have, methods of the class, files of other formats."""

from __future__ import annotations

import re

import fastadam
import numpy as np
import pytest
from helpers import ones, run_python, step_by_half

# ---- class methods on an instance -----------------------------------------------------------------------------------


class Own(fastadam.Adam):
    """A user's class."""


MAKERS = {
    "Adam": fastadam.Adam,
    "AdamW": fastadam.AdamW,
    "LossScaleOptimizer": lambda: fastadam.LossScaleOptimizer(fastadam.Adam()),
    "Own": Own,
}


@pytest.mark.parametrize("name", MAKERS)
def test_load_and_from_config_on_an_instance_say_what_to_write(name, tmp_path):
    optimizer = MAKERS[name]()
    optimizer.save(tmp_path / "state")
    prefix = "" if name == "Own" else "fastadam."
    with pytest.raises(TypeError, match=re.escape(f"opt = {prefix}{name}.load(path, variables)")):
        optimizer.load(tmp_path / "state", [])
    with pytest.raises(TypeError, match=re.escape(f"opt = {prefix}{name}.from_config(config)")):
        optimizer.from_config(optimizer.get_config())
    cls = type(optimizer)
    assert type(cls.load(tmp_path / "state", [])) is cls
    assert type(cls.from_config(optimizer.get_config())) is cls
    assert hasattr(optimizer, "load")  # what lists members asks


def test_a_subclass_extends_from_config_as_ever():
    class Extended(fastadam.Adam):
        @classmethod
        def from_config(cls, config, custom_objects=None):
            return super().from_config({**config, "learning_rate": 0.5}, custom_objects)

    assert Extended.from_config(fastadam.Adam().get_config()).learning_rate == 0.5


# ---- attributes -----------------------------------------------------------------------------------------------------

MISTYPED = {
    "learning_rte": "learning_rate",
    "beta1": "beta_1",
    "global_clipnrom": "global_clipnorm",
    "weight_decai": "weight_decay",
    "amsgrd": "amsgrad",
    "iteration": "iterations",
    "sparse_updates": "sparse_update",
}


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "Own"])
@pytest.mark.parametrize("mistyped", MISTYPED)
def test_an_unknown_attribute_is_not_set(name, mistyped):
    optimizer = MAKERS[name]()
    message = f"'{name}' object has no attribute '{mistyped}'; did you mean '{MISTYPED[mistyped]}'?"
    with pytest.raises(AttributeError, match=re.escape(message)):
        setattr(optimizer, mistyped, 1)
    assert not hasattr(optimizer, mistyped)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "Own"])
def test_an_attribute_like_none_is_refused_without_a_guess(name):
    optimizer = MAKERS[name]()
    with pytest.raises(AttributeError, match=r"has no attribute 'xyzzy'$"):
        optimizer.xyzzy = 1


@pytest.mark.parametrize("maker", ["Adam()", "AdamW()", "LossScaleOptimizer(fastadam.Adam())"])
def test_an_unknown_attribute_that_is_read_suggests_the_right_one(maker):
    """Of an Adam Python does so itself: its own way would make every step slower."""
    result = run_python(f"import fastadam; fastadam.{maker}.learning_rte")
    name = maker.partition("(")[0]
    assert re.search(f"'{name}' object has no attribute 'learning_rte'.*mean:? 'learning_rate'\\?", result.stderr)


def test_the_scale_of_a_loss_scale_optimizer_is_suggested_too():
    optimizer = fastadam.LossScaleOptimizer(fastadam.Adam())
    for mistyped in ("dynamic_scal", "dynamic_growth_step"):
        with pytest.raises(AttributeError, match="did you mean 'dynamic_"):
            setattr(optimizer, mistyped, 4.0)
        with pytest.raises(AttributeError, match="did you mean 'dynamic_"):
            getattr(optimizer, mistyped)


@pytest.mark.parametrize("name", MAKERS)
def test_every_attribute_that_there_is_can_be_set(name):
    optimizer = MAKERS[name]()
    values = {"learning_rate": 0.5, "lr": 0.25, "beta_1": 0.5, "epsilon": 1e-3, "decay": 0.1, "amsgrad": True}
    values |= {"clipnorm": 1.0, "clipvalue": 2.0, "weight_decay": 0.1, "use_ema": True, "iterations": 3, "name": "mine"}
    for key, value in values.items():
        setattr(optimizer, key, value)
        assert getattr(optimizer, key) == value
    optimizer.apply_gradients = lambda pairs: "replaced"  # by whoever watches calls
    assert optimizer.apply_gradients([]) == "replaced"


@pytest.mark.parametrize(
    "use",
    [
        lambda optimizer: optimizer.apply_gradients([(np.ones(2), np.ones(2))]),
        lambda optimizer: optimizer.iterations,
        lambda optimizer: optimizer.build([np.ones(2)]),
        lambda optimizer: setattr(optimizer, "learning_rate", 0.1),
        lambda optimizer: optimizer.save("never"),
    ],
)
def test_a_subclass_without_the_init_of_its_class_is_told_so(use):
    class Forgetful(fastadam.Adam):
        def __init__(self):
            pass

    with pytest.raises(
        AttributeError, match=r"^__init__ of the optimizer has not run, expected super\(\).__init__\(\)"
    ):
        use(Forgetful())


def test_subclasses_keep_attributes_of_their_own():
    class Three(fastadam.Adam):
        def __init__(self, beta_3=0.5, **kwargs):
            self.before = True
            super().__init__(**kwargs)
            self.beta_3 = beta_3

    class Counting(fastadam.LossScaleOptimizer):
        def __init__(self, inner):
            self.before = True
            super().__init__(inner)
            self.seen = 0

    optimizer = Three(0.25)
    optimizer.beta_3 += 0.5
    optimizer.anything = 1
    assert (optimizer.beta_3, optimizer.anything, optimizer.before) == (0.75, 1, True)
    scaled = Counting(optimizer)
    scaled.seen += 1
    scaled.beta_3 = 0.1
    assert (scaled.seen, scaled.before, optimizer.beta_3, hasattr(optimizer, "seen")) == (1, True, 0.1, False)


def test_variables_and_slices_refuse_unknown_attributes():
    w, gradient = fastadam.Variable(ones(3)), fastadam.IndexedSlices(ones(1, 3), [0])
    with pytest.raises(AttributeError, match="no attribute 'nam'; did you mean 'name'"):
        w.nam = "w"
    with pytest.raises(AttributeError, match="no attribute 'indexes'"):
        gradient.indexes = [1]
    w.name, gradient.indices = "w", np.array([1])
    with pytest.raises(AttributeError, match=r"^value: .* expected assign\(new\)"):
        w.value = ones(3)


def test_a_variable_changes_in_place():
    array = np.array([4.0, 8.0])
    w = same = fastadam.Variable(array)
    w += 4
    w -= [0.0, 4.0]
    w *= fastadam.Variable([0.5, 0.5])
    w /= 2.0
    assert w is same
    assert array.tolist() == [2.0, 2.0]


def test_in_a_loss_such_an_operator_makes_a_new_array(provider):
    w = fastadam.Variable([1.0, 2.0])

    def loss():
        x = w
        x *= 3.0
        return x.sum()

    (found,) = fastadam.Adam().get_gradients(loss, w, gradient=provider.name)
    assert (found.tolist(), w.value.tolist()) == ([3.0, 3.0], [1.0, 2.0])


def test_options_of_torchs_groups_are_no_attributes():
    torch = pytest.importorskip("torch")
    import fastadam.torch

    optimizer = fastadam.torch.AdamW([torch.nn.Parameter(torch.ones(2))])
    for name in ("lr", "learning_rate", "betas", "eps", "weight_decay", "amsgrad", "maximize"):
        with pytest.raises(AttributeError, match=rf"'AdamW' object has no attribute '{name}', expected group\['"):
            setattr(optimizer, name, 0.5)
        assert not hasattr(optimizer, name)


# ---- files ----------------------------------------------------------------------------------------------------------

OTHER_FORMATS = [".npz", ".npy", ".pt", ".pth", ".pkl", ".pickle", ".h5", ".hdf5", ".keras", ".json", ".ckpt", ".zip"]


@pytest.mark.parametrize("scaled", [False, True], ids=["Adam", "LossScaleOptimizer"])
@pytest.mark.parametrize("suffix", [*OTHER_FORMATS, ".bin", ".NPZ"])
def test_a_file_is_not_named_like_one_of_another_format(suffix, scaled, tmp_path):
    optimizer = fastadam.LossScaleOptimizer(fastadam.Adam()) if scaled else fastadam.Adam()
    for path in (tmp_path / f"adam{suffix}", str(tmp_path / f"adam{suffix}")):
        with pytest.raises(ValueError, match=rf"^path: '.*adam{suffix}'.*expected adam\.safetensors"):
            optimizer.save(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["adam.safetensors", "adam", "adam.fastadam", "adam.v1.5", ".npz", "npz", "adam.state"]
)
def test_other_names_are_free(name, tmp_path):
    fastadam.Adam(0.5).save(tmp_path / name)
    assert fastadam.Adam.load(tmp_path / name, []).learning_rate == 0.5


def numpy_archive(path):
    with path.open("wb") as file:
        np.savez(file, w=ones(3))


def numpy_array(path):
    with path.open("wb") as file:
        np.save(file, ones(3))


def a_pickle(path):
    import pickle

    path.write_bytes(pickle.dumps({"w": 1}))


def of_torch(path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(3)}, path)


def of_hdf5(path):
    h5py = pytest.importorskip("h5py")
    h5py.File(path, "w").close()


FORMATS = {
    "a zip archive": [numpy_archive, of_torch],
    "a NumPy array": [numpy_array],
    "a pickle": [a_pickle],
    "HDF5": [of_hdf5],
    "JSON": [lambda path: path.write_text('{"learning_rate": 0.1}')],
}


@pytest.mark.parametrize(("text", "write"), [(text, write) for text, all_ in FORMATS.items() for write in all_])
def test_a_file_of_another_format_is_called_by_its_name(text, write, tmp_path):
    write(tmp_path / "file")
    with pytest.raises(
        ValueError, match=f"file: a file of another format, {text}.*, expected a file that `save` wrote"
    ):
        fastadam.Adam.load(tmp_path / "file", [])


def test_a_cut_file_is_not_taken_for_another_format(tmp_path):
    optimizer, w = fastadam.Adam(), ones(3)
    step_by_half(optimizer, w)
    optimizer.save(tmp_path / "state")
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:-5])
    with pytest.raises(ValueError, match="state: not a complete safetensors file"):
        fastadam.Adam.load(tmp_path / "state", [w])
