"""float32 against TensorFlow 2.15.1, to the bit: every ISA of this CPU, thread counts, alignments, lists, splits."""

from __future__ import annotations

import json
from itertools import pairwise

import fastadam
import numpy as np
import pytest
from cases import CASES, GOLDEN, STORED, bits, digest, placed

FLOAT32 = [case for case in CASES if case.dtype == "float32"]


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file), json.loads(str(file["digests"]))


def run(case, offset=0):
    """The case's final variables and slots, in the order of the golden file."""
    values, gradients = case.arrays()
    variables = [placed(value, (offset + 3 * i) % 16) for i, value in enumerate(values)]
    optimizer = fastadam.Adam(**case.options)
    for step in gradients:
        step = [placed(g, (offset + 5 * i + 1) % 16) for i, g in enumerate(step)] if offset else step
        optimizer.apply_gradients(zip(step, variables, strict=True))
    return [*variables, *optimizer.weights[1:]]


def assert_same_bits(case, arrays, golden):
    stored, digests = golden
    assert f"{case.name}/{len(arrays)}" not in stored
    for i, array in enumerate(arrays):
        key = f"{case.name}/{i}"
        head = array if array.size <= STORED else array.ravel()[:16]
        np.testing.assert_array_equal(bits(head), bits(stored[key]), err_msg=key)
        if array.size > STORED:
            assert digest(array) == digests[key], key


@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_trajectory_has_the_bits_of_tensorflow(case, isa, golden):
    assert_same_bits(case, run(case), golden)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["size_100003", "size_100003_amsgrad", "size_4097", "list"])
def test_bits_do_not_depend_on_the_thread_count(name, threads, isa, golden):
    fastadam.set_num_threads(threads)
    case = next(case for case in CASES if case.name == name)
    assert_same_bits(case, run(case), golden)


@pytest.mark.parametrize("offset", range(16))
@pytest.mark.parametrize("name", ["size_129", "size_4097_amsgrad", "list"])
def test_bits_do_not_depend_on_the_alignment(name, offset, isa, golden):
    case = next(case for case in CASES if case.name == name)
    assert_same_bits(case, run(case, offset), golden)


def test_a_variable_has_the_same_bits_alone_and_inside_a_list(golden):
    case = next(case for case in CASES if case.name == "list")
    values, gradients = case.arrays()
    for i, value in enumerate(values):
        optimizer = fastadam.Adam(**case.options)
        for step in gradients:
            optimizer.apply_gradients([(step[i], value)])
        np.testing.assert_array_equal(bits(value), bits(golden[0][f"list/{i}"]))


@pytest.mark.parametrize("name", ["size_129", "size_4097_amsgrad"])
def test_a_buffer_cut_in_pieces_has_the_same_bits_as_whole(name, isa, golden):
    case = next(case for case in CASES if case.name == name)
    (whole,), gradients = case.arrays()
    cuts = [0, 1, 5, 64, 100, whole.size]
    pieces = [slice(a, b) for a, b in pairwise(cuts)]
    optimizer = fastadam.Adam(**case.options)
    for (gradient,) in gradients:
        optimizer.apply_gradients([(gradient[piece], whole[piece]) for piece in pieces])
    slots = [
        np.concatenate([optimizer.get_slot(whole[p], name) for p in pieces]) for name in optimizer.get_slot_names()
    ]
    assert_same_bits(case, [whole, *slots], golden)


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "float64"], ids=str)
def test_float64_has_the_bits_of_tensorflow_with_double_hyperparameters(case, isa, golden):
    assert_same_bits(case, run(case), golden)
