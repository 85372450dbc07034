"""Good calls of everything public in fastadam without a framework: objects to call, and a value for each argument.

An argument is looked up by ``Class.method.argument``, ``function.argument``, then ``argument`` alone. One that is found
nowhere and has no default is an error of the program: a new public name needs a recipe here.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import fastadam
import numpy as np
from fastadam._core.parts import parts_of

F32 = np.float32
OPTIONS = [
    {},
    {"amsgrad": True, "weight_decay": 0.1},
    {"sparse_update": "deferred"},
    {"sparse_update": "deferred", "gradient_accumulation_steps": 2, "use_ema": True},
    {"sparse_update": "deferred_fast", "max_staleness": 3},
    {"sparse_update": "lazy", "gradient_accumulation_steps": 2},
    {"use_ema": True, "ema_overwrite_frequency": 3, "global_clipnorm": 1.0},
    {"moments": "8bit", "float32_for": 4},
    {"moments": "bfloat16", "float32_for": 0, "seed": 3, "clipvalue": 0.5},
    {"telemetry": True, "clipnorm": 0.5, "decay": 0.01},
    {"learning_rate": fastadam.schedules.CosineDecay(0.1, 10), "sum_repeated": True, "clip_after_dedupe": True},
    {"beta_1": lambda: 0.9, "learning_rate": lambda: 0.01},
]


UNBUILT = {"amsgrad": False}
NEEDED = {
    "averages": {"use_ema": True},
    "finalize_variable_values": {"use_ema": True},
    "build": UNBUILT,
    "telemetry": {"telemetry": True},
    "step_bucket": {},
    "end_step": {},
    "abort_step": {},
}
FIXED = ("float32_for", "gradient_accumulation_steps", "master", "moments", "seed", "stochastic_rounding")
OF_TENSORS = ("from_bitsandbytes", "to_bitsandbytes", "from_torchao")  # whose states are made with torch
RAISES = {  # what good calls raise
    "cuda.array": RuntimeError,  # without a GPU
    "LearningRateSchedule.__call__": NotImplementedError,
    "LearningRateSchedule.get_config": NotImplementedError,
    **{f"LossScaleOptimizer.{name}": ValueError for name in ("minimize", "get_gradients", "get_updates")},
    **{f"{owner}.{name}": AttributeError for owner in ("Adam", "AdamW") for name in FIXED},
}


class World:
    """Variables and an optimizer in the middle of a training, and whatever else calls need; new for each case."""

    modules = ("fastadam", "fastadam.cuda", "fastadam.exchange", "fastadam.reference", "fastadam.schedules")
    avoided = ()  # hostile values
    frameworks = ()  # whose own texts are not the library's
    skipped = frozenset([*(f"exchange.{name}" for name in OF_TENSORS), "LearningRateSchedule.from_config"])
    raises = RAISES

    def __init__(self, rng, folder, entry, plain):
        self.rng, self.folder, self.entry = rng, Path(folder), entry
        self.owner = fastadam.AdamW if entry.owner == "AdamW" else fastadam.Adam
        self.table = rng.standard_normal((6, 2)).astype(F32)
        self.bias = rng.standard_normal(3).astype(F32)
        self.named = fastadam.Variable(rng.standard_normal(5).astype(F32), "named")
        self.variables = [self.table, self.bias, self.named]
        self.gradients = [rng.standard_normal(np.shape(w)).astype(F32) for w in self.variables]
        self.optimizer = self.trained(self.options(entry, plain))
        self.scaled = fastadam.LossScaleOptimizer(self.optimizer, 1024.0)
        self.slices = fastadam.IndexedSlices(np.ones((2, 2), F32), np.array([1, 4]), (6, 2))
        self.moments = [np.zeros(3, F32), np.ones(3, F32)]
        self.extra = [np.zeros(3, F32), np.zeros((8, 2), F32), np.zeros((2, 2), F32)]
        self.instances = {
            "Adam": self.optimizer,
            "AdamW": self.optimizer,
            "LossScaleOptimizer": self.scaled,
            "Variable": self.named,
            "IndexedSlices": self.slices,
            "Telemetry": fastadam.Telemetry(["a"], np.ones((1, 6))),
        }

    def options(self, entry, plain):
        """Of the optimizer that is called: what a method needs, or any."""
        if entry.name in NEEDED:
            return NEEDED[entry.name]
        return {} if plain else OPTIONS[self.rng.integers(len(OPTIONS))]

    def trained(self, options):
        optimizer = self.owner(**options)
        if options is UNBUILT:
            return optimizer
        optimizer.build(self.variables)
        for _ in range(int(self.rng.integers(3))):
            optimizer.apply_gradients(self.pairs(sparse="sparse_update" in options))
        return optimizer

    def pairs(self, sparse=False):
        pairs = [(g.copy(), w) for g, w in zip(self.gradients, self.variables, strict=True)]
        if sparse:
            pairs[0] = (fastadam.IndexedSlices(pairs[0][0][:2], np.array([1, 4])), self.table)
        return pairs

    # ---- what a refused call must leave as it is -------------------------------------------------------------------

    def state(self):
        """The bytes of everything that a call could change."""
        arrays = [*map(np.asarray, self.variables), *self.gradients, *self.moments, *self.extra]
        options, state, _, _ = parts_of(self.optimizer)
        config = {
            name: getattr(self.optimizer, name) for name in ("learning_rate", "beta_1", "decay", "epsilon", "name")
        }
        return {
            "arrays": [a.tobytes() for a in arrays],
            "options": _pickled(copy.copy(options)),
            "state": _pickled(state.snapshot()),
            "settings": {name: value if callable(value) else repr(value) for name, value in config.items()},
            "scale": (self.scaled.dynamic_scale, self.scaled.step_counter, self.scaled.initial_scale),
            "process": (fastadam.current_isa(), fastadam.get_num_threads()),
            "slices": (self.slices.values.tobytes(), self.slices.indices.tobytes(), self.slices.dense_shape),
            "name": self.named.name,
        }

    def prepare(self, entry):
        """What has to be called before a method."""
        if entry.name in ("step_bucket", "end_step"):
            (self.scaled if entry.owner == "LossScaleOptimizer" else self.optimizer).begin_step()
        if entry.name == "telemetry" and entry.kind == "method":
            self.optimizer.apply_gradients(self.pairs())
        if entry.name in ("minimize", "get_gradients", "get_updates"):
            fastadam.set_gradient_provider(lambda loss, variables: [np.ones(3, F32) for _ in variables])
        if entry.name == "save_delta":
            self.optimizer.save(self.folder / "base", values=True)

    def close(self):
        fastadam.set_isa(fastadam.isas()[-1])
        fastadam.set_num_threads(1)
        fastadam.set_gradient_provider(None)
        if hasattr(self, "optimizer"):
            self.optimizer.abort_step()

    # ---- arguments -------------------------------------------------------------------------------------------------

    def argument(self, entry, name):
        for key in (f"{entry.owner}.{entry.name}.{name}", f"{entry.name}.{name}", f"{entry.part}.{name}", name):
            if key in ARGUMENTS:
                return ARGUMENTS[key](self)
        raise KeyError(f"{entry.label}: no recipe for the argument {name!r}")

    def saved(self):
        path = self.folder / "saved"
        self.optimizer.save(path, values=True)
        return path

    def delta(self):
        """Of the file that `saved` wrote."""
        path = self.folder / "delta"
        self.saved()
        self.optimizer.save_delta(path)
        return path

    def slots(self):
        return [None, {"m": self.moments[0], "v": self.moments[1]}, None]

    def torch_state(self):
        entry = {"step": 3, "exp_avg": np.zeros(3, F32), "exp_avg_sq": np.ones(3, F32)}
        group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "params": [0]}
        return {"state": {0: entry}, "param_groups": [group]}

    def copies(self):
        return [None, np.zeros(3, F32), None]

    def schedule(self):
        return fastadam.schedules.ExponentialDecay(0.1, 10, 0.5)

    def plain(self):
        """An optimizer without options, built for the bias: states of other libraries have nothing else."""
        optimizer = fastadam.Adam()
        optimizer.build([self.bias])
        return optimizer


def _pickled(value):
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):  # functions of a user's
        return None


def optax_state(world):
    """Needs optax, for which a test of the frameworks looks; as its states look."""
    import collections

    adam = collections.namedtuple("ScaleByAdamState", "count mu nu")
    return (adam(np.array(3, np.int32), [np.zeros(3, F32)], [np.ones(3, F32)]),)


ARGUMENTS = {
    # options of optimizers
    "learning_rate": lambda w: 0.1,
    "lr": lambda w: 0.1,
    "beta_1": lambda w: 0.9,
    "beta_2": lambda w: 0.999,
    "epsilon": lambda w: 1e-7,
    "decay": lambda w: 0.1,
    "amsgrad": lambda w: True,
    "weight_decay": lambda w: 0.1,
    "clipnorm": lambda w: 1.0,
    "clipvalue": lambda w: 1.0,
    "global_clipnorm": lambda w: None,
    "use_ema": lambda w: False,
    "ema_momentum": lambda w: 0.9,
    "ema_overwrite_frequency": lambda w: None,
    "loss_scale_factor": lambda w: None,
    "gradient_accumulation_steps": lambda w: None,
    "sparse_update": lambda w: "dense",
    "max_staleness": lambda w: None,
    "clip_after_dedupe": lambda w: False,
    "sum_repeated": lambda w: False,
    "telemetry": lambda w: False,
    "moments": lambda w: None,
    "master": lambda w: None,
    "stochastic_rounding": lambda w: False,
    "float32_for": lambda w: None,
    "seed": lambda w: 3,
    "name": lambda w: "some",
    "iterations": lambda w: 3,
    "inner_optimizer": lambda w: fastadam.Adam(),
    "initial_scale": lambda w: 64.0,
    "min_scale": lambda w: 1.0,
    "dynamic_growth_steps": lambda w: 5,
    # steps
    "grads_and_vars": World.pairs,
    "experimental_aggregate_gradients": lambda w: True,
    "copies": World.copies,
    "zero_grads": lambda w: False,
    "early": lambda w: True,
    "threads": lambda w: 1,
    "loss": lambda w: lambda: F32(1),
    "scale_loss.loss": lambda w: F32(1),
    "params": lambda w: [w.bias],
    "grad_loss": lambda w: None,
    "gradient": lambda w: lambda loss, variables: [np.ones(3, F32) for _ in variables],
    "minimize.var_list": lambda w: [w.bias],
    # variables
    "var": lambda w: w.bias,
    "gather.var": lambda w: w.table,
    "dense_view.var": lambda w: w.table,
    "reset.var": lambda w: w.table,
    "reset.rows": lambda w: None,
    "resize.old": lambda w: w.table,
    "resize.new": lambda w: np.concatenate([w.table, w.extra[2]]),
    "resize.rows": lambda w: np.array([0, 1, 2, 3, 4, 5, -1, -1]),
    "resize.slots": lambda w: None,
    "var_list": lambda w: list(w.variables),
    "exclude_from_weight_decay.var_list": lambda w: [w.bias],
    "var_names": lambda w: ["bias$"],
    "variables": lambda w: list(w.variables),
    "slots": World.slots,
    "slot_name": lambda w: "m",
    "add_slot.slot_name": lambda w: "mine",
    "initializer": lambda w: "ones",
    "shape": lambda w: (2, 3),
    "dtype": lambda w: np.float32,
    "indices": lambda w: np.array([1, 4, 1]),
    "ids": lambda w: np.array([1, 0]),
    "out": lambda w: np.zeros((3, 2), F32),
    "value": lambda w: np.ones(5, F32),
    "values": lambda w: True,
    "IndexedSlices.values": lambda w: np.ones((2, 2), F32),
    "IndexedSlices.indices": lambda w: np.array([1, 0]),
    "dense_shape": lambda w: (6, 2),
    "weights": lambda w: [np.copy(a) for a in w.optimizer.weights],
    "grads": lambda w: [g.copy() for g in w.gradients],
    "count": lambda w: 2,
    "set_isa.name": lambda w: fastadam.isas()[0],
    "provider": lambda w: None,
    # files and configurations
    "path": World.saved,
    "save.path": lambda w: w.folder / "new",
    "save_delta.path": lambda w: w.folder / "new_delta",
    "save.values": lambda w: False,
    "LossScaleOptimizer.load.path": lambda w: _saved_scaled(w),
    "LossScaleOptimizer.load.deltas": lambda w: [],
    "deltas": lambda w: [w.delta()],
    "load.slots": lambda w: None,
    "load.deltas": lambda w: [],
    "merge_deltas.base": World.saved,
    "merge_deltas.path": lambda w: w.folder / "merged",
    "custom_objects": lambda w: None,
    "changes": lambda w: None,
    "config": lambda w: w.optimizer.get_config(),
    "LossScaleOptimizer.from_config.config": lambda w: w.scaled.get_config(),
    "schedules.config": lambda w: w.entry.instance(w).get_config() if w.entry.owner != "LearningRateSchedule" else {},
    "deserialize.config": lambda w: fastadam.schedules.serialize(w.schedule()),
    # functions
    "adam_step.vars": lambda w: w.bias,
    "adam_step.var": lambda w: w.bias,
    "adam_step.grads": lambda w: w.gradients[1],
    "adam_step.grad": lambda w: w.gradients[1],
    "adam_step.m": lambda w: w.moments[0],
    "adam_step.v": lambda w: w.moments[1],
    "adam_step.vhat": lambda w: w.extra[0],
    "adam_step.copies": lambda w: None,
    "step": lambda w: 3,
    "grad_factor": lambda w: 0.5,
    "optimizer_or_shapes": lambda w: [(2, 3), 4, ("name", (5, 6))],
    "gradients": lambda w: None,
    "bandwidth": lambda w: 1e9,
    "MemoryTable.rows": lambda w: list(fastadam.memory(10)),
    "names": lambda w: ["a"],
    "Telemetry.rows": lambda w: np.ones((1, 6)),
    "prefix": lambda w: "train/",
    "array.values": lambda w: [1.0],
    "device": lambda w: 0,
    # schedules
    "initial_learning_rate": lambda w: 0.1,
    "decay_steps": lambda w: 10,
    "first_decay_steps": lambda w: 10,
    "decay_rate": lambda w: 0.5,
    "staircase": lambda w: True,
    "alpha": lambda w: 0.1,
    "beta": lambda w: 0.1,
    "num_periods": lambda w: 0.5,
    "t_mul": lambda w: 2.0,
    "m_mul": lambda w: 0.5,
    "warmup_target": lambda w: 0.2,
    "warmup_steps": lambda w: 3,
    "boundaries": lambda w: [2, 4],
    "PiecewiseConstantDecay.values": lambda w: [0.1, 0.2, 0.3],
    "end_learning_rate": lambda w: 0.001,
    "power": lambda w: 0.5,
    "cycle": lambda w: True,
    "schedule": World.schedule,
    "learning_rate_schedule": World.schedule,
    "steps": lambda w: 4,
    "axes": lambda w: _axes(),
    # exchange
    "optimizer": World.plain,
    "exchange.variables": lambda w: [w.bias],
    "state_dict": World.torch_state,
    "min_8bit_size": lambda w: 16,
    "state": optax_state,
    "from_keras_weights.weights": lambda w: fastadam.exchange.to_keras_weights(w.plain(), [w.bias]),
    "from_keras3_variables.weights": lambda w: fastadam.exchange.to_keras3_variables(w.plain(), [w.bias]),
    "read_keras3_file.path": lambda w: Path(__file__).parents[1] / "data" / "keras3_adam.weights.h5",
}


def _saved_scaled(world):
    world.scaled.save(world.folder / "scaled")
    return world.folder / "scaled"


def _axes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from matplotlib.figure import Figure

        return Figure().subplots()
