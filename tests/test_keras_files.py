"""Recipes for .keras files: those of fastadam.keras with it, without it and before it is imported, and Keras's as ours."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
from test_doors import need, printed

BACKENDS = ["torch", "jax"]

# A model that has trained, in a file; `state` is what has to be there again.
MODEL = """
import keras, numpy as np
import {library}

def state(model):
    return [float(np.sum(keras.ops.convert_to_numpy(v))) for v in [*model.weights, *model.optimizer.variables]]

x, y = np.linspace(-1, 1, 24, dtype="float32").reshape(8, 3), np.ones((8, 1), "float32")
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
model.compile(optimizer={library}.{kind}(0.0625), loss="mse")
model.fit(x, y, epochs=3, verbose=0)
model.save("model.keras")
"""
STATE = MODEL[MODEL.index("def state") : MODEL.index("model = ")]
GOES_ON = """
print(type(model.optimizer).__module__.split(".")[0], type(model.optimizer).__name__, int(model.optimizer.iterations))
print(*state(model))
model.fit(x, y, epochs=1, verbose=0)
print(int(model.optimizer.iterations))
"""


@pytest.fixture(params=["Adam", "AdamW"])
def kind(request):
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request):
    need("keras", "h5py", request.param)
    return request.param


def made(library, kind, backend):
    return [float(word) for word in printed(MODEL.format(library=library, kind=kind) + "print(*state(model))", KERAS_BACKEND=backend).split()]  # fmt: skip


def loaded(lines, backend, absent=()):
    first, numbers, count = printed(lines + GOES_ON, absent, KERAS_BACKEND=backend).splitlines()
    return first, [float(word) for word in numbers.split()], int(count)


def test_files_go_between_fastadam_and_keras(kind, backend, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = made("fastadam.keras", kind, backend)
    with zipfile.ZipFile("model.keras") as archive:
        saved = json.loads(archive.read("config.json"))["compile_config"]["optimizer"]
    assert (saved["module"], saved["class_name"], saved["registered_name"]) == (
        "fastadam.keras",
        kind,
        f"fastadam>{kind}",
    )

    # With fastadam.keras.
    first, numbers, count = loaded(
        f"import keras, fastadam.keras, numpy as np\n{STATE}\nmodel = keras.models.load_model('model.keras')", backend
    )
    assert (first, numbers, count) == (f"fastadam {kind} 3", ours, 4)

    # With Keras alone; a plain load names the class that is missing.
    plain = f"""
import keras, numpy as np
{STATE}
try:
    keras.models.load_model("model.keras")
except TypeError as error:
    assert "'module': 'fastadam.keras'" in str(error), error
model = keras.models.load_model("model.keras", custom_objects={{"fastadam>{kind}": keras.optimizers.{kind}}})
"""
    first, numbers, count = loaded(plain, backend, ["fastadam"])
    assert (first, numbers, count) == (f"keras {kind} 3", ours, 4)

    # Keras's as ours.
    theirs = made("keras.optimizers", kind, backend)
    lines = f"""
import keras, fastadam.keras, numpy as np
{STATE}
model = keras.models.load_model("model.keras")
model.compile(optimizer=fastadam.keras.{kind}.from_optimizer(model.optimizer), loss="mse")
"""
    first, numbers, count = loaded(lines, backend)
    assert (first, count) == (f"fastadam {kind} 3", 4)
    np.testing.assert_array_equal(numbers, theirs)
