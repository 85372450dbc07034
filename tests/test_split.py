"""How the elements of a step are split between threads: every one once, in even shares, cut at tiles."""

from __future__ import annotations

import pytest
from fastadam._core.native.backend import _cpu
from hypothesis import given, settings
from hypothesis import strategies as st

TILE = 512


def assert_partition(sizes, shares):
    """Every element in exactly one piece, cuts at tiles, shares as equal as the cuts allow."""
    split = _cpu.split(sizes, shares)
    position = dict.fromkeys(range(len(sizes)), 0)
    for tensor, begin, end in sorted(piece for share in split for piece in share):
        assert begin == position[tensor]
        assert begin < end
        position[tensor] = end
        if end < sizes[tensor]:
            assert end % TILE == 0
    assert [position[i] for i in range(len(sizes))] == list(sizes)
    counts = [sum(end - begin for _, begin, end in share) for share in split]
    assert max(counts) - min(counts) <= 2 * TILE + 1


@given(sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=20), shares=st.integers(1, 9))
@settings(deadline=None)
def test_the_split_covers_every_element_once(sizes, shares):
    assert_partition(sizes, shares)


@pytest.mark.parametrize("shares", [1, 2, 3, 7, 64, 128, 8192])
def test_the_split_holds_far_beyond_what_can_be_allocated(shares):
    assert_partition([2**32 + 17, 5, 2**40 + 1, 0, 2**33], shares)
    assert_partition([2**50 + 3], shares)


RESNET_50 = [64 * 3 * 49, *[64] * 14, *[128] * 16, *[256] * 32, *[512] * 22, *[1024] * 14, *[2048] * 8, 1000, 2048 * 1000,
             *[2359296] * 3, *[1048576] * 6, 2097152, *[589824] * 6, *[262144] * 11, *[147456] * 4, *[65536] * 8]  # fmt: skip
GPT_2 = [
    38597376,
    786432,
    *[768, 768, 1769472, 2304, 589824, 768, 768, 768, 2359296, 3072, 2359296, 768] * 12,
    768,
    768,
]


@pytest.mark.parametrize("shares", [2, 8, 32, 64, 128])
@pytest.mark.parametrize("sizes", [RESNET_50, GPT_2], ids=["ResNet-50", "GPT-2"])
def test_the_split_of_models_is_level_to_one_percent(sizes, shares):
    counts = [sum(end - begin for _, begin, end in share)
              for share in _cpu.split(sizes, shares)]  # fmt: skip
    assert max(counts) / (sum(counts) / shares) < 1.01
