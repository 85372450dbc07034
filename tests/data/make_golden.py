"""Ask TensorFlow for the trajectories that the tests compare with, bit for bit.

In an environment of its own:  pip install tensorflow-cpu==2.15.1 "numpy<2"  and  python tests/data/make_golden.py
The file holds, for every case of tests/cases.py, the variables and slots after the last step: whole, or the SHA-256 of
their bytes and the first elements where they are long; and, for the cases that stop half way, the list of get_weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parents[1]))
from cases import CASES, GOLDEN, NEAR_CASES, RESUME_CASES, SCHEDULE_STEPS, SCHEDULES, SPARSE_CASES, STORED, digest


def optimizer_of(case):
    options = dict(case.options)
    if case.dtype == "float64":  # np.float64 numbers are kept in double by TF, Python floats are rounded to float32
        options = {k: np.float64(v) if isinstance(v, float) else v for k, v in options.items()}
        options = {"beta_1": np.float64(0.9), "beta_2": np.float64(0.999)} | options
    if isinstance(options.get("learning_rate"), tuple):
        name, arguments = options["learning_rate"]
        options["learning_rate"] = getattr(tf.keras.optimizers.schedules, name)(**arguments)
    return tf.keras.optimizers.legacy.Adam(**options)


def train(optimizer, variables, gradients):
    for step in gradients:
        optimizer.apply_gradients([(as_tensor(g, v), v) for g, v in zip(step, variables)])


def as_tensor(gradient, variable):
    if not isinstance(gradient, tuple):
        return tf.constant(gradient)
    return tf.IndexedSlices(*map(tf.constant, gradient), dense_shape=tf.constant(variable.shape))


def trajectory(case):
    values, gradients = case.arrays()
    variables = [tf.Variable(value) for value in values]
    optimizer = optimizer_of(case)
    train(optimizer, variables, gradients)
    slots = [optimizer.get_slot(v, name) for name in optimizer.get_slot_names() for v in variables]
    return [x.numpy() for x in variables + slots]


def halves(case):
    """The list that get_weights gives half way, the variables there, and the variables at the end."""
    values, gradients = case.arrays()
    variables = [tf.Variable(value) for value in values]
    optimizer, half = optimizer_of(case), case.steps // 2
    train(optimizer, variables, gradients[:half])
    found = {"weights": optimizer.get_weights(), "variables": [x.numpy() for x in variables]}
    train(optimizer, variables, gradients[half:])
    return {**found, "after": [x.numpy() for x in variables]}


def rates(name, arguments):
    """The schedule in double: TF takes the dtype from the arguments."""
    double = {k: np.float64(v) if isinstance(v, float) else v for k, v in arguments.items()}
    if name == "PiecewiseConstantDecay":
        double["values"] = [np.float64(v) for v in arguments["values"]]
    schedule = getattr(tf.keras.optimizers.schedules, name)(**double)
    return np.array([np.float64(schedule(np.float64(step))) for step in SCHEDULE_STEPS])


def main():
    stored, digests = {}, {}
    for i, (name, arguments) in enumerate(SCHEDULES):
        stored[f"rates/{i}"] = rates(name, arguments)
    for case in CASES + NEAR_CASES + SPARSE_CASES:
        arrays = trajectory(case)
        for i, array in enumerate(arrays):
            key = f"{case.name}/{i}"
            if array.size > STORED:
                digests[key] = digest(array)
            stored[key] = array if array.size <= STORED else array.ravel()[:16]
        print(case.name, len(arrays))
    for case in RESUME_CASES:
        for part, arrays in halves(case).items():
            stored.update({f"{case.name}/{part}/{i}": array for i, array in enumerate(arrays)})
        print(case.name)
    stored["digests"] = np.array(json.dumps({"tensorflow": tf.__version__, **digests}))
    np.savez_compressed(GOLDEN, **stored)
    print(GOLDEN.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
