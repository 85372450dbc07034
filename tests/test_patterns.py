"""Patterns of `exclude_from_weight_decay` find what `re.search` finds, in bounded time."""

from __future__ import annotations

import re
import warnings

import fastadam
import numpy as np
import pytest
from fastadam._core.common.patterns import check_pattern, found
from hypothesis import given, settings
from hypothesis import strategies as st

ATOMS = [
    *("a", "b", "A", "/", "_", "0", "é", "-", "]", "{", "}", "a{", "{a}", "(?#comment)", "\n"),
    *(r"\d", r"\w", r"\W", r"\s", ".", "[ab]", "[^a]", "[]a]", "[^]a]", r"[\]b]", "^", "$", r"\b", r"\B", r"\A", r"\Z"),
    *(r"\.", r"\x61", r"\u0062", r"\141", r"\0", r"\N{LATIN SMALL LETTER A}", r"\/", r"\\", r"\n"),
]
GROUPS = ["(%s)", "(?:%s)", "(?i:%s)", "(?-i:%s)", "(?s:%s)", "(?m:%s)", "(?=%s)", "(?!%s)", "(?<=%s)", "(?<!%s)"]
QUANTIFIERS = ["*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "{,}", "*?", "+?", "??", "{1,2}?", "{}"]


def larger(parts):
    return st.one_of(
        st.tuples(parts, parts).map("".join),
        st.tuples(parts, parts).map("|".join),
        st.tuples(st.sampled_from(GROUPS), parts).map(lambda pair: pair[0] % pair[1]),
        st.tuples(parts, st.sampled_from(QUANTIFIERS)).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    )


patterns = st.tuples(
    st.sampled_from(["", "", "(?i)", "(?ms)"]), st.recursive(st.sampled_from(ATOMS), larger, max_leaves=8)
).map("".join)
texts = st.text("abA/_0 \n.é{},]-\0", max_size=7)


@pytest.mark.slow
@settings(max_examples=700, deadline=None)
@given(pattern=patterns, text=texts)
def test_what_is_found_is_what_re_finds(pattern, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of re, about sets in sets
        try:
            expected = re.search(pattern, text) is not None
        except re.error:
            with pytest.raises(ValueError, match="expected a pattern"):
                check_pattern(pattern)
            return
        assert found(pattern, text) is expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a)\1", "has a backreference, expected a pattern that can be matched without backtracking"),
        ("(?P<x>a)(?P=x)", "has a backreference, conditional or atomic group, expected a pattern that"),
        ("(a)?(?(1)b|c)", "has a backreference, conditional or atomic group, expected a pattern that"),
        ("(?x)a b", "has the flag x, expected a pattern that"),
        ("a" * 3000, "has more than 2000 states, expected a pattern that"),
        ("(?=(a?){200}b)c", "has more than 100 states in parts that look ahead or behind, expected a pattern that"),
        ("((a{9}){9}){99}", "has more than 2000 states, expected a pattern that"),
        ("(" * 5000 + ")" * 5000, "expected a pattern (its groups are nested too deeply)"),
        ("(" * 2000 + ")" * 2000, "expected a pattern (its groups are nested too deeply)"),
        ("a{99999999999999}", "expected a pattern (the repetition number is too large)"),
        ("(", "expected a pattern (missing ), unterminated subpattern"),
        (b"a", "b'a', expected a pattern, a string"),
        (3, "3, expected a pattern, a string"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_patterns_that_are_refused(pattern, message):
    optimizer = fastadam.AdamW()
    with pytest.raises(ValueError, match=r"^var_names\[1\]: .*" + re.escape(message)):
        optimizer.exclude_from_weight_decay(var_names=["bias", pattern])
    w = fastadam.Variable(np.ones(1, np.float32), "bias")
    optimizer.apply_gradients([(np.zeros(1, np.float32), w)])
    assert w.value[0] < 1  # nothing is excluded


@pytest.mark.parametrize(
    "pattern", ["bias", "^bias$", "(norm|bias)", r"layer_\d+/(?!kernel)", r"(?i)BIAS", r"\bbias\b"]
)
def test_usual_patterns_exclude(pattern):
    optimizer = fastadam.AdamW(0.1, 0.5)
    optimizer.exclude_from_weight_decay(var_names=[pattern])
    bias = fastadam.Variable(np.ones(1, np.float32), "layer_3/bias" if "layer" in pattern else "bias")
    kernel = fastadam.Variable(np.ones(1, np.float32), "layer_3/kernel")
    optimizer.apply_gradients([(np.zeros(1, np.float32), bias), (np.zeros(1, np.float32), kernel)])
    assert (bias.value[0], bool(kernel.value[0] < 1)) == (1, True)
