"""Inputs shared by the tests and by the script that asks TensorFlow: exact on every NumPy, no framework imported."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "data" / "golden_tf2151.npz"
SIZES = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 129, 4095, 4096, 4097, 100003)
# Arrays longer than this are stored in the golden file as a digest and their first elements.
STORED = 300


def random_array(rng: np.random.RandomState, shape, low=-20, high=2, dtype=np.float32) -> np.ndarray:
    """Full mantissas, exponents from 2**low to 2**high, one zero in 64: made of integers, so the same on every machine."""
    mantissa = rng.randint(-(2**23) + 1, 2**23, size=shape)
    exponent = rng.randint(low - 23, high - 22, size=shape)
    zero = rng.randint(0, 64, size=shape) == 0
    return np.asarray(np.where(zero, 0.0, np.ldexp(mantissa.astype(np.float64), exponent)), dtype)


@dataclass(frozen=True)
class Case:
    """A trajectory: variables of these shapes, `steps` random gradients each, and the optimizer's arguments."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    steps: int
    options: dict = field(default_factory=dict)
    low: int = -20
    high: int = 2
    dtype: str = "float32"

    def __str__(self) -> str:
        return self.name

    def arrays(self) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        seed = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "little")
        rng = np.random.RandomState(seed)
        variables = [random_array(rng, shape, dtype=self.dtype) for shape in self.shapes]
        gradients = [
            [random_array(rng, shape, self.low, self.high, self.dtype) for shape in self.shapes]
            for _ in range(self.steps)
        ]
        return variables, gradients


def _cases() -> list[Case]:
    sized = [
        Case(f"size_{'scalar' if shape == () else shape[0]}{'_amsgrad' if amsgrad else ''}", (shape,), steps,
             {"learning_rate": 0.01, "amsgrad": amsgrad})
        for amsgrad in (False, True)
        for shape, steps in (
            ((), 100), ((1,), 100), ((7,), 100), ((129,), 100), ((4095,), 25), ((4096,), 25), ((4097,), 25), ((100003,), 10),
        )
    ]  # fmt: skip
    vector = ((129,),)
    options = {
        "defaults": {},
        "large_rate": {"learning_rate": 3.0},
        "negative_rate": {"learning_rate": -0.01},
        "beta_1_zero": {"beta_1": 0.0},
        "both_betas_zero": {"beta_1": 0.0, "beta_2": 0.0},
        "beta_2_slow": {"beta_2": 0.9999},
        "beta_1_over_root_beta_2": {"beta_1": 0.99, "beta_2": 0.95},
        "epsilon_1e-8": {"epsilon": 1e-8},
        "epsilon_1e-3": {"epsilon": 1e-3},
        "epsilon_1": {"epsilon": 1.0},
        "epsilon_zero": {"epsilon": 0.0},
        "epsilon_none": {"epsilon": None},
        "decay": {"decay": 0.1},
        "decay_amsgrad": {"decay": 0.013, "amsgrad": True, "learning_rate": 0.1},
        "lr": {"lr": 0.2, "learning_rate": 0.1},
        "clipvalue": {"clipvalue": 0.01},
        "clipvalue_zero": {"clipvalue": 0.0},
    }
    optioned = [Case(f"option_{name}", vector, 100, chosen) for name, chosen in options.items()]
    return [
        *sized,
        *optioned,
        Case("many_steps", ((16,),), 3000, {"learning_rate": 0.01}),
        Case("many_steps_amsgrad", ((16,),), 3000, {"learning_rate": 0.01, "amsgrad": True}),
        Case("denormal", ((129,),), 60, {"learning_rate": 0.01}, low=-140, high=-60),
        Case("denormal_amsgrad", ((129,),), 60, {"learning_rate": 0.01, "amsgrad": True}, low=-140, high=-60),
        Case("huge", ((129,),), 60, {"learning_rate": 0.01}, low=40, high=70),
        Case("list", ((3, 5), (), (1,), (129,), (2, 3, 4), (0, 4), (257,)), 60, {"learning_rate": 0.01}),
        Case("list_amsgrad", ((3, 5), (), (1,), (129,), (2, 3, 4), (0, 4)), 60, {"amsgrad": True, "decay": 0.01}),
        Case("float64", ((129,),), 100, {"learning_rate": 0.01}, dtype="float64"),
        Case("float64_amsgrad", ((129,),), 100, {"learning_rate": 0.01, "amsgrad": True}, dtype="float64"),
    ]


CASES = _cases()


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def number_bits(array: np.ndarray) -> np.ndarray:
    """The bits, the same for all NaNs: their signs and payloads are the processor's, and a GPU has others than a CPU."""
    found = bits(array)
    return np.where(np.isnan(array), ~found.dtype.type(0), found)


def aligned(shape, dtype, offset: int, order: str = "C") -> np.ndarray:
    """An uninitialised array that starts `offset` elements after a 64-byte boundary."""
    item = np.dtype(dtype).itemsize
    size = int(np.prod(shape, dtype=np.int64))
    raw = np.empty(size * item + 64 + offset * item, np.uint8)
    start = -raw.ctypes.data % 64 + offset * item
    return raw[start : start + size * item].view(dtype).reshape(shape, order=order)


def placed(array: np.ndarray, offset: int) -> np.ndarray:
    """A copy of `array` that starts `offset` elements after a 64-byte boundary."""
    copy = aligned(array.shape, array.dtype, offset)
    copy[...] = array
    return copy


# Schedules by class name and arguments, and the steps at which TensorFlow was asked (with np.float64 arguments).
SCHEDULES = [
    ("ExponentialDecay", {"initial_learning_rate": 0.1, "decay_steps": 7, "decay_rate": 0.5}),
    ("ExponentialDecay", {"initial_learning_rate": 0.1, "decay_steps": 7, "decay_rate": 0.5, "staircase": True}),
    ("InverseTimeDecay", {"initial_learning_rate": 0.1, "decay_steps": 3, "decay_rate": 0.7}),
    ("InverseTimeDecay", {"initial_learning_rate": 0.1, "decay_steps": 3, "decay_rate": 0.7, "staircase": True}),
    ("PiecewiseConstantDecay", {"boundaries": [5.0, 10.0, 80.0], "values": [0.1, 0.05, 0.025, 0.01]}),
    ("PolynomialDecay", {"initial_learning_rate": 0.1, "decay_steps": 10, "end_learning_rate": 0.0001}),
    ("PolynomialDecay", {"initial_learning_rate": 0.1, "decay_steps": 10, "end_learning_rate": 0.01, "power": 0.5}),
    (
        "PolynomialDecay",
        {"initial_learning_rate": 0.1, "decay_steps": 10, "end_learning_rate": 0.001, "power": 2.0, "cycle": True},
    ),
    ("CosineDecay", {"initial_learning_rate": 0.1, "decay_steps": 50}),
    ("CosineDecay", {"initial_learning_rate": 0.1, "decay_steps": 50, "alpha": 0.2}),
    ("CosineDecay", {"initial_learning_rate": 0.01, "decay_steps": 40, "warmup_target": 0.1, "warmup_steps": 10}),
    ("CosineDecayRestarts", {"initial_learning_rate": 0.1, "first_decay_steps": 10}),
    (
        "CosineDecayRestarts",
        {"initial_learning_rate": 0.1, "first_decay_steps": 8, "t_mul": 1.0, "m_mul": 0.9, "alpha": 0.1},
    ),
    ("CosineDecayRestarts", {"initial_learning_rate": 0.1, "first_decay_steps": 5, "t_mul": 1.5, "m_mul": 0.8}),
]
SCHEDULE_STEPS = [
    0,
    1,
    2,
    3,
    5,
    6,
    7,
    8,
    9,
    10,
    11,
    14,
    15,
    20,
    21,
    25,
    30,
    31,
    40,
    49,
    50,
    51,
    60,
    70,
    80,
    81,
    100,
    210,
    1000,
]
# Trajectories whose scalars TF computes in float32 in an order of its own: equal within rounding, not to the bit.
NEAR_CASES = [
    Case("clipnorm", ((129,), (3, 5)), 60, {"learning_rate": 0.01, "clipnorm": 0.5}),
    Case("clipnorm_large", ((129,), (3, 5)), 60, {"learning_rate": 0.01, "clipnorm": 1000.0}),
    Case("clipnorm_zero", ((129,), (3, 5)), 5, {"learning_rate": 0.01, "clipnorm": 0.0}),
    Case("clipnorm_clipvalue", ((129,), (3, 5)), 60, {"learning_rate": 0.01, "clipnorm": 0.5, "clipvalue": 0.05}),
    Case("global_clipnorm", ((129,), (3, 5), (2,)), 60, {"learning_rate": 0.01, "global_clipnorm": 0.5}),
    Case("global_clipnorm_all", ((129,), (3, 5)), 60,
         {"learning_rate": 0.1, "global_clipnorm": 0.5, "clipvalue": 0.2, "decay": 0.02, "amsgrad": True}),
    *(Case(f"schedule_{i}", ((33,),), 60, {"learning_rate": schedule, "decay": 0.01 * (i % 2)})
      for i, schedule in enumerate(SCHEDULES)),
]  # fmt: skip
# Trajectories that stop half way: the golden file has TensorFlow's `get_weights()` there, and the variables there and at
# the end.
RESUME_CASES = [
    Case("resume", ((3, 5), (), (129,), (0, 4)), 12, {"learning_rate": 0.01}),
    Case("resume_amsgrad", ((3, 5), (), (129,), (0, 4)), 12,
         {"learning_rate": 0.01, "amsgrad": True, "beta_2": 0.9, "decay": 0.02}),
]  # fmt: skip


@dataclass(frozen=True)
class SparseCase(Case):
    """A trajectory whose first variable gets `ids[step % len(ids)]` rows a step, half of them of its first five rows."""

    ids: tuple[int, ...] = (5,)

    def arrays(self):
        """The gradients of the first variable are pairs of values and indices."""
        variables, gradients = super().arrays()
        rows, *rest = self.shapes[0]
        rng = np.random.RandomState(rows)
        for step, found in enumerate(gradients):
            count = self.ids[step % len(self.ids)]
            indices = np.where(
                rng.randint(0, 2, count) == 0, rng.randint(0, rows, count), rng.randint(0, min(rows, 5), count)
            )
            values = random_array(rng, (count, *rest), self.low, self.high, self.dtype)
            found[0] = (values, indices.astype(np.int32 if step % 2 else np.int64))
        return variables, gradients


SPARSE_CASES = [
    SparseCase("sparse", ((40, 3),), 100, {"learning_rate": 0.01}, ids=(5, 0, 1, 12)),
    SparseCase("sparse_amsgrad", ((40, 3),), 100, {"learning_rate": 0.1, "amsgrad": True, "decay": 0.01}, ids=(7, 1)),
    SparseCase("sparse_vector", ((100,),), 60, {"learning_rate": 0.01, "beta_1": 0.5}, ids=(9,)),
    SparseCase("sparse_rank_3", ((9, 2, 5),), 60, {"learning_rate": 0.01, "epsilon": 1e-3}, ids=(4, 0)),
    SparseCase("sparse_wide", ((6, 300),), 20, {"learning_rate": 0.01}, ids=(3,)),
    SparseCase("sparse_one_row", ((1, 4),), 30, {"learning_rate": 0.01}, ids=(6,)),
    SparseCase("sparse_rare", ((40, 3),), 1500, {"learning_rate": 0.01}, ids=(4, *(0,) * 499)),
    SparseCase("sparse_betas", ((40, 3),), 100, {"beta_1": 0.98, "beta_2": 0.95}, ids=(3, 0)),
    SparseCase("sparse_clipvalue", ((40, 3),), 50, {"learning_rate": 0.01, "clipvalue": 0.01}, ids=(8,)),
    SparseCase("sparse_denormal", ((40, 3),), 60, {"learning_rate": 0.01}, low=-140, high=-60, ids=(8, 1)),
    SparseCase("sparse_list", ((40, 3), (7,), (), (0, 4)), 50, {"learning_rate": 0.01}, ids=(8, 0)),
]


# What Keras 3 was asked for: its variables half way, and the model's there and at the end. float32 holds these betas and
# 1 - beta, so that Keras and TF multiply by the same numbers; "keras3_defaults" has others.
KERAS3 = Path(__file__).parent / "data" / "keras3_adam.npz"
KERAS3_FILE = KERAS3.with_suffix(".weights.h5")
_BINARY = {"learning_rate": 0.015625, "beta_1": 0.875, "beta_2": 0.96875}
_RATES = ("ExponentialDecay", {"initial_learning_rate": 0.0625, "decay_steps": 4, "decay_rate": 0.5, "staircase": True})
KERAS3_CASES = [
    Case(f"keras3_{name}", ((3, 5), (7,), ()), 8, options)
    for name, options in {
        "plain": _BINARY,
        "amsgrad_ema": {
            **_BINARY,
            "amsgrad": True,
            "use_ema": True,
            "ema_momentum": 0.75,
            "ema_overwrite_frequency": 4,
        },
        "decayed_schedule": {**_BINARY, "learning_rate": _RATES, "weight_decay": 0.125},
        "accumulated": {**_BINARY, "gradient_accumulation_steps": 4},
        "defaults": {"learning_rate": 0.015625, "amsgrad": True},
    }.items()
]
