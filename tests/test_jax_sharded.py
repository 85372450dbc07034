"""Sharded arrays: on 8 host devices a step gathers nothing and copies nothing, and has the bits of one device."""

from __future__ import annotations

import textwrap

import pytest
from helpers import run_python

pytest.importorskip("jax")
pytest.importorskip("optax")

SHARDED = """
import functools, re
import jax, jax.numpy as jnp, numpy as np
import fastadam.jax as fj
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

assert len(jax.devices()) == 8
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))

def put(tree, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)

def moved(text):
    assert "fastadam_" in text
    return re.findall(r"(?:copy|all-|collective-)[\\w-]*(?=\\()", text)

def check(want, got):
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()

def values(*shape):
    return jnp.sin(jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32)).reshape(shape)
"""


def run_sharded(code):
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    result = run_python(SHARDED + textwrap.dedent(code), **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_on_eight_devices_nothing_is_gathered_or_copied(amsgrad):
    """Each leaf in its own way, in one call."""
    assert run_sharded(f"""
        specs = {{"matrix": P("x", "y"), "rows": P(("x", "y")), "columns": P(None, "y"), "all": P(), "scalar": P()}}
        params = {{"matrix": values(64, 16), "rows": values(32), "columns": values(3, 8), "all": values(5), "scalar": values()}}
        gradients = jax.tree.map(jnp.cos, params)
        step = functools.partial(fj.fused_update, learning_rate=0.1, weight_decay=0.01)
        want = jax.jit(step)(params, gradients, fj.init(params, amsgrad={amsgrad}))
        params, gradients = put(params, specs), put(gradients, specs)
        state = fj.init(params, amsgrad={amsgrad})
        donated = jax.jit(step, donate_argnums=(0, 2))
        text = donated.lower(params, gradients, state).compile().as_text()
        assert text.count("fastadam_dense_step") == 1, text
        assert "f32[16,8]" in text and "f32[64,16]" not in text
        places = [shard.data.unsafe_buffer_pointer() for shard in params["matrix"].addressable_shards]
        got = donated(params, gradients, state)
        assert places == [shard.data.unsafe_buffer_pointer() for shard in got[0]["matrix"].addressable_shards]
        check(want, got)
        for name, spec in specs.items():
            assert got[0][name].sharding.is_equivalent_to(NamedSharding(mesh, spec), got[0][name].ndim)
        print("moved", *moved(text))
    """) == ["moved"]


@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_a_sharded_table_takes_its_own_rows(mode):
    assert run_sharded(f"""
        step = functools.partial(fj.sparse_update, learning_rate=0.1, mode={mode!r})
        table, ids, rows = np.array(values(64, 16)), jnp.array([3, 60, 3, 0, 17, 63]), values(6, 16)
        want = jax.jit(step)(table, ids, rows, fj.init(table))
        for spec in (P("x"), P(None, "y"), P("x", "y"), P(("y", "x")), P()):
            sharded = jax.device_put(table, NamedSharding(mesh, spec))
            state = fj.init(sharded)
            donated = jax.jit(step, donate_argnums=(0, 3))
            print(*moved(donated.lower(sharded, ids, rows, state).compile().as_text()))
            got = donated(sharded, ids, rows, state)
            check(want, got)
            assert got[0].sharding.is_equivalent_to(sharded.sharding, 2)
        spread = put((ids[:4], rows[:4]), (P("x"), P("x", "y")))
        state = fj.init(table)
        want = jax.jit(step)(table, ids[:4], rows[:4], state)
        sharded = jax.device_put(table, NamedSharding(mesh, P("x")))
        check(want, jax.jit(step)(sharded, *spread, fj.init(sharded)))
        bad = jnp.array([3, 64, 3, 0, 17, 63])
        try:
            jax.block_until_ready(jax.jit(step)(sharded, bad, rows, fj.init(sharded)))
        except jax.errors.JaxRuntimeError as error:
            assert "indices[1]: 64 is not a row, expected 0 <= index < 64" in str(error), error
            print("refused")
    """) == ["refused"]


def test_sharded_in_other_ways():
    """Moments sharded and parameters not (ZeRO), under shard_map, vmapped over a sharded axis."""
    assert run_sharded("""
        step = functools.partial(fj.fused_update, learning_rate=0.1)
        params, gradients = values(64, 16), jnp.cos(values(64, 16))
        state = fj.init(params)
        want = jax.jit(step)(params, gradients, state)
        spread = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("x") if x.ndim else P())), state)
        whole = jax.device_put(params, NamedSharding(mesh, P()))
        got = jax.jit(step)(whole, gradients, spread)
        check(want, got)

        ensemble = values(8, 5, 2), jnp.cos(values(8, 5, 2))
        states = jax.vmap(fj.init)(ensemble[0])
        want = jax.jit(jax.vmap(step))(*ensemble, states)
        sharded = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("x"))), (*ensemble, states))
        vmapped = jax.jit(jax.vmap(step), donate_argnums=(0, 2))
        print(*moved(vmapped.lower(*sharded).compile().as_text()))
        check(want, vmapped(*sharded))

        shard_map = getattr(jax, "shard_map", None)
        if shard_map is None:
            from jax.experimental.shard_map import shard_map
        spec = fj.init(params)._replace(count=P(), mu=P("x"), nu=P("x"))
        options = {"mesh": mesh, "in_specs": (P("x"), P("x"), spec), "out_specs": (P("x"), spec)}
        mapped = shard_map(step, **options)
        check(jax.jit(step)(params, gradients, state), jax.jit(mapped)(params, gradients, state))
        print("done")
    """) == ["done"]


def test_shard_map_knows_what_differs_between_devices():
    """Or it would add up gradients as if parameters were the same everywhere."""
    assert run_sharded("""
        shard_map = getattr(jax, "shard_map", None)
        if shard_map is None:
            from jax.experimental.shard_map import shard_map
        x = jnp.arange(8.0)[:, None] * jnp.ones(3)

        def mapped(function, out_specs=P("x")):
            specs = {"in_specs": (P("x"), P("x")), "out_specs": out_specs}
            return jax.jit(shard_map(function, mesh=mesh, **specs))(x, x)

        def dense(w, g):
            return fj.fused_update(w, g, fj.init(w), learning_rate=0.1)[0]

        def sparse(w, g):
            return fj.sparse_update(w, jnp.arange(len(w)), g, fj.init(w), learning_rate=0.1)[0]

        for step in (dense, sparse):
            gradients = mapped(lambda w, x, step=step: jax.grad(lambda w: (w * x).sum())(step(w, x)))
            np.testing.assert_array_equal(gradients, x)
            scanned = mapped(lambda w, g, step=step: jax.lax.scan(lambda w, _: (step(w, g), None), w, length=3)[0])
            np.testing.assert_allclose(scanned, x - 0.3 * np.sign(x), rtol=1e-5)
            branch = mapped(lambda w, g, step=step: jax.lax.cond(g[0, 0] > 1, step, lambda w, g: w, w, g))
            np.testing.assert_allclose(branch, np.where(x > 1, x - 0.1, x), rtol=1e-5)
            try:
                mapped(lambda w, g, step=step: step(jnp.ones_like(w), g), out_specs=P())
            except ValueError as error:
                assert "out_specs" in str(error), error
                print("refused")
    """) == ["refused", "refused"]


def test_shard_map_along_some_axes_alone():
    assert run_sharded("""
        x = jnp.arange(8.0)[:, None] * jnp.ones(3)

        def mapped(function):
            specs = {"in_specs": (P("x"), P("x")), "out_specs": P("x"), "axis_names": {"x"}}
            return jax.jit(jax.shard_map(function, mesh=mesh, **specs))(x, x)

        got = mapped(lambda w, g: fj.fused_update(w, g, fj.init(w), learning_rate=0.1)[0])
        np.testing.assert_allclose(got, x - 0.1 * np.sign(x), rtol=1e-5)
        ids = jnp.array([0])
        try:
            mapped(lambda w, g: fj.sparse_update(w, ids, g[:1], fj.init(w), learning_rate=0.1)[0])
        except jax.errors.JaxRuntimeError as error:
            assert "in a shard_map along some axes of a mesh, expected all axes" in str(error), error
            print("refused")
    """) == ["refused"]


def test_sharded_over_explicit_axes():
    """The default of `jax.make_mesh`: the sharding is part of the type of an array."""
    assert run_sharded("""
        kinds = (jax.sharding.AxisType.Explicit,) * 2
        explicit = jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds)
        enter = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh
        params, gradients, rows = np.array(values(64, 16)), np.cos(values(64, 16)), values(3, 16)
        dense = functools.partial(fj.fused_update, learning_rate=0.1)
        sparse = functools.partial(fj.sparse_update, ids=jnp.array([3, 60, 3]), grads=rows, learning_rate=0.1)
        state = fj.init(params)
        for spec in (P("x", "y"), P("y"), P()):
            sharding = NamedSharding(explicit, spec)
            a, g = (jax.device_put(x, sharding) for x in (params, gradients))
            with enter(explicit):
                step = jax.jit(dense, donate_argnums=(0, 2))
                print(*moved(step.lower(a, g, fj.init(a)).compile().as_text()))
                got = step(a, g, fj.init(a))
                assert got[0].sharding.is_equivalent_to(sharding, 2)
                a = jax.device_put(params, sharding)
                rows_got = jax.jit(lambda table, state: sparse(table, state=state))(a, fj.init(a))
            check(jax.jit(dense)(params, gradients, state), got)
            check(jax.jit(lambda table, state: sparse(table, state=state))(params, state), rows_got)
        print("done")
    """) == ["done"]
