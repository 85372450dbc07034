"""Ask Keras 3 for the state of its Adam half way, and for what it makes of it.

In an environment of its own:  pip install keras h5py jax  and  KERAS_BACKEND=jax python tests/data/make_keras3.py
For every case of KERAS3_CASES in tests/cases.py one file holds what `save_own_variables` stored half way, the variables
there, and the variables after the last step; the other is a weights file that `save_weights` wrote of a small model in the
first half of "keras3_amsgrad_ema", whose variables have the same names in the first file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from cases import KERAS3, KERAS3_CASES, KERAS3_FILE


def optimizer_of(case):
    options = dict(case.options)
    if isinstance(options.get("learning_rate"), tuple):
        name, arguments = options["learning_rate"]
        options["learning_rate"] = getattr(keras.optimizers.schedules, name)(**arguments)
    return keras.optimizers.Adam(**options)


def train(optimizer, variables, gradients):
    for step in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient) for gradient in step], variables)


def values_of(variables):
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def halves(case):
    values, gradients = case.arrays()
    variables = [keras.Variable(value) for value in values]
    optimizer, half, store = optimizer_of(case), case.steps // 2, {}
    train(optimizer, variables, gradients[:half])
    optimizer.save_own_variables(store)
    there = values_of(variables)
    train(optimizer, variables, gradients[half:])
    return {"store": store.values(), "variables": there, "after": values_of(variables)}


def save_model(case):
    """A weights file, and what the optimizer itself stores: Keras orders datasets by number, HDF5 by name."""
    layers = [keras.layers.Dense(5), keras.layers.Dense(2, use_bias=False)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile(optimizer_of(case), loss="mse")
    rng, store = np.random.RandomState(0), {}
    gradients = [[rng.standard_normal(v.shape).astype(np.float32) for v in model.trainable_variables] for _ in range(3)]
    train(model.optimizer, model.trainable_variables, gradients)
    model.save_weights(KERAS3_FILE)
    model.optimizer.save_own_variables(store)
    return {"store": store.values(), "variables": values_of(model.trainable_variables)}


def main():
    parts = {case.name: halves(case) for case in KERAS3_CASES}
    parts["file"] = save_model(next(case for case in KERAS3_CASES if case.name == "keras3_amsgrad_ema"))
    stored = {
        f"{name}/{part}/{i}": array
        for name, found in parts.items()
        for part, arrays in found.items()
        for i, array in enumerate(arrays)
    }
    stored["versions"] = np.array(f"keras {keras.__version__}, {keras.backend.backend()}")
    np.savez_compressed(KERAS3, **stored)
    print(KERAS3.stat().st_size, KERAS3_FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
