"""What a step does beside the update, in the same pass: gradients of a half type, copies, gradients set to zero."""

from __future__ import annotations

import itertools

import fastadam
import ml_dtypes
import numpy as np
import pytest
from absent import need
from helpers import bits

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALVES = [BFLOAT16, np.dtype(np.float16)]
FLOATS = [*HALVES, np.dtype(np.float32)]
SIZES = [1, 31, 512, 513, 70_001]
NAMES = [str(dtype) for dtype in FLOATS]

OPTIONS = {
    "plain": {},
    "AMSGrad": {"amsgrad": True},
    "decay": {"weight_decay": 0.1},
    "clipvalue": {"clipvalue": 0.5},
    "global_clipnorm": {"global_clipnorm": 1.0},
    "averages": {"use_ema": True, "ema_overwrite_frequency": 2},
}


def variables(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(size).astype(dtype) for size in SIZES]


def gradients(step, dtype):
    rng = np.random.default_rng(100 + step)
    return [rng.standard_normal(size).astype(np.float32).astype(dtype) for size in SIZES]


@pytest.mark.parametrize("grad_dtype", FLOATS, ids=NAMES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_copies_and_half_gradients_change_no_bit_of_the_step(isa, options, grad_dtype):
    ours, plain = variables(), variables()
    copies = [np.zeros(w.shape, FLOATS[i % 3]) for i, w in enumerate(ours)]
    one, other = fastadam.Adam(0.1, **options), fastadam.Adam(0.1, **options)
    for step in range(4):
        grads = gradients(step, grad_dtype)
        one.apply_gradients(zip(grads, ours, strict=True), copies=copies)
        other.apply_gradients([(g.astype(np.float32), w) for g, w in zip(grads, plain, strict=True)])
        for w, expected, copy in zip(ours, plain, copies, strict=True):
            np.testing.assert_array_equal(bits(w), bits(expected))
            np.testing.assert_array_equal(bits(copy), bits(w.astype(copy.dtype)))
    for w, expected in zip(ours, plain, strict=True):
        for name in one.get_slot_names():
            np.testing.assert_array_equal(bits(one.get_slot(w, name)), bits(other.get_slot(expected, name)))


def patterns():
    """float32 numbers with every exponent, both signs, and low bits that are hard to round."""
    rng = np.random.default_rng(3)
    low = {13: [0x0FFF, 0x1000, 0x1001, 0x1FFF], 16: [0x7FFF, 0x8000, 0x8001, 0xFFFF]}
    tails = sorted({0, 1, *(tail for tails in low.values() for tail in tails)})
    heads = [0, 0x7F0000, 0x7E0000, 0x010000, *(rng.integers(0, 128, 12) << 16).tolist()]
    heads += (rng.integers(0, 1024, 16) << 13).tolist()
    found = [
        sign << 31 | exponent << 23 | (head & 0x7FFFFF) | tail
        for sign, exponent, head, tail in itertools.product((0, 1), range(256), heads, tails)
    ]
    return np.array(found, np.uint32).view(np.float32)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", HALVES, ids=NAMES[:2])
def test_copies_are_what_torch_rounds_to(isa, dtype, offset):
    need("torch")
    import torch

    room = np.zeros(patterns().size + 32, np.float32)
    w = room[offset : offset + patterns().size]
    w[...] = patterns()
    copy = np.zeros(w.size + 32, dtype)[offset : offset + w.size]
    with np.errstate(invalid="ignore"):
        fastadam.Adam(1e-30).apply_gradients([(np.zeros_like(w), w)], copies=[copy])
    kind = torch.bfloat16 if dtype == BFLOAT16 else torch.float16
    expected = torch.from_numpy(w.copy()).to(kind).view(torch.int16).numpy().view(np.uint16)
    numbers = ~np.isnan(w)
    np.testing.assert_array_equal(bits(copy)[numbers], expected[numbers])
    assert np.isnan(copy[~numbers].astype(np.float32)).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_copies_of_long_variables_go_past_the_caches(threads):
    w, g, copy = np.ones(2**21 + 700, np.float32), np.ones(2**21 + 700, np.float32), np.zeros(2**21 + 700, BFLOAT16)
    before = fastadam.get_num_threads()
    try:
        fastadam.set_num_threads(threads)
        fastadam.Adam(0.3).apply_gradients([(g, w)], copies=[copy])
    finally:
        fastadam.set_num_threads(before)
    np.testing.assert_array_equal(bits(copy), bits(w.astype(BFLOAT16)))


@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_copies_of_tables(mode):
    w = np.ones((50, 3), np.float32)
    copy = w.astype(BFLOAT16)
    opt = fastadam.Adam(0.1, sparse_update=mode)
    for ids in ([3, 7, 3], [7, 49]):
        grad = fastadam.IndexedSlices(np.ones((len(ids), 3), np.float32), np.array(ids))
        opt.apply_gradients([(grad, w)], copies=[copy])
        np.testing.assert_array_equal(bits(copy), bits(w.astype(BFLOAT16)))


def test_a_table_whose_rows_wait_has_no_copy():
    w, copy = np.ones((50, 3), np.float32), np.zeros((50, 3), BFLOAT16)
    grad = fastadam.IndexedSlices(np.ones((1, 3), np.float32), np.array([3]))
    opt = fastadam.Adam(sparse_update="deferred")
    with pytest.raises(ValueError, match=r"copies: of vars\[0\] in a deferred mode, expected None"):
        opt.apply_gradients([(grad, w)], copies=[copy])
    assert (w == 1).all()
    assert int(opt.iterations) == 0


def test_some_variables_have_copies():
    w, x, copy = np.ones(4, np.float32), np.ones(4, np.float32), np.zeros(4, np.float16)
    opt = fastadam.Adam(0.1)
    g = np.ones(4, np.float32)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        opt.apply_gradients([(None, x), (g, w)], copies=[None, copy])
    opt.apply_gradients([(g, x), (g, w)], copies=[None, copy])
    np.testing.assert_array_equal(copy, w.astype(np.float16))


def test_each_call_writes_the_copies_that_it_is_given():
    w, g = np.ones(4, np.float32), np.ones(4, np.float32)
    first, second = np.zeros(4, np.float16), np.zeros(4, BFLOAT16)
    opt = fastadam.Adam(0.1)
    for copy in (first, first, second, None, first):
        kept = first.copy(), second.copy()
        opt.apply_gradients([(g, w)], copies=None if copy is None else [copy])
        for array, before in zip((first, second), kept, strict=True):
            np.testing.assert_array_equal(array, w.astype(array.dtype) if array is copy else before)


def test_calls_may_have_fewer_or_more_variables_with_copies():
    variables = [np.ones(4, np.float32) for _ in range(3)]
    opt = fastadam.Adam(0.1)
    for count in (3, 1, 2, 3, 1):
        used, copies = variables[-count:], [np.zeros(4, BFLOAT16) for _ in range(count)]
        opt.apply_gradients([(np.ones(4, np.float32), w) for w in used], copies=copies)
        for w, copy in zip(used, copies, strict=True):
            np.testing.assert_array_equal(copy, w.astype(BFLOAT16))


def test_a_loss_scale_skips_copies_too():
    w, copy, zeroed = np.ones(2, np.float32), np.zeros(2, np.float16), np.array([np.inf, 1], np.float32)
    opt = fastadam.LossScaleOptimizer(fastadam.Adam(0.1), initial_scale=2.0)
    opt.apply_gradients([(zeroed, w)], copies=[copy], zero_grads=True)
    assert copy.tolist() == [0, 0]
    assert zeroed.tolist() == [np.inf, 1]
    assert w.tolist() == [1, 1]
    good = np.array([2, 2], np.float32)
    opt.apply_gradients([(good, w)], copies=[copy], zero_grads=True)
    assert copy.tolist() == w.astype(np.float16).tolist()
    assert good.tolist() == [0, 0]


def test_adam_step_writes_copies_and_zeroes_gradients():
    w, m, v, g = np.ones(3, np.float32), np.zeros(3, np.float32), np.zeros(3, np.float32), np.ones(3, BFLOAT16)
    copy = np.zeros(3, BFLOAT16)
    fastadam.adam_step(w, g, m, v, step=1, learning_rate=0.1, copies=copy, zero_grads=True)
    np.testing.assert_array_equal(bits(copy), bits(w.astype(BFLOAT16)))
    assert (g.astype(np.float32) == 0).all()
    assert (m != 0).all()


REFUSED = {
    "too many": (lambda w, g: [np.zeros(3, np.float16)] * 2, ValueError, "copies: 2 items, expected 1"),
    "an array": (lambda w, g: np.zeros(3, np.float16), TypeError, "copies: one ndarray, expected a list"),
    "shape": (lambda w, g: [np.zeros(2, np.float16)], ValueError, r"copies\[0\]: shape \(2,\), expected \(3,\)"),
    "float64": (lambda w, g: [np.zeros(3)], TypeError, r"copies\[0\]: float64, expected bfloat16, float16 or float32"),
    "integers": (lambda w, g: [np.zeros(3, int)], TypeError, r"copies\[0\]: dtype int64"),
    "a list": (lambda w, g: [[0, 0, 0]], TypeError, r"copies\[0\]: list, expected a writable float array"),
    "the variable": (lambda w, g: [w], ValueError, r"copies\[0\]: overlaps vars\[0\]"),
    "the gradient": (lambda w, g: [g], ValueError, r"grads\[0\]: shares memory with copies\[0\]"),
    "strided": (lambda w, g: [np.zeros(6, np.float16)[::2]], ValueError, r"copies\[0\]: strides"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_wrong_copies_are_refused(case):
    make, error, text = case
    w, g = np.ones(3, np.float32), np.ones(3, np.float32)
    opt = fastadam.Adam()
    with pytest.raises(error, match=text):
        opt.apply_gradients([(g, w)], copies=make(w, g))
    assert (w == 1).all()
    assert int(opt.iterations) == 0


def test_a_read_only_copy_is_refused():
    copy = np.zeros(3, np.float16)
    copy.flags.writeable = False
    with pytest.raises(ValueError, match=r"copies\[0\]: read-only"):
        fastadam.Adam().apply_gradients([(np.ones(3, np.float32), np.ones(3, np.float32))], copies=[copy])


@pytest.mark.parametrize("dtype", [np.float64, np.float16, BFLOAT16], ids=str)
def test_only_float32_variables_have_copies(dtype):
    w = np.ones(3, dtype)
    with pytest.raises(TypeError, match=r"copies\[0\]: of (float64|float16|bfloat16) vars\[0\], expected a float32"):
        fastadam.Adam().apply_gradients([(np.ones(3, dtype), w)], copies=[np.zeros(3, np.float16)])


def test_a_variable_that_comes_twice_has_one_copy():
    w, copy = np.ones(3, np.float32), np.zeros(3, np.float16)
    pairs = [(np.ones(3, np.float32), w), (np.full(3, 2, np.float32), w)]
    with pytest.raises(ValueError, match=r"copies\[1\]: of vars\[1\], which comes twice"):
        fastadam.Adam().apply_gradients(pairs, copies=[None, copy])
    fastadam.Adam(0.1).apply_gradients(pairs, copies=[copy, None])
    np.testing.assert_array_equal(copy, w.astype(np.float16))


@pytest.mark.parametrize("dtype", [*FLOATS, np.dtype(np.float64)], ids=str)
def test_gradients_are_set_to_zero_after_the_step(isa, dtype):
    w, expected = np.ones(1000, dtype), np.ones(1000, dtype)
    opt, plain = fastadam.Adam(0.1), fastadam.Adam(0.1)
    for step in range(3):
        grad = np.full(1000, step + 1, dtype)
        plain.apply_gradients([(grad.copy(), expected)])
        opt.apply_gradients([(grad, w)], zero_grads=True)
        assert not bits(grad).any()
        np.testing.assert_array_equal(bits(w), bits(expected))
    kept = np.ones(1000, dtype)
    opt.apply_gradients([(kept, w)])  # the option holds for one call
    assert (kept == 1).all()


NOT_ZEROED = {
    "converted": ([1.0, 2.0, 3.0], r"grads\[0\]: list that has to be converted"),
    "another dtype": (np.ones(3, np.float64), r"grads\[0\]: ndarray that has to be converted"),
    "read-only": (np.broadcast_to(np.float32(1), 3).copy(), r"grads\[0\]: read-only, expected a writable array"),
}


@pytest.mark.parametrize(("grad", "text"), NOT_ZEROED.values(), ids=NOT_ZEROED)
def test_gradients_that_cannot_be_set_to_zero_are_refused(grad, text):
    if "read-only" in text:
        grad.flags.writeable = False
    w, opt = np.ones(3, np.float32), fastadam.Adam()
    with pytest.raises(ValueError, match=text):
        opt.apply_gradients([(grad, w)], zero_grads=True)
    assert (w == 1).all()


def test_rows_are_not_set_to_zero():
    grad = fastadam.IndexedSlices(np.ones((1, 3), np.float32), np.array([0]))
    with pytest.raises(ValueError, match=r"zero_grads: with IndexedSlices for vars\[0\], expected dense gradients"):
        fastadam.Adam().apply_gradients([(grad, np.ones((2, 3), np.float32))], zero_grads=True)


@pytest.mark.parametrize("options", [{"copies": [np.zeros(3, np.float16)]}, {"zero_grads": True}], ids=str)
def test_accumulated_gradients_make_no_copies(options):
    opt = fastadam.Adam(gradient_accumulation_steps=2)
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name}: with gradient_accumulation_steps, expected (None|False)"):
        opt.apply_gradients([(np.ones(3, np.float32), np.ones(3, np.float32))], **options)


def test_half_gradients_of_a_float32_variable_are_clipped_by_their_norm():
    w, expected = np.ones(1000, np.float32), np.ones(1000, np.float32)
    g = np.random.default_rng(0).standard_normal(1000).astype(BFLOAT16)
    for opt, grad, variable in ((fastadam.Adam(0.1), g, w), (fastadam.Adam(0.1), g.astype(np.float32), expected)):
        opt.clipnorm = 0.25
        opt.apply_gradients([(grad, variable)])
    np.testing.assert_array_equal(bits(w), bits(expected))


def test_gradients_may_change_their_dtype_from_step_to_step():
    w, expected = np.ones(9, np.float32), np.ones(9, np.float32)
    one, other = fastadam.Adam(0.1), fastadam.Adam(0.1)
    for dtype in (np.float32, BFLOAT16, np.float16, BFLOAT16, np.float32, np.float64, BFLOAT16):
        grad = np.linspace(-1, 1, 9).astype(dtype)
        one.apply_gradients([(grad, w)])
        other.apply_gradients([(grad.astype(np.float32), expected)])
        np.testing.assert_array_equal(bits(w), bits(expected))
