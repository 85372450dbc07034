"""Files of optimizers with small states: they go on to the bit, convert, and are refused when they are damaged."""

from __future__ import annotations

import json
import re
import zlib

import codes_reference as codes
import fastadam
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from small_state_cases import EVERY, as_bits, assert_same_bits, gradient_of, slots_of, train, trained

F32, BF16 = np.float32, ml_dtypes.bfloat16


def saved(path, options, dtype=F32, **kwargs):
    optimizer, variables = trained(options, dtype, **kwargs)
    optimizer.save(path)
    return optimizer, variables


def state_of(optimizer, variable):
    return {name: array.copy() for name, array in slots_of(optimizer, variable).items()}


# ---- to the bit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("options", "dtype"), EVERY)
def test_training_goes_on_to_the_bit(tmp_path, options, dtype, order):
    def laid(values):
        return np.asarray(values.reshape(50, -1), order=order)

    variables = [
        laid(np.random.default_rng(i).standard_normal(size).astype(dtype)) for i, size in enumerate((5000, 100))
    ]
    optimizer = fastadam.AdamW(0.01, **options)

    def step(optimizer, variables, t):
        optimizer.apply_gradients([(gradient_of(t, i, v.size).reshape(v.shape), v) for i, v in enumerate(variables)])

    for t in range(3):
        step(optimizer, variables, t)
    optimizer.save(tmp_path / "state")
    others = [v.copy(order="K") for v in variables]
    again = fastadam.AdamW.load(tmp_path / "state", others)
    for t in range(3, 6):
        step(optimizer, variables, t)
        step(again, others, t)
    for a, b in zip(variables, others, strict=True):
        assert_same_bits(a, b)
    for a, b in zip(optimizer.get_weights(), again.get_weights(), strict=True):
        assert_same_bits(np.asarray(a), np.asarray(b))
    assert again.get_config() == optimizer.get_config()


def test_variables_keep_their_numbers_in_files_of_some_of_them_in_another_order(tmp_path):
    optimizer, (a, b, c) = trained({"moments": "8bit"}, sizes=(5000, 6000, 7000))
    optimizer.save(tmp_path / "state", [c, a])
    d, e = c.copy(), a.copy()
    again = fastadam.Adam.load(tmp_path / "state", [d, e])
    new = b.copy()
    for t in range(3, 5):
        gradients = [gradient_of(t, i, v.size) for i, v in enumerate((a, b, c))]
        optimizer.apply_gradients(zip(gradients, (a, b, c), strict=True))
        again.apply_gradients(zip(gradients, (e, new, d), strict=True))
    assert_same_bits(a, e)
    assert_same_bits(c, d)


def test_the_middle_of_an_accumulation_goes_on_to_the_bit(tmp_path):
    optimizer, variables = saved(tmp_path / "state", {"moments": "8bit", "gradient_accumulation_steps": 2})
    others = [v.copy() for v in variables]
    again = fastadam.Adam.load(tmp_path / "state", others)
    train(optimizer, variables, 3, 6)
    train(again, others, 3, 6)
    for a, b in zip(variables, others, strict=True):
        assert_same_bits(a, b)


def test_a_table_goes_on_in_float32(tmp_path):
    table, w = np.ones((100, 64), F32), np.ones(5000, F32)
    optimizer = fastadam.Adam(moments="8bit")
    rows = fastadam.IndexedSlices(np.ones((1, 64), F32), [3])
    optimizer.apply_gradients([(rows, table), (np.ones_like(w), w)])
    optimizer.save(tmp_path / "state")
    others = [table.copy(), w.copy()]
    again = fastadam.Adam.load(tmp_path / "state", others)
    for optimizer_, (t, v) in ((optimizer, (table, w)), (again, others)):
        optimizer_.apply_gradients([(rows, t), (np.ones_like(v), v)])
    assert_same_bits(table, others[0])
    assert_same_bits(w, others[1])


def test_a_loss_scale_optimizer_keeps_small_states(tmp_path):
    w = np.ones(5000, F32)
    optimizer = fastadam.LossScaleOptimizer(fastadam.Adam(0.01, moments="8bit"), initial_scale=2.0)
    optimizer.apply_gradients([(gradient_of(0, 0, 5000), w)])
    optimizer.save(tmp_path / "state")
    other = w.copy()
    again = fastadam.LossScaleOptimizer.load(tmp_path / "state", [other])
    for each, v in ((optimizer, w), (again, other)):
        each.apply_gradients([(gradient_of(1, 0, 5000), v)])
    assert_same_bits(w, other)
    wide = fastadam.LossScaleOptimizer.load(tmp_path / "state", [w.copy()], changes={"moments": None})
    assert wide.inner_optimizer.moments is None


def test_the_file_says_what_it_holds(tmp_path):
    saved(tmp_path / "state", {"moments": "8bit", "master": "split", "seed": 5}, BF16)
    with safetensors.safe_open(tmp_path / "state", framework="numpy") as file:
        header = json.loads(file.metadata()["fastadam"])
        dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert (header["version"], header["moments"], header["block"], header["numbers"]) == (
        3,
        ["8bit", "float32"],
        128,
        [0, 1],
    )
    assert header["config"]["moments"] == "8bit"
    codes_of_0 = {"0/m": "U8", "0/v": "U8", "0/m_scale": "U8", "0/v_scale": "U8", "0/low": "I16"}
    assert dtypes == {"iterations": "I64", **codes_of_0, "1/m": "F32", "1/v": "F32", "1/low": "I16"}


def test_a_function_as_float32_for_cannot_be_saved(tmp_path):
    optimizer = fastadam.Adam(moments="8bit", float32_for=lambda name, shape: False)
    with pytest.raises(ValueError, match="float32_for: a function, expected a size, a list of patterns or None"):
        optimizer.save(tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


# ---- conversions -------------------------------------------------------------------------------------------------------

CHOICES = {
    "float32": {},
    "bfloat16": {"moments": "bfloat16"},
    "8bit": {"moments": "8bit"},
}


@pytest.mark.parametrize("after", CHOICES)
@pytest.mark.parametrize("before", CHOICES)
def test_moments_are_converted_with_the_words_of_the_files_step(tmp_path, before, after):
    optimizer, (w, b) = saved(tmp_path / "state", {**CHOICES[before], "seed": 11})
    changes = {"moments": CHOICES[after].get("moments")}
    others = [w.copy(), b.copy()]
    again = fastadam.Adam.load(tmp_path / "state", others, changes=changes)
    assert again.iterations == 3
    assert again.moments == changes["moments"]
    stored = slots_of(again, others[0])
    if before == after:
        for name, array in slots_of(optimizer, w).items():
            assert_same_bits(stored[name], array)
    else:
        word = codes.words(codes.key(11, 3, 0), np.arange(w.size))
        for name, code in (("m", codes.M), ("v", codes.V)):
            values = np.asarray(optimizer.get_slot(w, name)).astype(F32)
            if after == "8bit":
                expected, scales = codes.store(code, values, 128, word)
                assert np.array_equal(stored[f"{name}_scale"], scales)
            else:
                expected = codes.bfloat16(values, word >> 16) if after == "bfloat16" else values
            assert np.array_equal(as_bits(stored[name]), as_bits(expected)), name
    fresh = fastadam.Adam(0.01, **CHOICES[after])
    fresh.build([w.copy(), b.copy()])
    assert [a.dtype for a in fresh.weights] == [a.dtype for a in again.weights]
    assert [a.shape for a in fresh.weights] == [a.shape for a in again.weights]
    again.apply_gradients([(np.ones_like(v), v) for v in others])


def test_a_file_of_version_1_loads_into_every_choice(tmp_path):
    """It has neither "moments" nor "block" nor "numbers"."""
    path = tmp_path / "state"
    optimizer, variables = saved(path, {})
    rewrite(
        path, lambda header: [header.pop(key) for key in ("moments", "block", "numbers")] and header.update(version=1)
    )
    again = fastadam.Adam.load(path, variables)
    for a, b in zip(optimizer.get_weights(), again.get_weights(), strict=True):
        assert_same_bits(np.asarray(a), np.asarray(b))
    small = fastadam.Adam.load(path, variables, changes={"moments": "8bit", "float32_for": 5001})
    assert [a.dtype for a in small.weights[1:]] == [F32] * 4
    small = fastadam.Adam.load(path, variables, changes={"moments": "8bit", "float32_for": 0})
    assert slots_of(small, variables[1])["m"].dtype == np.uint8


def test_a_master_is_split_or_joined_at_load(tmp_path):
    path = tmp_path / "state"
    optimizer, (w, b) = saved(path, {"master": "split"}, BF16)
    joined = fastadam.Adam.load(path, [w.copy(), b.copy()], changes={"master": None})
    assert joined.get_slot_names() == ["m", "v"]
    joined.save(path)
    others = [w.copy(), b.copy()]
    split = fastadam.Adam.load(path, others, changes={"master": "split"})
    assert not split.get_slot(others[0], "low").any()
    assert optimizer.get_slot(w, "low").any()
    split.apply_gradients([(np.ones_like(v), v) for v in others])
    assert split.get_slot(others[0], "low").any()


def test_codes_of_another_layout_are_written_anew(tmp_path):
    w = np.random.default_rng(0).standard_normal((60, 100)).astype(F32)
    optimizer = fastadam.Adam(0.01, moments="8bit")
    optimizer.apply_gradients([(gradient_of(0, 0, 6000).reshape(60, 100), w)])
    optimizer.save(tmp_path / "state")
    other = np.asfortranarray(w)
    again = fastadam.Adam.load(tmp_path / "state", [other])
    word = codes.words(codes.key(0, 1, 0), np.arange(6000))
    values = optimizer.get_slot(w, "m").reshape(-1, order="F")
    expected, _ = codes.store(codes.M, values, 128, word)
    assert np.array_equal(slots_of(again, other)["m"].reshape(-1, order="F"), expected)


BAD_CHANGES = {
    "list": (["moments"], TypeError, "changes: list, expected a dict such as {'moments': '8bit'}"),
    "name": ({"beta_1": 0.5}, ValueError, "changes: 'beta_1', expected some of ['moments', 'master'"),
    "value": ({"moments": "4bit"}, ValueError, "moments: '4bit', expected"),
    "together": ({"float32_for": 5}, ValueError, "float32_for: 5 with moments=None, expected None"),
}


@pytest.mark.parametrize("mistake", BAD_CHANGES)
def test_mistakes_in_changes(tmp_path, mistake):
    changes, error, message = BAD_CHANGES[mistake]
    _, variables = saved(tmp_path / "state", {})
    with pytest.raises(error, match=re.escape(message)):
        fastadam.Adam.load(tmp_path / "state", variables, changes=changes)


def test_amsgrad_cannot_become_8bit(tmp_path):
    _, variables = saved(tmp_path / "state", {"amsgrad": True})
    with pytest.raises(ValueError, match="amsgrad: True with moments='8bit', expected False"):
        fastadam.Adam.load(tmp_path / "state", variables, changes={"moments": "8bit"})
    again = fastadam.Adam.load(tmp_path / "state", variables, changes={"moments": "bfloat16"})
    assert slots_of(again, variables[0])["vhat"].dtype == BF16


# ---- files that are damaged, or made by someone who knows the format ---------------------------------------------------


def rewrite(path, change=lambda header: None, tensors=None, without=()):
    """The file with another header and other tensors, and checksums that fit."""
    with safetensors.safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["fastadam"])
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    arrays = {key: array for key, array in {**arrays, **(tensors or {})}.items() if key not in without}
    order = [key for key, _ in header["weights"] if key in arrays] + [key for key in (tensors or {}) if key in arrays]
    header["weights"] = [[key, zlib.crc32(arrays[key].reshape(-1).view(np.uint8).data)] for key in dict.fromkeys(order)]
    header["slots"] = [
        [key.partition("/")[2] for key, _ in header["weights"] if key.startswith(f"{i}/")] for i in range(2)
    ]
    change(header)
    text = json.dumps(header)
    metadata = {"fastadam": text, "fastadam_crc32": str(zlib.crc32(text.encode()))}
    safetensors.numpy.save_file(arrays, path, metadata)


NBLOCKS = 40  # of 5000 elements
U8 = np.uint8
DAMAGED = {
    "codes without scales": ({"without": ["0/m_scale"]}, "no tensor '0/m_scale', expected it beside the slots"),
    "codes without any scales": ({"without": ["0/m_scale", "0/v_scale"]}, "no tensor '0/m_scale', expected it beside"),
    "scales without codes": ({"without": ["0/m"]}, "no tensor '0/m', expected it beside the slots"),
    "one code too few": ({"tensors": {"0/m": np.zeros(4999, U8)}}, "tensor '0/m' U8 (4999,), expected U8 (5000,)"),
    "one scale too few": ({"tensors": {"0/m_scale": np.zeros(NBLOCKS - 1, U8)}},
                          "tensor '0/m_scale' U8 (39,), expected U8 (40,)"),
    "one scale too many": ({"tensors": {"0/v_scale": np.zeros(NBLOCKS + 1, U8)}},
                           "tensor '0/v_scale' U8 (41,), expected U8 (40,)"),
    "scales of another dtype": ({"tensors": {"0/v_scale": np.zeros(NBLOCKS, F32)}},
                                "tensor '0/v_scale' F32 (40,), expected U8 (40,)"),
    "codes in float32": ({"tensors": {"0/v": np.zeros(5000, F32)}}, "tensor '0/v' F32 (5000,), expected U8 (5000,)"),
    "codes of a float32 variable": ({"tensors": {"1/m": np.zeros(100, U8)}}, "tensor '1/m' U8 (100,), expected F32 (100,)"),
    "scales of float32 moments": ({"tensors": {"1/m_scale": np.zeros(1, U8)}},
                                  "tensor '1/m_scale', expected no such one with float32 moments of a float32 variable"),
    "low half of a float32 variable": ({"tensors": {"0/low": np.zeros(5000, np.int16)}},
                                       "tensor '0/low', expected no such one with 8bit moments of a float32 variable"),
    **{f"scale byte {byte}": ({"tensors": {"0/m_scale": np.full(NBLOCKS, byte, U8)}},
                              f"tensor '0/m_scale': scale byte {byte}, expected 0, 35 to 253, or 255: it is damaged")
       for byte in (1, 2, 34, 254)},
    "one bad scale byte of v": ({"tensors": {"0/v_scale": np.array([0] * (NBLOCKS - 1) + [17], U8)}},
                                "tensor '0/v_scale': scale byte 17, expected 0, 35 to 253, or 255"),
    "block": ({"change": lambda h: h.update(block=64)}, "'block' 64, expected 128"),
    "block bool": ({"change": lambda h: h.update(block=True)}, "'block' True, expected 128"),
    "moments missing": ({"change": lambda h: h.pop("moments")}, "'moments' None, expected moments of 2 variables"),
    "moments text": ({"change": lambda h: h.update(moments="8bit")}, "'moments' '8bit', expected moments of 2 variables"),
    "moments unknown": ({"change": lambda h: h.update(moments=["8bit", "4bit"])}, "expected moments of 2 variables"),
    "moments unhashable": ({"change": lambda h: h.update(moments=["8bit", []])}, "expected moments of 2 variables"),
    "moments of fewer": ({"change": lambda h: h.update(moments=["8bit"])}, "expected moments of 2 variables"),
    "moments swapped": ({"change": lambda h: h.update(moments=["float32", "8bit"])}, "no tensor '1/m_scale'"),
    "moments none": ({"change": lambda h: h.update(moments=[None, "float32"])}, "tensor '0/m"),
    "numbers missing": ({"change": lambda h: h.pop("numbers")}, "'numbers' None, expected numbers of 2 variables"),
    "numbers twice": ({"change": lambda h: h.update(numbers=[1, 1])}, "'numbers' [1, 1], expected numbers of 2 variables"),
    "numbers negative": ({"change": lambda h: h.update(numbers=[-1, 1])}, "'numbers' [-1, 1]"),
    "numbers bool": ({"change": lambda h: h.update(numbers=[False, 1])}, "'numbers' [False, 1]"),
    "numbers large": ({"change": lambda h: h.update(numbers=[0, 2**64])}, "'numbers' [0, 184"),
    "numbers float": ({"change": lambda h: h.update(numbers=[0.0, 1])}, "'numbers' [0.0, 1]"),
    "a newer version": ({"change": lambda h: h.update(version=4)}, "format version 4, expected 1 to 3"),
    "version 1": ({"change": lambda h: h.update(version=1)}, "tensor '0/m"),
    "seed": ({"change": lambda h: h["config"].update(seed=-1)}, "Adam refuses its config (seed: -1"),
    "config moments": ({"change": lambda h: h["config"].update(moments="1bit")}, "Adam refuses its config (moments: '1bit'"),
    "amsgrad": ({"change": lambda h: h["config"].update(amsgrad=True)}, "Adam refuses its config (amsgrad: True with"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_and_nothing_changes(tmp_path, kind):
    arguments, message = DAMAGED[kind]
    path = tmp_path / "state"
    optimizer, variables = saved(path, {"moments": "8bit"})
    values = [v.copy() for v in variables]
    rewrite(path, **arguments)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        fastadam.Adam.load(path, variables)
    assert str(caught.value).startswith(str(path))
    for a, b in zip(variables, values, strict=True):
        assert_same_bits(a, b)
    optimizer.apply_gradients([(np.ones_like(v), v) for v in variables])


def test_a_file_that_was_only_rewritten_loads(tmp_path):
    path = tmp_path / "state"
    optimizer, variables = saved(path, {"moments": "8bit"})
    rewrite(path)
    again = fastadam.Adam.load(path, variables)
    for a, b in zip(optimizer.get_weights(), again.get_weights(), strict=True):
        assert_same_bits(np.asarray(a), np.asarray(b))


def test_a_scale_that_is_not_a_number_loads(tmp_path):
    path = tmp_path / "state"
    _, variables = saved(path, {"moments": "8bit"})
    rewrite(path, tensors={"0/m_scale": np.full(NBLOCKS, 255, U8)})
    again = fastadam.Adam.load(path, variables)
    assert np.isnan(again.get_slot(variables[0], "m")).all()


def test_moments_that_the_configuration_does_not_have_are_converted(tmp_path):
    path = tmp_path / "state"
    optimizer, variables = saved(path, {"moments": "8bit"})
    rewrite(path, change=lambda header: header["config"].pop("moments"))
    again = fastadam.Adam.load(path, variables)
    assert_same_bits(slots_of(again, variables[0])["m"], np.array(optimizer.get_slot(variables[0], "m")))


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "state"
    _, variables = saved(path, {"moments": "8bit", "float32_for": 0}, sizes=(130, 3))
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            fastadam.Adam.load(path, variables)


def test_every_byte_of_codes_and_scales_is_covered_by_a_checksum(tmp_path):
    path = tmp_path / "state"
    _, variables = saved(path, {"moments": "8bit", "float32_for": 0}, sizes=(130, 3))
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    for at in range(begin, len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match="checksum"):
            fastadam.Adam.load(path, variables)


def test_codes_of_zero_elements_and_of_scalars(tmp_path):
    path = tmp_path / "state"
    variables = [np.zeros((0, 3), F32), np.zeros((), F32), np.ones((2, 65), F32)]
    optimizer = fastadam.Adam(moments="8bit", float32_for=0)
    optimizer.apply_gradients([(np.ones_like(v), v) for v in variables])
    optimizer.save(path)
    again = fastadam.Adam.load(path, variables)
    assert [a.shape for a in again.weights[7:10]] == [(0,), (1,), (2,)]
    again.apply_gradients([(np.ones_like(v), v) for v in variables])


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred", "deferred_fast"])
@pytest.mark.parametrize(
    "options", [{"moments": "8bit"}, {"moments": "bfloat16"}, {"moments": "8bit", "use_ema": True}]
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_delta_of_a_variable_that_had_no_gradient(mode, options, resumed, tmp_path):
    """As of layers that are frozen; after `load` nothing says yet whether its gradients are sparse."""
    variables = [np.ones((70, 64), F32), np.ones((100, 4), F32)]
    optimizer = fastadam.Adam(1e-3, sparse_update=mode, **options)

    def step(*which):
        gradients = [np.ones((70, 64), F32), fastadam.IndexedSlices(np.ones((1, 4), F32), [3])]
        optimizer.gather(variables[1], [3])
        optimizer.apply_gradients([(gradients[k], variables[k]) for k in which])

    step(0, 1)
    optimizer.save(tmp_path / "base", values=True)
    if resumed:
        optimizer = fastadam.Adam.load(tmp_path / "base", variables)
    deltas = [tmp_path / "1", tmp_path / "2"]
    for path, which in zip(deltas, ([1], [0, 1]), strict=True):
        step(*which)
        optimizer.save_delta(path)
    fastadam.merge_deltas(tmp_path / "base", deltas, tmp_path / "merged")
    optimizer.sync()
    for base, rest in ((tmp_path / "base", deltas), (tmp_path / "merged", [])):
        found = [np.empty_like(v) for v in variables]
        loaded = fastadam.Adam.load(base, found, deltas=rest)
        loaded.sync()
        for a, b in zip([*found, *loaded.get_weights()], [*variables, *optimizer.get_weights()], strict=True):
            np.testing.assert_array_equal(as_bits(a), as_bits(b))
