"""Recipes for .keras files: those of fastadam.keras with it, with Keras alone, and Keras's files as ours."""

from __future__ import annotations

import json
import zipfile

import pytest
from absent import need, printed

KINDS = ("Adam", "AdamW")

COMMON = """
import json, keras, numpy as np

def train(model):
    gradients = [keras.ops.convert_to_tensor(np.full(v.shape, 0.5, "float32")) for v in model.trainable_variables]
    model.optimizer.apply(gradients, model.trainable_variables)
    return model

def state(model):
    return [keras.ops.convert_to_numpy(v).tolist() for v in [*model.weights, *model.optimizer.variables]]

def describe(model):
    optimizer = type(model.optimizer)
    return [optimizer.__module__.split(".")[0], optimizer.__name__, state(model), int(train(model).optimizer.iterations)]
"""

MADE = f"""
{COMMON}
import fastadam.keras

made = {{}}
for name, library in (("ours", fastadam.keras), ("theirs", keras.optimizers)):
    for kind in {KINDS}:
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
        model.compile(optimizer=getattr(library, kind)(0.0625, amsgrad=True), loss="mse")
        train(train(train(model))).save(f"{{name}}-{{kind}}.keras")
        made[f"{{name}}-{{kind}}"] = state(model)
print(json.dumps(made))
"""

WITH_FASTADAM = f"""
{COMMON}
import fastadam.keras

found = {{}}
for kind in {KINDS}:
    model = keras.models.load_model(f"ours-{{kind}}.keras")
    found[f"ours-{{kind}}"] = describe(model)
    model = keras.models.load_model(f"theirs-{{kind}}.keras")
    model.compile(optimizer=getattr(fastadam.keras, kind).from_optimizer(model.optimizer), loss="mse")
    found[f"theirs-{{kind}}"] = describe(model)
print(json.dumps(found))
"""

WITH_KERAS_ALONE = f"""
{COMMON}
found = {{}}
for kind in {KINDS}:
    try:
        keras.models.load_model(f"ours-{{kind}}.keras")
    except TypeError as error:
        assert "'module': 'fastadam.keras'" in str(error), error  # what to import
    taker = getattr(keras.optimizers, kind)
    model = keras.models.load_model(f"ours-{{kind}}.keras", custom_objects={{f"fastadam>{{kind}}": taker}})
    found[f"ours-{{kind}}"] = describe(model)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_files_go_between_fastadam_and_keras(tmp_path, monkeypatch):
    need("keras", "h5py")
    monkeypatch.chdir(tmp_path)
    made = json.loads(printed(MADE, KERAS_BACKEND="numpy"))
    for kind in KINDS:
        with zipfile.ZipFile(f"ours-{kind}.keras") as archive:
            saved = json.loads(archive.read("config.json"))["compile_config"]["optimizer"]
        named = [saved[key] for key in ("module", "class_name", "registered_name")]
        assert named == ["fastadam.keras", kind, f"fastadam>{kind}"]

    found = json.loads(printed(WITH_FASTADAM, KERAS_BACKEND="numpy"))
    assert found == {name: ["fastadam", name.split("-")[1], state, 4] for name, state in made.items()}
    found = json.loads(printed(WITH_KERAS_ALONE, ["fastadam"], KERAS_BACKEND="numpy"))
    assert found == {f"ours-{kind}": ["keras", kind, made[f"ours-{kind}"], 4] for kind in KINDS}
