"""Steps in buckets: the bits of one apply_gradients, whatever the buckets, their order and the threads."""

from __future__ import annotations

import copy
import random
import threading

import fastadam
import numpy as np
import pytest
from helpers import bits, slow


def same(first, second):
    """To the bit, payloads of NaN aside."""
    return all(map(are_same, first, second))


def are_same(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return (a.shape, a.dtype) == (b.shape, b.dtype) and bool(((bits(a) == bits(b)) | ((a != a) & (b != b))).all())


def state_of(optimizer, variables):
    return [*variables, *optimizer.get_weights()]


def give(optimizer, pairs, choose, **copies):
    """Give pairs in random buckets, some of them from other threads, and some not before the last."""
    places = list(range(len(pairs)))
    choose.shuffle(places)
    handles, errors = [], []
    while places:
        count = choose.randint(1, 4)
        chunk, places = places[:count], places[count:]

        def call(chunk=chunk):
            try:
                mine = {name: [given[i] for i in chunk] for name, given in copies.items()}
                handles.append(optimizer.step_bucket([pairs[i] for i in chunk], **mine))
            except BaseException as error:
                errors.append(error)

        if choose.random() < 0.5:
            call()
        else:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        assert errors == []
    return handles


def random_pair(choose, rng):
    """Two sets of equal variables and two optimizers with equal options."""
    shapes = [
        (choose.randint(1, 4000),) if choose.random() < 0.8 else (choose.randint(1, 60), choose.randint(1, 60))
        for _ in range(choose.randint(1, 10))
    ]
    dtypes = [choose.choice(["f4", "f4", "f4", "f8", "f2"]) for _ in shapes]
    variables = [rng.standard_normal(shape).astype(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    options = {
        "learning_rate": 0.01,
        "amsgrad": choose.random() < 0.3,
        "weight_decay": choose.choice([None, 0.1]),
        "decay": choose.choice([0.0, 0.01]),
        "use_ema": choose.random() < 0.2,
        "loss_scale_factor": choose.choice([None, 8.0]),
        **choose.choice(
            [{}, {"global_clipnorm": choose.choice([1.0, 30.0, 100.0])}, {"clipnorm": 20.0}, {"clipvalue": 0.5}]
        ),
    }
    pair = []
    for _ in range(2):
        mine = copy.deepcopy(variables)
        optimizer = fastadam.Adam(**options)
        optimizer.build(mine)
        pair.append((optimizer, mine))
    return pair


@pytest.mark.parametrize("seed", [*range(20), *slow(*range(20, 60))])
def test_buckets_have_the_bits_of_one_call(seed):
    choose, rng = random.Random(seed), np.random.default_rng(seed)
    (plain, variables), (bucketed, others) = random_pair(choose, rng)
    for _ in range(choose.randint(3, 12)):
        present = [choose.random() < 0.9 or place == 0 for place in range(len(variables))]
        size = choose.choice([0.1, 1.0, 1.0])
        gradients = [(rng.standard_normal(w.shape) * size).astype(w.dtype) for w in variables]
        if choose.random() < 0.03:
            gradients[0].flat[0] = choose.choice([np.nan, np.inf])
        if choose.random() < 0.2:
            plain.learning_rate = bucketed.learning_rate = plain.learning_rate * 0.5
        pairs = [(g, w) for g, w, is_given in zip(gradients, variables, present, strict=True) if is_given]
        plain.apply_gradients(pairs)
        pairs = [(g.copy(), w) for g, w, is_given in zip(gradients, others, present, strict=True) if is_given]
        if choose.random() < 0.2:
            before = copy.deepcopy(state_of(bucketed, others))
            bucketed.begin_step(early=True, threads=1)
            give(bucketed, pairs[: choose.randint(0, len(pairs))], choose)
            bucketed.abort_step()
            assert same(state_of(bucketed, others), before)
        bucketed.begin_step(early=choose.random() < 0.8, threads=choose.choice([None, 1, 2]))
        give(bucketed, pairs, choose)
        assert bucketed.end_step() == plain.iterations
        assert same(state_of(plain, variables), state_of(bucketed, others))


@pytest.mark.parametrize("seed", range(20))
def test_buckets_under_a_dynamic_loss_scale(seed):
    """Gradients that are not finite come in any bucket."""
    choose, rng = random.Random(seed), np.random.default_rng(seed)
    sizes = [choose.randint(1, 3000) for _ in range(choose.randint(1, 6))]
    pair = []
    for _ in range(2):
        optimizer = fastadam.LossScaleOptimizer(fastadam.Adam(0.01, global_clipnorm=20.0), 8.0, 3)
        variables = [np.ones(size, np.float32) for size in sizes]
        optimizer.build(variables)
        pair.append((optimizer, variables))
    (plain, variables), (bucketed, others) = pair
    for _ in range(12):
        gradients = [rng.standard_normal(size).astype(np.float32) * plain.dynamic_scale for size in sizes]
        if choose.random() < 0.4:
            choose.choice(gradients)[-1] = choose.choice([np.nan, np.inf, -np.inf])
        made = plain.apply_gradients(list(zip(gradients, variables, strict=True)))
        bucketed.begin_step(early=True)
        give(bucketed, [(g.copy(), w) for g, w in zip(gradients, others, strict=True)], choose)
        assert bucketed.end_step() == made
        assert bucketed.dynamic_scale == plain.dynamic_scale
        assert bucketed.step_counter == plain.step_counter
        assert same(state_of(plain, variables), state_of(bucketed, others))


def built(sizes=(5000, 3, 700), **options):
    variables = [np.linspace(1, 2, size, dtype=np.float32) for size in sizes]
    optimizer = fastadam.Adam(0.1, **options)
    optimizer.build(variables)
    return optimizer, variables


def pairs_of(variables, size=0.5):
    return [(np.full_like(w, size), w) for w in variables]


def test_copies_are_written_with_the_step_and_restored_with_it():
    optimizer, variables = built(global_clipnorm=1e6)
    copies = [w.astype(np.float16) for w in variables]
    for size, aborts in ((0.5, True), (0.5, False), (2.0, True)):
        before = [c.copy() for c in copies]
        optimizer.begin_step(early=True)
        handles = give(optimizer, pairs_of(variables, size), random.Random(1), copies=copies)
        for handle in handles:
            handle.result(30)
        assert not same(copies, before)
        if aborts:
            optimizer.abort_step()
            assert same(copies, before)
        else:
            optimizer.end_step()
            assert same(copies, [w.astype(np.float16) for w in variables])


def test_squares_are_summed_in_the_order_of_build():
    rng = np.random.default_rng(0)
    variables = [np.ones(n, np.float32) for n in (300, 7, 5000, 64)]
    gradients = [(rng.standard_normal(w.shape) * 10.0**k).astype(np.float32) for k, w in enumerate(variables)]
    results = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        mine = [w.copy() for w in variables]
        optimizer = fastadam.Adam(0.1, global_clipnorm=1.0)
        optimizer.build(mine)
        optimizer.begin_step()
        for place in order:
            optimizer.step_bucket([(gradients[place], mine[place])])
        optimizer.end_step()
        results.append(state_of(optimizer, mine))
    assert same(*results)


def moves_early(optimizer, variables, size):
    """Make a step; whether its first bucket was stepped before the end."""
    before = variables[0].copy()
    optimizer.begin_step(early=True)
    for pair in pairs_of(variables, size):
        optimizer.step_bucket([pair]).result(30)
    was_early = not same([before], [variables[0]])
    optimizer.end_step()
    return was_early


def test_nothing_is_stepped_early_while_most_steps_are_clipped():
    optimizer, variables = built(global_clipnorm=10.0)
    assert [moves_early(optimizer, variables, 1e-3) for _ in range(5)] == [True] * 5
    assert [moves_early(optimizer, variables, 1.0) for _ in range(20)] == [True] * 2 + [False] * 18
    assert [moves_early(optimizer, variables, 1e-3) for _ in range(6)] == [False] * 3 + [True] * 3


def test_without_norms_every_step_is_early():
    optimizer, variables = built(clipvalue=0.1)
    assert all(moves_early(optimizer, variables, 10.0) for _ in range(20))


def test_nothing_is_written_before_the_end_without_early():
    optimizer, variables = built()
    before = copy.deepcopy(variables)
    optimizer.begin_step()
    for pair in pairs_of(variables):
        assert optimizer.step_bucket([pair]).result() is None
    assert same(variables, before)
    optimizer.end_step()
    assert not same(variables, before)


def test_a_variable_that_no_bucket_has_is_not_stepped():
    optimizer, variables = built()
    before = state_of(optimizer, copy.deepcopy(variables))
    optimizer.begin_step(early=True)
    optimizer.step_bucket(pairs_of(variables[:1]))
    assert optimizer.end_step() == 1
    after = state_of(optimizer, variables)
    moved = [not are_same(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [True, False, False, True, True, False, False, True, False, False]


def test_a_step_without_buckets_is_counted():
    optimizer, variables = built()
    before = copy.deepcopy(variables)
    optimizer.begin_step(early=True)
    assert optimizer.step_bucket([]).result(30) is None
    assert optimizer.end_step() == 1
    assert same(variables, before)


def test_the_numbers_are_those_at_the_beginning():
    rates = iter([0.5, 0.25])
    optimizer, variables = built((4,))
    optimizer.learning_rate = lambda: next(rates)
    optimizer.begin_step(early=True)
    optimizer.step_bucket(pairs_of(variables))
    optimizer.learning_rate = 7.0
    optimizer.end_step()
    np.testing.assert_allclose(variables[0], np.linspace(1, 2, 4) - 0.5, rtol=1e-5)
    assert next(rates) == 0.25


def test_lazy_rows_and_repeated_steps_go_with_buckets():
    results = []
    for in_buckets in (False, True):
        table, other = np.ones((9, 2), np.float32), np.ones(5, np.float32)
        optimizer = fastadam.Adam(0.1, sparse_update="lazy", global_clipnorm=0.5)
        optimizer.build([table, other])
        rows = fastadam.IndexedSlices(np.full((2, 2), 0.5, np.float32), [1, 5])
        pairs = [(rows, table), (np.ones_like(other), other)]
        for step in range(6):
            if in_buckets and step % 2:
                optimizer.begin_step(early=True)
                for pair in reversed(pairs):
                    optimizer.step_bucket([pair])
                optimizer.end_step()
            else:
                optimizer.apply_gradients(pairs)
        results.append(state_of(optimizer, [table, other]))
    assert same(*results)


@pytest.mark.parametrize("early", [False, True])
def test_a_bucket_that_waits_is_clipped_by_the_norm_of_the_gradient_that_it_takes(early):
    """NumPy arrays do not say that they were written to."""
    results = []
    for scale in (1, 100):
        optimizer, variables = built(global_clipnorm=1.0, use_ema=True)  # with averages buckets wait for the end
        pairs = pairs_of(variables, 0.01)
        optimizer.begin_step(early=early)
        for pair in pairs:
            optimizer.step_bucket([pair]).result(30)
        for gradient, _ in pairs:
            gradient *= scale
        optimizer.end_step()
        plain, expected = built(global_clipnorm=1.0, use_ema=True)
        plain.apply_gradients([(scale * g, w) for (g, _), w in zip(pairs_of(expected, 0.01), expected, strict=True)])
        results.append(same(variables, expected))
    assert results == [True, True]
