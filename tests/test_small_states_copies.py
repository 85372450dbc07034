"""Small states as a user sees them: weights, slots, copies, the configuration."""

from __future__ import annotations

import copy
import pickle
import re

import codes_reference as codes
import fastadam
import numpy as np
import pytest
from fastadam._core.parts import parts_of
from small_state_cases import (
    BF16,
    BLOCK,
    EVERY,
    F32,
    assert_same_bits,
    first_values,
    gradient_of,
    slots_of,
    train,
    trained,
)

# ---- what a user sees --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "dtype"), EVERY)
def test_weights_are_the_stored_arrays_and_can_be_set_again(options, dtype):
    optimizer, variables = trained(options, dtype)
    again = fastadam.Adam.from_config(optimizer.get_config())
    others = [v.copy() for v in variables]
    again.build(others)
    again.set_weights(optimizer.get_weights())
    train(optimizer, variables, 3, 5)
    train(again, others, 3, 5)
    for a, b in zip(variables, others, strict=True):
        assert_same_bits(a, b)
    assert optimizer.variables()[1] is optimizer.weights[1]


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize(("options", "dtype"), EVERY)
def test_copies_go_on_to_the_bit(options, dtype, how):
    optimizer, variables = trained(options, dtype)
    again, others = how(optimizer), [v.copy() for v in variables]
    again.build(others)
    train(optimizer, variables, 3, 5)
    train(again, others, 3, 5)
    for a, b in zip(variables, others, strict=True):
        assert_same_bits(a, b)
    assert again.get_config() == optimizer.get_config()


def test_pickles_of_version_0_1_have_neither_formats_nor_numbers():
    optimizer, variables = trained({})
    options, state, _, _ = parts_of(optimizer)
    old = {name: value for name, value in options.__getstate__().items() if name != "small"}
    slots = state.slots.__getstate__()
    again, others = fastadam.Adam(moments="8bit"), [v.copy() for v in variables]
    parts_of(again).options.__setstate__(old)
    parts_of(again).state.slots.__setstate__({**slots, "entries": [entry[:3] for entry in slots["entries"]]})
    again.build(others)
    again.iterations = 3
    train(optimizer, variables, 3, 5)
    train(again, others, 3, 5)
    assert again.moments is None
    for a, b in zip(variables, others, strict=True):
        assert_same_bits(a, b)


def test_a_copy_in_another_layout_reads_the_same_moments_within_one_rounding():
    w = first_values(0, 6000, F32).reshape(60, 100)
    optimizer = fastadam.Adam(0.01, moments="8bit")
    optimizer.apply_gradients([(gradient_of(0, 0, 6000).reshape(60, 100), w)])
    again = pickle.loads(pickle.dumps(optimizer))
    other = np.asfortranarray(w)
    again.build([other])
    for name in ("m", "v"):
        a, b = optimizer.get_slot(w, name), again.get_slot(other, name)
        assert np.abs(a - b).max() <= np.abs(a).max() / 8
        assert abs(a.mean() - b.mean()) < 0.02 * np.abs(a).mean()


def test_numbers_follow_the_variable_not_the_call():
    """The noise of a variable does not depend on which others are stepped with it, or in which order."""
    a, b = first_values(0, 5000, F32), first_values(1, 5000, F32)
    c, d = a.copy(), b.copy()
    first, second = (fastadam.Adam(0.01, moments="8bit") for _ in range(2))
    first.build([a, b])
    second.build([c, d])
    for t in range(3):
        g, h = gradient_of(t, 0, 5000), gradient_of(t, 1, 5000)
        first.apply_gradients([(g, a), (h, b)])
        second.apply_gradients([(h, d), (g, c)])
    assert_same_bits(a, c)
    assert_same_bits(b, d)


def test_get_slot_reads_values():
    optimizer, (w, _) = trained({"moments": "8bit"})
    stored = slots_of(optimizer, w)
    for name, code in (("m", codes.M), ("v", codes.V)):
        values = optimizer.get_slot(w, name)
        assert_same_bits(values, codes.read(code, stored[name], stored[f"{name}_scale"], BLOCK))
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1
    assert optimizer.get_slot_names() == ["m", "v", "m_scale", "v_scale"]
    assert optimizer.get_slot(w, "m_scale") is stored["m_scale"]
    other, (w, _) = trained({"moments": "bfloat16"})
    assert other.get_slot(w, "m") is slots_of(other, w)["m"]
    assert other.get_slot(w, "m").dtype == BF16


def test_set_weights_refuses_what_is_not_such_a_state():
    optimizer, _ = trained({"moments": "8bit"})
    good = optimizer.get_weights()
    names = ["m", "m of b", "v", "v of b", "m_scale", "v_scale"]
    for at, name in enumerate(names, 1):
        if "of b" in name:
            continue
        bad = list(good)
        bad[at] = good[at].astype(F32)
        with pytest.raises(TypeError, match=re.escape(f"weights[{at}]: dtype float32, expected uint8")):
            optimizer.set_weights(bad)
    for byte in (1, 34, 254):
        bad = list(good)
        bad[5] = np.full_like(good[5], byte)
        with pytest.raises(
            ValueError, match=re.escape(f"weights[5]: scale byte {byte}, expected 0, 35 to 253, or 255")
        ):
            optimizer.set_weights(bad)
    bad = list(good)
    bad[6] = good[6][1:]
    with pytest.raises(ValueError, match="weight shape"):
        optimizer.set_weights(bad)
    with pytest.raises(ValueError, match="was expecting 7 weights. Small states are listed as they are stored"):
        optimizer.set_weights(good[:5])
    for array, expected in zip(optimizer.get_weights(), good, strict=True):
        assert_same_bits(np.asarray(array), np.asarray(expected))
    nan = list(good)
    nan[5] = np.full_like(good[5], 255)
    optimizer.set_weights(nan)
    assert np.isnan(optimizer.weights[5]).sum() == 0


@pytest.mark.parametrize("name", ["m", "v", "m_scale", "low"])
def test_add_slot_makes_no_half_of_a_small_state(name):
    w = np.zeros(5000, BF16)
    optimizer = fastadam.Adam(moments="8bit", master="split")
    with pytest.raises(
        ValueError, match=f"slot_name: '{name}', which belongs to small states of vars.0., expected build"
    ):
        optimizer.add_slot(w, name)
    assert len(optimizer.weights) == 1
    optimizer.build([w])
    assert optimizer.add_slot(w, name).dtype == {"low": np.int16}.get(name, np.uint8)
    assert optimizer.add_slot(w, "mine").dtype == F32


def test_the_configuration():
    plain = {*fastadam.Adam().get_config()}
    assert {"moments", "master", "stochastic_rounding", "float32_for", "seed"}.isdisjoint(plain)
    options = {"moments": "8bit", "master": "split", "float32_for": ["bias"], "seed": 2**64 - 1}
    optimizer = fastadam.AdamW(**options)
    assert {name: optimizer.get_config()[name] for name in options} == options
    assert fastadam.AdamW.from_config(optimizer.get_config()).get_config() == optimizer.get_config()
    assert repr(optimizer) == (
        "fastadam.AdamW(learning_rate=0.001, weight_decay=0.004, moments='8bit', master='split', float32_for=['bias'], "
        "seed=18446744073709551615)"
    )
    assert fastadam.Adam(moments="8bit", float32_for=np.int64(5)).get_config()["float32_for"] == 5


def test_the_exchange_reads_and_writes_values():
    """In float32, whatever the optimizer stores."""
    optimizer, (w, b) = trained({"moments": "8bit"})
    stored = fastadam.exchange.to_keras3_variables(optimizer, [w, b])
    assert_same_bits(stored["2"], optimizer.get_slot(w, "m"))
    again = fastadam.Adam(0.01, moments="8bit", seed=4)
    others = [w.copy(), b.copy()]
    fastadam.exchange.from_keras3_variables(again, stored, others)
    np.testing.assert_allclose(again.get_slot(others[0], "v"), optimizer.get_slot(w, "v"), rtol=0.13, atol=1e-12)
    assert_same_bits(again.get_slot(others[1], "v"), optimizer.get_slot(b, "v"))
