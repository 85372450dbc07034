"""What a step measures of itself: against float64, and the same bits however it is made."""

from __future__ import annotations

import itertools

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import aligned
from helpers import bits

SIZES = [1, 3, 511, 512, 513, 70_001]
MEASURES = ("gradient_norm", "update_rms", "parameter_rms", "unchanged", "not_finite")


def arrays(seed, dtype=np.float32, offset=0, scale=1.0):
    rng = np.random.default_rng(seed)
    made = []
    for size in SIZES:
        array = aligned((size,), np.dtype(dtype), offset)
        array[...] = rng.standard_normal(size) * scale
        made.append(array)
    return made


def measured(grads, before, after, copy_dtype=None):
    """The same from their definitions, in float64."""
    rows = []
    for g, old, new in zip(grads, before, after, strict=True):
        g, change, now = g.astype(np.float64), new.astype(np.float64) - old.astype(np.float64), new.astype(np.float64)
        dtype = copy_dtype or new.dtype
        same = (old.astype(dtype) == new.astype(dtype)).mean()
        norm, update, parameter = np.sqrt((g**2).sum()), np.sqrt((change**2).mean()), np.sqrt((now**2).mean())
        rows.append((norm, update, parameter, same, np.count_nonzero(~np.isfinite(g))))
    return np.array(rows).T


def assert_close(report, expected):
    for name, values in zip(MEASURES, expected, strict=True):
        np.testing.assert_allclose(getattr(report, name), values, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"weight_decay": 0.1}, {"clipvalue": 0.5}], ids=str)
def test_measures_are_those_of_float64(isa, dtype, options):
    w, opt = arrays(0, dtype), fastadam.Adam(0.01, telemetry=True, **options)
    for step in range(3):
        grads, before = arrays(step + 1, dtype), [x.copy() for x in w]
        opt.apply_gradients(zip(grads, w, strict=True))
        assert_close(opt.telemetry(), measured(grads, before, w))


@pytest.mark.parametrize("copy_dtype", ["bfloat16", "float16", "float32"])
def test_the_share_that_did_not_change_is_that_of_the_copy(isa, copy_dtype):
    dtype = np.dtype(ml_dtypes.bfloat16 if copy_dtype == "bfloat16" else copy_dtype)
    w, opt = arrays(0), fastadam.Adam(1e-4, telemetry=True)
    copies = [np.zeros(x.shape, dtype) for x in w]
    for step in range(2):
        grads, before = arrays(step + 1), [x.copy() for x in w]
        opt.apply_gradients(zip(grads, w, strict=True), copies=copies)
        assert_close(opt.telemetry(), measured(grads, before, w, dtype))
    assert 0 <= opt.telemetry().unchanged[-1] <= 1


def report_of(isa, threads, offset, buckets):
    fastadam.set_isa(isa)
    fastadam.set_num_threads(threads)
    w, opt = arrays(0, offset=offset), fastadam.Adam(0.01, telemetry=True)
    opt.apply_gradients(zip(arrays(1, offset=offset), w, strict=True))
    chosen = opt.telemetry()
    return [bits(getattr(chosen, name)) for name in MEASURES]


def test_measures_have_the_same_bits_for_all_instruction_sets_threads_and_alignments():
    found = [report_of(*how, None) for how in itertools.product(fastadam.isas(), (1, 2, 5), (0, 1, 7))]
    for other in found[1:]:
        for mine, first in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(mine, first)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
def test_gradients_whose_squares_float32_does_not_have(scale):
    w, opt, grads = arrays(0), fastadam.Adam(0.01, telemetry=True), arrays(1, scale=scale)
    opt.apply_gradients(zip(grads, w, strict=True))
    expected = [np.sqrt((g.astype(np.float64) ** 2).sum()) for g in grads]
    np.testing.assert_allclose(opt.telemetry().gradient_norm, expected, rtol=1e-6)


@pytest.mark.parametrize("rate", [1e-12, 1e-3, 1e12])
def test_updates_of_any_size_are_measured(rate):
    w, opt = [np.zeros_like(x) for x in arrays(0)], fastadam.Adam(rate, telemetry=True)
    grads, before = arrays(1), [x.copy() for x in w]
    opt.apply_gradients(zip(grads, w, strict=True))
    np.testing.assert_allclose(opt.telemetry().update_rms, measured(grads, before, w)[1], rtol=1e-6)


@pytest.mark.parametrize("has_copy", [False, True])
def test_zero_that_becomes_minus_zero_is_unchanged(isa, has_copy):
    """The update is lost in the rounding to float16."""
    w = np.full(700, 5e-10, np.float32) if has_copy else np.zeros(700, np.float16)
    copies = [np.zeros(700, np.float16)] if has_copy else None
    opt = fastadam.Adam(1e-9, telemetry=True)
    opt.apply_gradients([(np.ones(700, w.dtype), w)], copies=copies)
    stored = copies[0] if has_copy else w
    assert (stored == 0).all()
    assert np.signbit(stored).all()
    assert opt.telemetry().unchanged.tolist() == [1]


@pytest.mark.parametrize("copy_dtype", [None, "float32", "float16"])
@pytest.mark.parametrize(("size", "gradient", "decay"), [(1e25, 1.0, 0.1), (0.0, 1e-30, None), (1e-27, 1e-29, None)])
def test_updates_far_from_the_rate_are_measured(isa, size, gradient, decay, copy_dtype):
    w, opt = arrays(0, scale=size), fastadam.Adam(0.01, weight_decay=decay, telemetry=True)
    grads, before = arrays(1, scale=gradient), [x.copy() for x in w]
    copies = {} if copy_dtype is None else {"copies": [np.zeros(x.shape, copy_dtype) for x in w]}
    opt.apply_gradients(zip(grads, w, strict=True), **copies)
    expected = measured(grads, before, w)[1]
    assert (expected > 0).all()
    np.testing.assert_allclose(opt.telemetry().update_rms, expected, rtol=1e-6)


def test_gradients_are_measured_unscaled_and_unclipped():
    w, g = np.ones(4, np.float32), np.full(4, 8, np.float32)
    opt = fastadam.LossScaleOptimizer(fastadam.Adam(0.1, global_clipnorm=0.5, telemetry=True), initial_scale=16.0)
    opt.apply_gradients([(g, w)])
    assert opt.inner_optimizer.telemetry().gradient_norm.tolist() == [1.0]


def test_infinite_and_nan_gradients_are_counted():
    w, g = np.ones(1000, np.float32), np.zeros(1000, np.float32)
    g[[3, 600, 601]] = np.nan, np.inf, -np.inf
    opt = fastadam.Adam(0.1, telemetry=True)
    opt.apply_gradients([(g, w)])
    assert opt.telemetry().not_finite.tolist() == [3]


def test_a_skipped_step_is_reported():
    w, x, bad = np.full(4, 2, np.float32), np.ones(3, np.float32), np.array([np.nan, 1, np.inf, 1], np.float32)
    opt = fastadam.LossScaleOptimizer(fastadam.Adam(0.1, telemetry=True), initial_scale=2.0)
    opt.apply_gradients([(bad, w), (np.full(3, 2, np.float32), x)])
    report = opt.inner_optimizer.telemetry()
    assert report.not_finite.tolist() == [2, 0]
    assert report.update_rms.tolist() == [0, 0]
    assert report.parameter_rms.tolist() == [2, 1]
    assert report.unchanged.tolist() == [1, 1]
    np.testing.assert_allclose(report.gradient_norm, [np.nan, np.sqrt(3)])


def test_the_report_as_a_dict():
    w = [fastadam.Variable(np.ones(2, np.float32), name="w"), np.ones(6, np.float32)]
    opt = fastadam.Adam(0.1, telemetry=True)
    opt.apply_gradients([(np.ones(2, np.float32), w[0]), (np.ones(6, np.float32), w[1])])
    flat = opt.telemetry().to_dict("adam/")
    assert flat["adam/gradient_norm"] == pytest.approx(np.sqrt(8))
    assert set(flat) == {f"adam/{m}{name}" for m in MEASURES for name in ("", "/w", "/vars[1]")}
    assert all(type(value) in (float, int) for value in flat.values())
    assert repr(opt.telemetry()).startswith("Telemetry(gradient_norm=2.82843, update_rms=0.0999")


def test_measuring_changes_no_bit():
    w, expected = arrays(0), arrays(0)
    one, other = fastadam.Adam(0.1, amsgrad=True, telemetry=True), fastadam.Adam(0.1, amsgrad=True)
    for step in range(3):
        one.apply_gradients(zip(arrays(step + 1), w, strict=True))
        other.apply_gradients(zip(arrays(step + 1), expected, strict=True))
    for mine, plain in zip(w, expected, strict=True):
        np.testing.assert_array_equal(bits(mine), bits(plain))


REFUSED = {
    "off": (lambda opt: opt, {}, RuntimeError, "telemetry: the optimizer measures no steps"),
    "no step": (lambda opt: opt, {"telemetry": True}, RuntimeError, "telemetry: no step was measured yet"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_without_a_measured_step_there_is_no_report(case):
    prepare, options, error, text = case
    with pytest.raises(error, match=text):
        prepare(fastadam.Adam(**options)).telemetry()


def test_what_cannot_be_measured_is_refused():
    w, opt = np.ones((4, 2), np.float32), fastadam.Adam(telemetry=True)
    rows = fastadam.IndexedSlices(np.ones((1, 2), np.float32), np.array([0]))
    with pytest.raises(ValueError, match=r"telemetry: with IndexedSlices for vars\[0\], expected dense gradients"):
        opt.apply_gradients([(rows, w)])
    g = np.ones((4, 2), np.float32)
    with pytest.raises(ValueError, match=r"telemetry: vars\[0\] comes twice, expected it once"):
        opt.apply_gradients([(g, w), (g.copy(), w)])
    with pytest.raises(ValueError, match="telemetry: with gradient_accumulation_steps, expected False"):
        fastadam.Adam(telemetry=True, gradient_accumulation_steps=2).apply_gradients([(g, w)])
    with pytest.raises(TypeError, match="telemetry: 1"):
        fastadam.Adam(telemetry=1)
    assert (w == 1).all()


def test_the_option_is_kept():
    opt = fastadam.AdamW(telemetry=True)
    assert opt.get_config()["telemetry"] is True
    assert fastadam.AdamW.from_config(opt.get_config()).get_config()["telemetry"] is True
    assert "telemetry" not in fastadam.Adam().get_config()
