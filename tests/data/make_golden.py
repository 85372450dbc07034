"""Ask TensorFlow for the trajectories that the tests compare with, bit for bit.

In an environment of its own:  pip install tensorflow-cpu==2.15.1 "numpy<2"  and  python tests/data/make_golden.py
The file holds, for every case of tests/cases.py, the variables and slots after the last step: whole, or the SHA-256 of
their bytes and the first elements where they are long.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parents[1]))
from cases import CASES, GOLDEN, NEAR_CASES, SCHEDULE_STEPS, SCHEDULES, STORED, digest


def trajectory(case):
    values, gradients = case.arrays()
    variables = [tf.Variable(value) for value in values]
    options = dict(case.options)
    if case.dtype == "float64":  # np.float64 numbers are kept in double by TF, Python floats are rounded to float32
        options = {k: np.float64(v) if isinstance(v, float) else v for k, v in options.items()}
        options = {"beta_1": np.float64(0.9), "beta_2": np.float64(0.999)} | options
    if isinstance(options.get("learning_rate"), tuple):
        name, arguments = options["learning_rate"]
        options["learning_rate"] = getattr(tf.keras.optimizers.schedules, name)(**arguments)
    optimizer = tf.keras.optimizers.legacy.Adam(**options)
    for step in gradients:
        optimizer.apply_gradients([(tf.constant(g), v) for g, v in zip(step, variables)])
    slots = [optimizer.get_slot(v, name) for name in optimizer.get_slot_names() for v in variables]
    return [x.numpy() for x in variables + slots]


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
    for case in CASES + NEAR_CASES:
        arrays = trajectory(case)
        for i, array in enumerate(arrays):
            key = f"{case.name}/{i}"
            if array.size > STORED:
                digests[key] = digest(array)
            stored[key] = array if array.size <= STORED else array.ravel()[:16]
        print(case.name, len(arrays))
    stored["digests"] = np.array(json.dumps({"tensorflow": tf.__version__, **digests}))
    np.savez_compressed(GOLDEN, **stored)
    print(GOLDEN.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
