"""Good calls of `fastadam.torch`, `fastadam.jax` and `fastadam.keras`, in the form of `recipes.py`."""

from __future__ import annotations

import importlib
import os
import pickle
from pathlib import Path

import fastadam
import numpy as np
from recipes import ARGUMENTS, F32, OF_TENSORS

DEEP = ("deep list", "of itself")  # after a RecursionError in its extension JAX raises it in every call


class FrameworkWorld:
    """What the worlds of the three libraries have in common."""

    avoided = ()  # hostile values
    skipped, raises, recipes = frozenset(), {}, {}

    def __init__(self, rng, folder, entry, plain):
        self.rng, self.folder, self.entry, self.plain = rng, Path(folder), entry, plain
        self.instances = {}
        self.make()

    def argument(self, entry, name):
        keys = (f"{entry.owner}.{entry.name}.{name}", f"{entry.name}.{name}", f"{entry.part}.{name}", name)
        for recipes in (self.recipes, ARGUMENTS):
            for key in keys:
                if key in recipes:
                    return recipes[key](self)
        raise KeyError(f"{entry.label}: no recipe for the argument {name!r}")

    def prepare(self, entry):
        pass

    def close(self):
        pass


OF_GROUPS = (
    *("lr", "learning_rate", "betas", "eps", "weight_decay", "amsgrad", "maximize", "moments", "master", "seed"),
    "stochastic_rounding",
)


class TorchWorld(FrameworkWorld):
    frameworks = ("torch",)
    modules = ("fastadam.torch", "fastadam.exchange")
    skipped = (
        frozenset(f"exchange.{name}" for name in fastadam.exchange.__all__ if name not in OF_TENSORS)
        | {
            f"{owner}.profile_hook_step"
            for owner in ("Adam", "AdamW", "DeepSpeedCPUAdam")  # of PyTorch
        }
        | {"Overlap.Overlap", "Overlap.step"}
    )  # which overlap() and GradScaler call
    raises = {f"{owner}.{name}": AttributeError for owner in ("Adam", "AdamW") for name in OF_GROUPS}  # noqa: RUF012
    options = (
        {},
        {"amsgrad": True, "weight_decay": 0.1},
        {"clipnorm": 1.0, "skip_nonfinite": True},
        {"global_clipnorm": 1.0},
        {"moments": "8bit", "float32_for": 0},
    )

    def make(self):
        self.torch = torch = importlib.import_module("torch")
        torch.set_num_threads(1)
        self.adapter = importlib.import_module("fastadam.torch")
        values = [self.rng.standard_normal(shape).astype(F32) for shape in ((6, 2), (3,))]
        self.params = [torch.nn.Parameter(torch.tensor(value)) for value in values]
        self.embedding = torch.nn.Embedding(6, 2, sparse=True)
        self.embedding.weight = self.params[0]
        self.spare = [torch.nn.Parameter(torch.ones(8, 2)), torch.nn.Parameter(torch.ones(4))]
        self.give_gradients()
        options = {} if self.plain else self.options[self.rng.integers(len(self.options))]
        if self.entry.owner == "exchange" or self.entry.name in (
            "begin_step",
            "step_bucket",
            "end_step",
            "overlap",
            "telemetry",
            "attach",
        ):
            options = {"telemetry": True} if self.entry.name == "telemetry" else {}
        self.optimizer = (self.adapter.AdamW if self.entry.owner == "AdamW" else self.adapter.Adam)(
            self.params, **options
        )
        self.optimizer.step()
        self.deepspeed = self.adapter.DeepSpeedCPUAdam([self.spare[0]])
        self.overlap = self.adapter.overlap(self.optimizer)
        self.instances = {
            "Adam": self.optimizer,
            "AdamW": self.optimizer,
            "DeepSpeedCPUAdam": self.deepspeed,
            "Overlap": self.overlap,
        }

    def give_gradients(self):
        for param in self.params:
            param.grad = self.torch.ones_like(param)
        self.spare[0].grad = self.torch.ones_like(self.spare[0])

    def prepare(self, entry):
        if entry.name in ("step_bucket", "end_step"):
            self.optimizer.begin_step()
        if entry.name == "rollback_subgroup":
            self.deepspeed.step_subgroup(0)

    def close(self):
        self.overlap.detach()
        self.optimizer.abort_step()

    def state(self):
        tensors = [*self.params, *self.spare, *(param.grad for param in self.params if param.grad is not None)]
        if self.overlap.is_open or self.entry.name in ("step_bucket", "end_step"):  # a step is open
            return {"tensors": [self.bytes_of(t) for t in tensors]}
        held = self.optimizer.state_dict()
        states = {
            key: {name: self.bytes_of(value) for name, value in state.items()} for key, state in held["state"].items()
        }
        groups = [{name: repr(value) for name, value in group.items()} for group in held["param_groups"]]
        return {"tensors": [self.bytes_of(t) for t in tensors], "state": states, "groups": groups}

    def bytes_of(self, value):
        return bytes(value.detach().numpy().tobytes()) if isinstance(value, self.torch.Tensor) else repr(value)

    def state_of_torch(self):
        return self.optimizer.state_dict()


TorchWorld.recipes = {
    "params": lambda w: list(w.params),
    "model_params": lambda w: [w.spare[1]],
    "betas": lambda w: (0.9, 0.999),
    "eps": lambda w: 1e-8,
    "foreach": lambda w: None,
    "fused": lambda w: None,
    "maximize": lambda w: False,
    "capturable": lambda w: False,
    "differentiable": lambda w: False,
    "decoupled_weight_decay": lambda w: False,
    "skip_nonfinite": lambda w: False,
    "master_weights": lambda w: False,
    "param_group": lambda w: {"params": [w.spare[1]], "lr": 0.1},
    "module": lambda w: w.embedding,
    "loss_scale": lambda w: 2.0,
    "param": lambda w: w.params[0],
    "forget.param": lambda w: w.params[1],
    "ids": lambda w: w.torch.tensor([1, 4]),
    "state_dict": TorchWorld.state_of_torch,
    "DeepSpeedCPUAdam.load_state_dict.state_dict": lambda w: w.deepspeed.state_dict(),
    "resize.old": lambda w: w.params[0],
    "resize.new": lambda w: w.spare[0],
    "resize.rows": lambda w: None,
    "closure": lambda w: lambda: 1.0,
    "set_to_none": lambda w: True,
    "subgroup_id": lambda w: 0,
    "sub_group_id": lambda w: 0,
    "optimizer": lambda w: w.optimizer,
    "bucket_mb": lambda w: 1.0,
    "threads": lambda w: 1,
    "grad_scale": lambda w: None,
    "found_inf": lambda w: None,
    "clipnorm": lambda w: None,
    "exchange.state_dict": TorchWorld.state_of_torch,
    "from_bitsandbytes.state_dict": lambda w: fastadam.exchange.to_bitsandbytes(w.optimizer.state_dict()),
    "bias_correction": lambda w: True,
    "adamw_mode": lambda w: True,
    "fp32_optimizer_states": lambda w: True,
    "prepend": lambda w: False,
}


class JaxWorld(FrameworkWorld):
    frameworks = ("jax", "jaxlib", "optax", "numpy")
    avoided = DEEP
    modules = ("fastadam.jax",)

    def make(self):
        self.jnp = importlib.import_module("jax.numpy")
        self.adapter = importlib.import_module("fastadam.jax")
        self.table = self.jnp.asarray(self.rng.standard_normal((6, 2)).astype(F32))
        self.tree = {"w": self.table, "b": self.jnp.ones(3)}

    def state(self):
        return {"arrays": [np.asarray(a).tobytes() for a in (self.table, *self.tree.values())]}

    def zeros(self):
        return [self.jnp.zeros_like(self.table)]


JaxWorld.recipes = {
    "params": lambda w: w.tree,
    "grads": lambda w: {name: w.jnp.ones_like(a) for name, a in w.tree.items()},
    "state": lambda w: w.adapter.init(w.tree),
    "amsgrad": lambda w: False,
    "b1": lambda w: 0.9,
    "b2": lambda w: 0.999,
    "eps": lambda w: 1e-8,
    "eps_root": lambda w: 0.0,
    "mu_dtype": lambda w: None,
    "nesterov": lambda w: False,
    "mask": lambda w: None,
    "epsilon_corrected": lambda w: True,
    "mode": lambda w: "lazy",
    "table": lambda w: w.table,
    "ids": lambda w: w.jnp.array([1, 4]),
    "sparse_update.grads": lambda w: w.jnp.ones((2, 2)),
    "sparse_update.state": lambda w: w.adapter.init(w.table),
    "step_arrays.params": lambda w: [w.table],
    "step_arrays.grads": JaxWorld.zeros,
    "step_arrays.m": JaxWorld.zeros,
    "step_arrays.v": JaxWorld.zeros,
    "step_arrays.vhat": lambda w: None,
    "decays": lambda w: [True],
}


class KerasWorld(FrameworkWorld):
    frameworks = ("keras", "jax", "jaxlib", "numpy", "optree")
    avoided = DEEP
    modules = ("fastadam.keras",)

    def make(self):
        os.environ.setdefault("KERAS_BACKEND", "jax")
        self.keras = importlib.import_module("keras")
        self.adapter = importlib.import_module("fastadam.keras")
        self.variables = [self.keras.Variable(np.ones(shape, F32)) for shape in ((6, 2), (3,))]
        self.optimizer = (self.adapter.AdamW if self.entry.owner == "AdamW" else self.adapter.Adam)(0.1)
        self.optimizer.build(self.variables)
        self.instances = {"Adam": self.optimizer, "AdamW": self.optimizer}

    def state(self):
        held = [*self.variables, *self.optimizer.variables]
        return {
            "arrays": [np.asarray(variable.value).tobytes() for variable in held],
            "config": pickle.dumps(repr(self.optimizer.get_config())),
        }

    def gradients(self):
        return [np.ones(variable.shape, F32) for variable in self.variables]


KerasWorld.recipes = {
    "clipnorm": lambda w: None,
    "clipvalue": lambda w: None,
    "grads": KerasWorld.gradients,
    "trainable_variables": lambda w: w.variables,
    "grads_and_vars": lambda w: list(zip(w.gradients(), w.variables, strict=True)),
    "optimizer_variables": lambda w: w.optimizer.variables,
    "var_list": lambda w: w.variables,
    "from_optimizer.optimizer": lambda w: w.keras.optimizers.AdamW(0.1),
    "update_step.gradient": lambda w: np.ones(3, F32),
    "update_step.variable": lambda w: w.variables[1],
    "update_step.learning_rate": lambda w: 0.1,
}
