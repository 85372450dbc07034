"""The native undo of a step: every array gets the bits back that it had before."""

from __future__ import annotations

import itertools

import fastadam
import ml_dtypes  # noqa: F401 - names bfloat16 for NumPy
import numpy as np
import pytest
from cases import bits
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import buffers_of
from fastadam._core.native.plan import Plan, StepHyper

NO_FACTORS = np.empty((0, 2))


class Logged:
    """Variables with a plan, and the log of their last step."""

    def __init__(self, rng, sizes, *, amsgrad=False, copies=None):
        self.variables = [(rng.standard_normal(size) * 0.02).astype(np.float32) for size in sizes]
        self.slots = {name: [np.zeros_like(w) for w in self.variables] for name in ("m", "v", "vhat")[: 2 + amsgrad]}
        self.copies = [] if copies is None else [w.astype(copies) for w in self.variables]
        decays = [place % 3 != 1 for place in range(len(sizes))]
        buffers = buffers_of(self.variables, range(len(sizes)))
        self.plan = Plan(buffers, self.slots, decays=decays, copies=self.copies)
        self.log = _cpu.StepLog()

    @property
    def arrays(self):
        return [*self.variables, *itertools.chain(*self.slots.values()), *self.copies]

    def values(self):
        return [bits(array).copy() for array in self.arrays]

    def step(self, *call):
        assert self.plan.can_undo(call[0])
        self.plan.step_logged(*call, self.log)

    def undo(self, *call, instead=None):
        return self.plan.undo(*call, self.log, instead)

    def changed(self, gradients, hyper, factors, _):
        return self.plan.changed_since(gradients, hyper, factors, self.log)

    def plain_step(self, gradients, hyper, factors, clip_factors):
        self.plan.step(gradients, hyper, factors, clip_factors=clip_factors if len(clip_factors) else None)


def same(first, second):
    return all(map(np.array_equal, first, second))


def same_numbers(first, second, arrays):
    """Payloads of NaN aside."""
    typed = [(x.view(array.dtype), y.view(array.dtype)) for x, y, array in zip(first, second, arrays, strict=True)]
    return all((((x != x) & (y != y)) | (bits(x) == bits(y))).all() for x, y in typed)


def random_call(rng, logged, step, dtype):
    count = len(logged.variables)
    gradients = [(rng.standard_normal(w.shape) * 10 ** rng.uniform(-3, 3)).astype(dtype) for w in logged.variables]
    hyper = StepHyper(
        step,
        10 ** rng.uniform(-4, -1),
        rng.choice([0.0, 0.9, 0.95]),
        rng.choice([0.0, 0.5, 0.99, 0.999]),
        1e-8,
        weight_decay=rng.choice([0, 0.01, 5.0]),
        l2=rng.choice([0, 0.1]),
        clip_value=rng.choice([np.inf, 0.5]),
        epsilon_corrected=bool(rng.integers(2)),
        gradient_scale=rng.choice([1, 1 / 8, 1 / 3]),
    )
    factors = list(rng.uniform(-1, 1, count)) if rng.integers(2) else []
    clipped = np.stack([rng.uniform(0, 1, count), rng.integers(-3, 2, count)], 1)
    return gradients, hyper, factors, clipped if rng.integers(2) else NO_FACTORS


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_random_programs(isa, amsgrad, dtype, threads):
    fastadam.set_num_threads(threads)
    rng = np.random.default_rng([amsgrad, threads, len(dtype)])
    for copies in (None, "float16", "bfloat16"):
        sizes = [*rng.integers(1, 1538, 5), 1, 512, 513, 40_000 if threads > 1 else 1537]
        logged = Logged(rng, sizes, amsgrad=amsgrad, copies=copies)
        for step in range(1, 9):
            call = random_call(rng, logged, step, dtype)
            before = logged.values()
            logged.step(*call)
            after = logged.values()
            assert logged.undo(*call) == []
            assert same(logged.values(), before)
            logged.plain_step(*call)
            assert same(logged.values(), after)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_another_step_in_place_of_the_one_that_is_undone(isa, amsgrad, dtype, threads):
    fastadam.set_num_threads(threads)
    sizes = [700, 1, 512, 513, 40_000 if threads > 1 else 1537]
    for copies in (None, "bfloat16"):
        plain, logged = (Logged(np.random.default_rng(4), sizes, amsgrad=amsgrad, copies=copies) for _ in range(2))
        rng = np.random.default_rng([amsgrad, threads, len(dtype)])
        for step in range(1, 9):
            *call, early = random_call(rng, logged, step, dtype)
            right = np.stack([rng.uniform(0, 1, len(sizes)), np.zeros(len(sizes))], 1) if len(early) else early
            plain.plain_step(*call, right)
            logged.step(*call, early)
            assert logged.changed(*call, early) == []
            assert logged.undo(*call, early, instead=right) == []
            assert same(logged.values(), plain.values())


@pytest.mark.parametrize("size", range(1, 1538, 64))
def test_every_rest_of_a_tile(isa, size):
    rng = np.random.default_rng(size)
    logged = Logged(rng, [size, size + 1], amsgrad=True)
    for step in range(1, 5):
        call = random_call(rng, logged, step, "float32")
        before = logged.values()
        logged.step(*call)
        assert logged.undo(*call) == []
        assert same(logged.values(), before)
        logged.plain_step(*call)


SPECIAL = np.array(
    [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 1.2e-38, 3e38, -3e38, 1e-20, 1e20, 1e30, 1.0], np.float32
)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("where", ["gradient", "variable", "m", "v", "vhat", "all"])
def test_numbers_at_the_edges(isa, where, amsgrad):
    """NaN and infinity come back as they were; denormal numbers of the state as a step leaves them: flushed or not."""
    rng = np.random.default_rng(3)
    for step in (1, 2, 100):
        logged = Logged(rng, [700, 5], amsgrad=amsgrad)
        call = random_call(rng, logged, step, "float32")
        logged.plain_step(*call)
        targets = {"gradient": call[0], "variable": logged.variables, **logged.slots}
        for name, arrays in targets.items():
            for array in arrays if where in (name, "all") else ():
                at = rng.random(array.size) < 0.5
                values = rng.choice(SPECIAL, array.size)
                array[at] = np.abs(values[at]) if name in ("v", "vhat") else values[at]
        before = logged.values()
        logged.step(*call)
        after = logged.values()
        assert logged.undo(*call) == []
        assert same_numbers(logged.values(), before, logged.arrays)
        logged.plain_step(*call)
        assert same_numbers(logged.values(), after, logged.arrays)


def test_a_step_is_undone_once():
    rng = np.random.default_rng(0)
    logged = Logged(rng, [600])
    call = random_call(rng, logged, 1, "float32")
    before = logged.values()
    logged.step(*call)
    logged.undo(*call)
    logged.undo(*call)
    assert same(logged.values(), before)


CHANGES = {
    "one element": lambda g: g.__setitem__(3, 7.0),
    "all signs": lambda g: np.negative(g, out=g),
    "two signs": lambda g: g.__setitem__(slice(0, 2), -g[:2]),
    "another order": lambda g: g.__setitem__(slice(None), g[::-1].copy()),
    "zeros": lambda g: g.fill(0.0),
    "one unit in the last place": lambda g: g.__setitem__(5, np.nextafter(g[5], np.float32(9))),
}


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_gradient_is_found_and_keeps_only_its_moments(isa, change, step):
    rng = np.random.default_rng(1)
    logged = Logged(rng, [900, 2000, 30], amsgrad=True)
    for before_it in range(1, step):
        logged.plain_step(*random_call(rng, logged, before_it, "float32"))
    call = random_call(rng, logged, step, "float32")
    call = (call[0], call[1]._replace(l2=0.0), *call[2:])
    before = logged.values()
    logged.step(*call)
    after = logged.values()
    CHANGES[change](call[0][1][512:1024])
    assert logged.changed(*call) == [1]
    assert same(logged.values(), after)
    assert logged.undo(*call) == [1]
    found = logged.values()
    for place, (was, stepped, now) in enumerate(zip(before, after, found, strict=True)):
        is_moment = place in (4, 7)  # m and v of the second variable
        kept = slice(512, 1024) if is_moment else slice(0, 0)
        assert np.array_equal(now[kept], stepped[kept])
        outside = np.ones(len(now), bool)
        outside[kept] = False
        assert np.array_equal(now[outside], was[outside])


def test_the_log_takes_about_a_byte_for_each_element():
    rng = np.random.default_rng(2)
    logged = Logged(rng, [1 << 18])
    sizes = []
    for step in range(1, 131):
        gradients = [rng.standard_normal(w.shape).astype(np.float32) for w in logged.variables]
        logged.step(gradients, StepHyper(step, 1e-3, 0.9, 0.999, 1e-8, weight_decay=0.01), [], NO_FACTORS)
        sizes.append(logged.log.nbytes / (1 << 18))
    assert max(sizes) < 17.1
    assert max(sizes[99:]) < 1.125


@pytest.mark.parametrize(
    ("variable", "gradient", "options"),
    [
        (np.ones(5), np.ones(5), {}),
        (np.ones(5, np.float16), np.ones(5, np.float16), {}),
        (np.ones((5, 2), np.float32), fastadam.IndexedSlices(np.ones((1, 2), np.float32), [1]), {}),
        (np.ones(5, np.float32), np.ones(5), {}),
    ],
    ids=["float64", "float16", "sparse", "to be converted"],
)
def test_what_cannot_be_undone(variable, gradient, options):
    slots = {name: [np.zeros_like(variable, np.result_type(variable, np.float32))] for name in ("m", "v")}
    assert not Plan(buffers_of([variable], [0]), slots, **options).can_undo([gradient])


def test_a_repeated_variable_cannot_be_undone():
    w = np.ones(5, np.float32)
    m, v = np.zeros_like(w), np.zeros_like(w)
    plan = Plan(buffers_of([w, w], [0, 1]), {"m": [m, m], "v": [v, v]})
    assert not plan.can_undo([np.ones_like(w), np.ones_like(w)])
