"""The contenders of bench/adapters.py: our adapters beside the frameworks' own optimizers, on the same buffers."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
from common import Contender
from dense_contenders import HYPER, _parameters, buffers
from table_contenders import _cycle, _table


def torch(sizes, dtype="float32", moments=None):
    """`fastadam.torch.Adam.step()`; `moments`: "float32" for half parameters."""
    import fastadam.torch

    _, parameters, read = _parameters(sizes, dtype)
    optimizer = fastadam.torch.Adam(parameters, lr=0.001, eps=1e-7, moments=moments)
    return Contender(optimizer.step, read)


def torch_apart(sizes, ours, dtype="float32"):
    """One Adam for each parameter, ours or `torch.optim.Adam(fused=True)`, as torchao and Megatron-Core offload."""
    _, parameters, read = _parameters(sizes, dtype)
    optimizers = _apart(parameters, ours)

    def step():
        for optimizer in optimizers:
            optimizer.step()

    return Contender(step, read)


def torch_made(sizes, ours, steps):
    """Making these, and their first `steps` steps."""
    _, parameters, _ = _parameters(sizes)

    def step():
        for optimizer in _apart(parameters, ours) * steps:
            optimizer.step()

    return Contender(step)


def _apart(parameters, ours):
    import fastadam.torch
    import torch

    make = fastadam.torch.Adam if ours else partial(torch.optim.Adam, fused=True)
    return [make([parameter], lr=0.001, eps=1e-7) for parameter in parameters]


def torch_nothing(sizes):
    """What PyTorch itself does around a `step()`."""
    torch, parameters, _ = _parameters(sizes)

    class Nothing(torch.optim.Optimizer):
        def step(self):
            return None

    return Contender(Nothing(parameters, {}).step)


def torch_table(sizes, mode):
    """`fastadam.torch.Adam(sparse_update=mode)` on the uncoalesced gradient that nn.Embedding gives."""
    import fastadam.torch
    import torch

    table, batches, values = _table(sizes)
    parameter = torch.nn.Parameter(torch.from_numpy(table))
    optimizer = fastadam.torch.Adam([parameter], lr=0.001, eps=1e-7, sparse_update=mode)
    rows = torch.from_numpy(values)

    def step(ids):
        indices = torch.from_numpy(ids)[None]
        parameter.grad = torch.sparse_coo_tensor(indices, rows, parameter.shape, check_invariants=False)
        optimizer.step()

    return _cycle(batches, step, 5 if mode == "dense" else 400)


def jax(sizes, dtype="float32"):
    """`fastadam.jax.fused_update` in a `jax.jit` with parameters and state donated."""
    import fastadam.jax
    import jax

    variables, gradients = ([jax.numpy.array(a) for a in arrays] for arrays in buffers(sizes, dtype))
    held = {"now": (variables, fastadam.jax.init(variables))}

    def update(now, gradients):
        return fastadam.jax.fused_update(now[0], gradients, now[1], learning_rate=0.001, eps=1e-7)

    run = jax.jit(update, donate_argnums=0)

    def step():
        held["now"] = jax.block_until_ready(run(held["now"], gradients))

    return Contender(step, lambda: [np.array(w) for w in held["now"][0]])


def jax_table(sizes, mode):
    """`fastadam.jax.sparse_update` in a `jax.jit`, the table and its state donated."""
    import fastadam.jax
    import jax

    table, batches, values = _table(sizes)
    array = jax.numpy.array(table)
    held = {"now": (array, fastadam.jax.init(array))}
    rows = jax.numpy.array(values)

    def update(now, ids):
        return fastadam.jax.sparse_update(now[0], ids, rows, now[1], learning_rate=0.001, eps=1e-7, mode=mode)

    run = jax.jit(update, donate_argnums=0)

    def step(ids):
        held["now"] = jax.block_until_ready(run(held["now"], ids))

    return _cycle([ids.astype(np.int32) for ids in batches], step, 5)


def optax_table(sizes):
    """What JAX users do: the gradient as an array of the table's shape, and optax over all of it."""
    import jax
    import optax

    table, batches, values = _table(sizes)
    array, rows, adam = jax.numpy.array(table), jax.numpy.array(values), optax.adam(0.001, eps=1e-7)
    held = {"now": (array, adam.init(array))}

    def update(now, ids):
        gradient = jax.numpy.zeros_like(now[0]).at[ids].add(rows)
        updates, state = adam.update(gradient, now[1])
        return optax.apply_updates(now[0], updates), state

    run = jax.jit(update, donate_argnums=0)

    def step(ids):
        held["now"] = jax.block_until_ready(run(held["now"], ids))

    return _cycle([ids.astype(np.int32) for ids in batches], step, 2)


def keras(sizes, backend, ours):
    """`apply` of Keras's Adam or of ours; on JAX `stateless_apply` in a `jax.jit`, everything donated."""
    os.environ["KERAS_BACKEND"] = backend
    import fastadam.keras
    import keras

    options = {"learning_rate": HYPER["learning_rate"], "epsilon": HYPER["epsilon"]}
    optimizer = (fastadam.keras if ours else keras.optimizers).Adam(**options)
    variables, gradients = buffers(sizes)
    if backend == "torch":
        import torch

        variables = [keras.Variable(torch.from_numpy(w)) for w in variables]
        gradients = [torch.from_numpy(g) for g in gradients]
    else:
        variables = [keras.Variable(w) for w in variables]
    optimizer.build(variables)
    if backend == "jax":
        return _stateless(optimizer, variables, gradients)
    return Contender(
        lambda: optimizer.apply(gradients), lambda: [keras.ops.convert_to_numpy(w) for w in variables], epsilon_hat=True
    )


def _stateless(optimizer, variables, gradients):
    import jax

    gradients = [jax.numpy.array(g) for g in gradients]
    held = {"now": ([w.value for w in variables], [w.value for w in optimizer.variables])}
    run = jax.jit(lambda now, g: optimizer.stateless_apply(now[1], g, now[0]), donate_argnums=0)

    def step():
        held["now"] = jax.block_until_ready(run(held["now"], gradients))

    return Contender(step, lambda: [np.array(w) for w in held["now"][0]], epsilon_hat=True)
