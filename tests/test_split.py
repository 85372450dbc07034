"""How the elements of a step are split between threads: every one once, in even shares, at cache lines."""

from __future__ import annotations

import pytest
from fastadam._core.native.backend import _cpu
from hypothesis import given, settings
from hypothesis import strategies as st


def assert_partition(sizes, addresses, item_sizes, shares):
    """Every element in exactly one piece, cuts at cache lines, shares as equal as the cuts allow."""
    pieces = sorted(piece for share in _cpu.split(sizes, addresses, item_sizes, shares) for piece in share)
    position = dict.fromkeys(range(len(sizes)), 0)
    for tensor, begin, end in pieces:
        assert begin == position[tensor]
        assert begin < end
        position[tensor] = end
        if end < sizes[tensor]:
            assert (addresses[tensor] + end * item_sizes[tensor]) % 64 == 0
    assert [position[i] for i in range(len(sizes))] == list(sizes)
    counts = [sum(end - begin for _, begin, end in share) for share in _cpu.split(sizes, addresses, item_sizes, shares)]
    assert max(counts) - min(counts) <= 2 * 64 + 1


@given(
    tensors=st.lists(
        st.tuples(st.integers(0, 5000), st.integers(0, 63), st.sampled_from([2, 4, 8])), min_size=1, max_size=20
    ),
    shares=st.integers(1, 9),
)
@settings(deadline=None)
def test_the_split_covers_every_element_once(tensors, shares):
    sizes = [size for size, _, _ in tensors]
    assert_partition(sizes, [offset * item for _, offset, item in tensors], [item for *_, item in tensors], shares)


@pytest.mark.parametrize("shares", [1, 2, 3, 7, 64, 128, 8192])
def test_the_split_holds_far_beyond_what_can_be_allocated(shares):
    sizes = [2**32 + 17, 5, 2**40 + 1, 0, 2**33]
    assert_partition(sizes, [16, 4096 + 4, 2**46 + 16, 8, 2**45 + 2], [4, 4, 4, 8, 2], shares)
    assert_partition([2**50 + 3], [64], [2], shares)


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
              for share in _cpu.split(sizes, [16] * len(sizes), [4] * len(sizes), shares)]  # fmt: skip
    assert max(counts) / (sum(counts) / shares) < 1.01
