"""``resize``, ``forget`` and ``reset`` of fastadam.torch, against ones that are made anew from permuted states."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
import numpy as np  # noqa: E402
from fastadam.torch._attached import AttachedParameter, inside  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def rows_wait():
    """A step that touches fewer than all rows lets the others wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastadam._core.deferred.history.crossover", lambda shape, item_size, replays: 1.0)
        yield


F32, BF16 = torch.float32, torch.bfloat16
MODES = {
    "dense": {},
    "lazy": {"sparse_update": "lazy"},
    "deferred": {"sparse_update": "deferred"},
    "amsgrad": {"sparse_update": "deferred", "amsgrad": True},
    "decay": {"sparse_update": "deferred", "weight_decay": 0.1, "decoupled_weight_decay": True},
}
SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "master_low")


def random(generator, *shape, dtype=F32):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def sparse(values, ids, like):
    return torch.sparse_coo_tensor(torch.tensor([ids], dtype=torch.int64), values, like.shape, check_invariants=True)


def mapped(rows, old, fresh):
    new = fresh.clone()
    for place, row in enumerate(rows):
        if row >= 0:
            new[place] = old[row]
    return new


class Twins:
    """An optimizer that is told to resize, and one on a parameter of its own that is made anew from its state."""

    def __init__(self, mode, rows=6, width=(3,), dtype=F32, **options):
        self.generator = torch.Generator().manual_seed(0)
        self.options = options = {"lr": 0.1, **MODES[mode], **options}
        self.table = torch.nn.Parameter(random(self.generator, rows, *width, dtype=dtype))
        self.bias = torch.nn.Parameter(random(self.generator, 4, dtype=dtype))
        self.optimizer = fastadam.torch.Adam([("table", self.table), ("bias", self.bias)], **options)
        self.twin_table, self.twin_bias = (copy.deepcopy(p) for p in (self.table, self.bias))
        self.twin = fastadam.torch.Adam([self.twin_table, self.twin_bias], **options)

    @property
    def pairs(self):
        return (self.table, self.twin_table), (self.bias, self.twin_bias)

    def step(self, ids=None):
        self.optimizer.gather(self.table, torch.tensor([0] if ids is None else ids))
        for mine, other in self.pairs:
            if ids is None or mine is self.bias:
                gradient = random(self.generator, *mine.shape, dtype=mine.dtype)
            else:
                values = random(self.generator, len(ids), *mine.shape[1:], dtype=mine.dtype)
                gradient = sparse(values, ids, mine)
            mine.grad = gradient
            other.grad = gradient.clone()
        self.optimizer.step()
        self.twin.step()
        self.twin.sync()  # none of its rows ever waits

    def resize(self, rows, new_rows=None):
        given = rows
        if rows is None:
            rows = [i if i < len(self.table) else -1 for i in range(new_rows)]
        fresh = random(self.generator, len(rows), *self.table.shape[1:], dtype=self.table.dtype)
        old, old_twin = self.table, self.twin_table
        new, new_twin = (torch.nn.Parameter(mapped(rows, t.detach(), fresh)) for t in (old, old_twin))
        self.optimizer.resize(old, new, given)
        self.table, self.twin_table = new, new_twin
        state = {key: value.clone() for key, value in self.twin.state.get(old_twin, {}).items()}
        for key in state:
            if key in SHAPED:
                start = (
                    new_twin.detach().to(state[key].dtype)
                    if key == "master"
                    else torch.zeros_like(new_twin, dtype=state[key].dtype)
                )
                state[key] = mapped(rows, state[key], start)
        of_bias = self.twin.state.get(self.twin_bias, {})
        self.twin = fastadam.torch.Adam([new_twin, self.twin_bias], **self.options)
        for param, named in ((new_twin, state), (self.twin_bias, of_bias)):
            if named:
                self.twin.state[param] = named

    def reset(self, ids):
        self.optimizer.reset(self.table, ids)
        for key, value in self.twin.state[self.twin_table].items():
            if key == "step" and ids is None:
                value.zero_()
            elif key in SHAPED[:3]:
                value[slice(None) if ids is None else ids] = 0

    def compare(self):
        self.optimizer.sync()
        for mine, other in self.pairs:
            assert mine.equal(other), (mine - other).abs().max()
            found, expected = self.optimizer.state[mine], self.twin.state[other]
            assert set(found) == set(expected)
            for key, value in expected.items():
                assert torch.equal(found[key], value), key


ROWS = {
    "grown": (None, 9),
    "shrunk": (None, 4),
    "removed": ([0, 2, 5], None),
    "permuted": ([5, 3, 1, 0, 2, 4], None),
    "repeated": ([1, 1, 3, -1, 3], None),
    "all fresh": ([-1, -1], None),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mode", MODES)
def test_rows_keep_their_moments_and_fresh_rows_have_none(mode, rows):
    twins = Twins(mode)
    for ids in ([0, 1, 2], [2, 3], [5, 5], [1]):
        twins.step(ids)
    twins.resize(*ROWS[rows])
    assert twins.optimizer.param_groups[0]["params"][0] is twins.table
    twins.compare()
    for ids in ([0, 1], [1]):
        twins.step(ids)
    twins.compare()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, BF16, torch.complex64])
@pytest.mark.parametrize("width", [(), (1,), (2, 3)])
def test_every_dtype_and_shape(dtype, width):
    twins = Twins("dense", width=width, dtype=dtype)
    for change in (None, (None, 9), ([8, 0, -1], None)):
        if change is not None:
            twins.resize(*change)
        twins.step()
        twins.step()
    twins.compare()


@pytest.mark.parametrize("order", ["transposed", "with gaps"])
def test_parameters_of_any_strides(order):
    twins = Twins("dense")
    twins.step()
    fresh = torch.zeros(3, 9).t() if order == "transposed" else torch.zeros(9, 6)[:, ::2]
    new = fresh.clone(memory_format=torch.preserve_format) if order == "transposed" else fresh
    new[:6] = twins.table.detach()
    new = torch.nn.Parameter(new)
    assert not new.is_contiguous()
    before = twins.optimizer.state[twins.table]["exp_avg"].clone()
    twins.optimizer.resize(twins.table, new)
    assert twins.optimizer.state[new]["exp_avg"][:6].equal(before)
    new.grad = torch.ones(9, 3)
    twins.optimizer.step()


PROGRAM = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.lists(st.integers(0, 99), min_size=1, max_size=3)),
        st.tuples(st.just("rest"), st.integers(1, 20)),
        st.tuples(st.just("gather"), st.lists(st.integers(0, 99), min_size=1, max_size=3)),
        st.tuples(st.just("sync")),
        st.tuples(st.just("lengthen"), st.integers(0, 9)),
        st.tuples(st.just("rows"), st.lists(st.integers(-1, 99), min_size=1, max_size=9)),
        st.tuples(st.just("reset"), st.one_of(st.none(), st.lists(st.integers(0, 99), max_size=3))),
        st.tuples(st.just("forget")),
        st.tuples(st.just("copy")),
    ),
    max_size=10,
)


def run(program, mode):
    twins = Twins(mode)
    twins.step([0])
    for command, *arguments in program:
        length = len(twins.table)
        if command == "step":
            twins.step([i % length for i in arguments[0]])
        elif command == "rest":
            for _ in range(arguments[0]):
                twins.step([length - 1])
        elif command == "gather":
            ids = torch.tensor([i % length for i in arguments[0]])
            assert twins.optimizer.gather(twins.table, ids).equal(twins.twin_table[ids])
        elif command == "sync":
            twins.optimizer.sync()
        elif command == "lengthen":
            twins.resize(None, 1 + arguments[0])
        elif command == "rows":
            twins.resize([i if i < 0 else i % length for i in arguments[0]])
        elif command == "reset":
            twins.reset(None if arguments[0] is None else [i % length for i in arguments[0]])
        elif command == "forget":
            for optimizer, table in ((twins.optimizer, twins.table), (twins.twin, twins.twin_table)):
                optimizer.forget(table)
            for optimizer, table in ((twins.optimizer, twins.table), (twins.twin, twins.twin_table)):
                named = optimizer is twins.optimizer
                optimizer.add_param_group({"params": [("table", table)] if named else [table]})
            twins.step([0])
        elif command == "copy":
            twins.optimizer, twins.table, twins.bias = copy.deepcopy((twins.optimizer, twins.table, twins.bias))
    twins.compare()


@given(program=PROGRAM, mode=st.sampled_from(sorted(MODES)))
def test_any_program_ends_as_that_of_optimizers_that_are_made_anew(program, mode):
    run(program, mode)


# ---- groups ----------------------------------------------------------------------------------------------------------


def two_groups(**options):
    params = [torch.nn.Parameter(torch.full((n, 2), float(n))) for n in (2, 3, 4)]
    groups = [{"params": [("a", params[0])]}, {"params": [("b", params[1]), ("c", params[2])], "lr": 0.5}]
    optimizer = fastadam.torch.Adam(groups, lr=0.1, **options)
    step(optimizer)
    return optimizer, params


def step(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()


def test_the_parameter_comes_where_the_old_one_was_in_the_groups():
    optimizer, (a, b, c) = two_groups()
    group, state_of_a = optimizer.param_groups[1], optimizer.state[a]
    new = torch.nn.Parameter(torch.cat([b.detach(), torch.zeros(2, 2)]))
    optimizer.resize(b, new)
    assert optimizer.param_groups[1] is group
    assert [p is q for p, q in zip(group["params"], (new, c), strict=True)] == [True, True]
    assert group["param_names"] == ["b", "c"]
    assert group["lr"] == 0.5
    assert b not in optimizer.state
    assert optimizer.state[a] is state_of_a
    step(optimizer)
    assert optimizer.state[new]["step"] == 2
    saved = optimizer.state_dict()
    assert saved["state"][1]["exp_avg"].shape == (5, 2)
    other, (a, b, c) = two_groups()
    other.resize(b, torch.nn.Parameter(new.detach().clone()))
    other.load_state_dict(saved)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_forgotten_parameter_leaves_the_groups_and_the_others_go_on(place):
    optimizer, params = two_groups()
    gone = params.pop(place)
    optimizer.forget(gone)
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in params]
    assert [n for g in optimizer.param_groups for n in g["param_names"]] == [
        n for k, n in enumerate("abc") if k != place
    ]
    assert gone not in optimizer.state
    before = gone.detach().clone()
    gone.grad = torch.ones_like(gone)
    step(optimizer)
    assert gone.equal(before)
    assert all(optimizer.state[p]["step"] == 2 for p in params)
    optimizer.add_param_group({"params": [("again", gone)]})
    step(optimizer)
    assert optimizer.state[gone]["step"] == 1


def test_reset_of_all_parameters_begins_anew():
    optimizer, params = two_groups(amsgrad=True)
    moments = [optimizer.state[p]["exp_avg"] for p in params]
    step(optimizer)
    optimizer.reset()
    assert all(not v.any() for p in params for v in optimizer.state[p].values())
    assert all(optimizer.state[p]["exp_avg"] is m for p, m in zip(params, moments, strict=True))
    twins = [copy.deepcopy(p) for p in params]
    fresh = fastadam.torch.Adam([{"params": twins[:1]}, {"params": twins[1:], "lr": 0.5}], lr=0.1, amsgrad=True)
    for _ in range(3):
        step(optimizer)
        step(fresh)
    assert all(p.equal(q) for p, q in zip(params, twins, strict=True))


def test_a_parameter_that_was_never_stepped_can_be_replaced():
    old, new = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(5, 2))
    optimizer = fastadam.torch.Adam([old])
    optimizer.reset(old)
    optimizer.resize(old, new)
    assert not optimizer.state
    step(optimizer)
    assert optimizer.state[new]["step"] == 1


def test_a_parameter_whose_data_was_replaced_is_resized_in_its_place():
    param = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = fastadam.torch.Adam([param])
    step(optimizer)
    param.data = torch.cat([param.data, torch.zeros(1, 2)])
    param.grad = None
    optimizer.resize(param, param)
    assert optimizer.state[param]["exp_avg"][:, 0].tolist() == pytest.approx([0.1, 0.1, 0.1, 0])
    step(optimizer)
    assert optimizer.state[param]["step"] == 2


# ---- formats of states -----------------------------------------------------------------------------------------------

FORMATS = {
    "bfloat16": ({"moments": "bfloat16"}, F32),
    "8bit": ({"moments": "8bit"}, F32),
    "split": ({"moments": "8bit", "master": "split"}, BF16),
    "master": ({"master": "float32"}, BF16),
}


def values_of(optimizer, param, key):
    state = optimizer.state[param]
    if f"{key}_scale" not in state:
        return state[key].float()
    from fastadam.torch._conversion import decoded

    return decoded(state[key], state[f"{key}_scale"], signed=key == "exp_avg")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("width", [128, 30])
def test_small_states_and_masters_move_with_their_rows(kind, width):
    options, dtype = FORMATS[kind]
    generator = torch.Generator().manual_seed(0)
    old = torch.nn.Parameter(random(generator, 16, width, dtype=dtype))
    optimizer = fastadam.torch.Adam([old], lr=0.1, **options, **({} if kind == "master" else {"float32_for": 1}))
    for _ in range(3):
        old.grad = random(generator, 16, width, dtype=dtype)
        optimizer.step()
    rows = [3, 15, -1, 0, 7]
    keys = ["exp_avg", "exp_avg_sq", *(k for k in ("master", "master_low") if k in optimizer.state[old])]
    before = {key: values_of(optimizer, old, key) for key in keys}
    fresh = random(generator, 5, width, dtype=dtype)
    new = torch.nn.Parameter(mapped(rows, old.detach(), fresh))
    optimizer.resize(old, new, torch.tensor(rows))
    for key, values in before.items():
        expected = mapped(rows, values, fresh.float() if key == "master" else torch.zeros(5, width))
        found = values_of(optimizer, new, key)
        if width == 128 or not key.startswith("exp") or kind in ("bfloat16", "master"):
            assert found.equal(expected), key
        else:  # blocks of codes are others: a code has 3 bits of mantissa
            torch.testing.assert_close(found, expected, rtol=0.13, atol=float(expected.abs().max()) * 2.0**-10)
    optimizer.reset(new, [0, 1])
    for key in keys:
        is_moment = key.startswith("exp")
        assert values_of(optimizer, new, key)[:2].any() == (not is_moment)
        assert values_of(optimizer, new, key)[3:].any()
    new.grad = torch.ones_like(new)
    optimizer.step()


def test_a_compute_parameter_is_made_anew_from_the_new_values():
    old, copy_of_it = torch.nn.Parameter(torch.randn(3, 2)), torch.zeros(3, 2, dtype=BF16)
    optimizer = fastadam.torch.Adam([{"params": [old], "compute_params": [copy_of_it]}])
    step(optimizer)
    new = torch.nn.Parameter(torch.randn(5, 2))
    optimizer.resize(old, new)
    received = optimizer.param_groups[0]["compute_params"][0]
    assert received.equal(new.detach().bfloat16())
    step(optimizer)
    assert received.equal(new.detach().bfloat16())
    optimizer.forget(new)
    assert list(optimizer.param_groups[0]["compute_params"]) == []


# ---- tables and memory -----------------------------------------------------------------------------------------------


def used(attached=True, **options):
    table = torch.nn.Embedding(6, 2, sparse=True)
    optimizer = fastadam.torch.Adam(table.parameters(), lr=0.1, **{"sparse_update": "deferred", **options})
    if attached:
        optimizer.attach(table)
    for ids in ([0, 1], [1, 2], [0]):
        optimizer.zero_grad()
        optimizer.gather(table.weight, torch.tensor(ids))
        table(torch.tensor(ids)).sum().backward()
        optimizer.step()
    return optimizer, table


def test_an_attached_module_stays_attached_when_it_gets_the_new_weight():
    optimizer, table = used()
    optimizer.sync()
    old = table.weight
    table.weight = torch.nn.Parameter(torch.cat([old.detach(), torch.zeros(3, 2)]))
    optimizer.resize(old, table.weight)
    assert (type(table.weight), type(old)) == (AttachedParameter, torch.nn.Parameter)
    for ids in ([8], [1], [8]):
        optimizer.zero_grad()
        table(torch.tensor(ids)).sum().backward()
        optimizer.step()
    with inside():
        waiting = table.weight.detach().clone()
    assert not waiting[1].equal(table(torch.tensor([1]))[0])  # brought up to date


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["resize", "forget"])
def test_nothing_of_the_old_parameter_is_kept_alive(mode, how):
    optimizer, table = used(**MODES[mode])
    optimizer.sync()
    state = optimizer.state[table.weight]
    dead = [weakref.ref(table.weight), *(weakref.ref(value) for key, value in state.items() if key != "step")]
    if how == "resize":
        optimizer.resize(table.weight, torch.nn.Parameter(table.weight.detach()[:4].clone()))
    else:
        optimizer.forget(table.weight)
    del table, state
    gc.collect()
    assert [ref() is None for ref in dead] == [True] * len(dead)


def test_values_that_are_not_those_that_wait_are_refused():
    optimizer, table = used(attached=False)
    weight = table.weight
    before = weight.detach().clone()
    stale = weight.detach().clone()
    stale[1, 0] += 1
    with pytest.raises(ValueError, match=r"^new: row 1 is not the one of old as it is now, so that steps of it may be"):
        optimizer.resize(weight, torch.nn.Parameter(stale))
    with pytest.raises(ValueError, match=r"^new: in the memory of old, whose rows wait for their steps; expected sync"):
        optimizer.resize(weight, weight, [5, 4, 3, 2, 1, 0])
    assert weight.equal(before)
    optimizer.resize(weight, new := torch.nn.Parameter(before.clone()))
    optimizer.sync()
    assert not new.equal(before)


def test_a_write_while_rows_wait_is_refused_as_by_any_call():
    optimizer, table = used(attached=False)
    with torch.no_grad():
        table.weight.add_(1)
    new = torch.nn.Parameter(table.weight.detach().clone())
    for call in (lambda: optimizer.resize(table.weight, new), lambda: optimizer.forget(table.weight), optimizer.reset):
        with pytest.raises(RuntimeError, match="written to while rows waited for their steps"):
            call()


NEW = torch.nn.Parameter(torch.zeros(3, 2))
REFUSED = {
    "unknown": (
        lambda o, p: o.resize(NEW, p),
        ValueError,
        r"^old: a tensor of shape \(3, 2\), expected a parameter of",
    ),
    "unknown to forget": (lambda o, p: o.forget(NEW), ValueError, "^param: a tensor of shape"),
    "unknown to reset": (lambda o, p: o.reset(NEW), ValueError, "^param: a tensor of shape"),
    "array": (lambda o, p: o.forget(np.ones(3)), TypeError, "^param: ndarray, expected a parameter"),
    "known": (
        lambda o, p: o.resize(p, o.param_groups[0]["params"][1]),
        ValueError,
        "^new: a parameter of this optimizer",
    ),
    "dtype": (
        lambda o, p: o.resize(p, torch.zeros(3, 2, dtype=BF16)),
        ValueError,
        r"^new: torch.bfloat16 \(3, 2\) on cpu, e",
    ),
    "width": (
        lambda o, p: o.resize(p, torch.zeros(3, 3)),
        ValueError,
        r"^new: .*expected torch.float32 \(n, 2\) on cpu",
    ),
    "axes": (lambda o, p: o.resize(p, torch.zeros(6)), ValueError, r"^new: torch.float32 \(6,\) on cpu, expected"),
    "no leaf": (
        lambda o, p: o.resize(p, torch.zeros(3, 2, requires_grad=True) * 2),
        ValueError,
        "^new: the result of other",
    ),
    "list": (lambda o, p: o.resize(p, [[1.0, 2.0]]), TypeError, "^new: list, expected a tensor"),
    "float rows": (lambda o, p: o.resize(p, NEW, torch.zeros(3)), TypeError, "^rows: dtype float32, expected integers"),
    "too few rows": (lambda o, p: o.resize(p, NEW, [0, 1]), ValueError, r"^rows: shape \(2,\), expected \(3,\)"),
    "a row too high": (lambda o, p: o.resize(p, NEW, [0, 1, 6]), ValueError, "^rows: 6 is not a row of old"),
    "rows alone": (lambda o, p: o.reset(rows=[1]), ValueError, "^rows: given without param"),
    "reset row": (lambda o, p: o.reset(p, [6]), ValueError, "^rows: 6 is not a row of param, expected 0 <= row < 6"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("mode", ["dense", "deferred"])
def test_a_call_that_is_refused_changes_nothing(case, mode):
    call, error, message = REFUSED[case]
    twins = Twins(mode, width=(2,))
    for ids in ([0, 1], [2]):
        twins.step(ids)
    table, optimizer = twins.table, twins.optimizer
    before = copy.deepcopy([table.detach(), *optimizer.state[table].values()])
    with pytest.raises(error, match=message):
        call(optimizer, table)
    assert all(a.equal(b) for a, b in zip([table.detach(), *optimizer.state[table].values()], before, strict=True))
    twins.step([1])
    twins.compare()


@pytest.mark.parametrize("call", ["resize", "forget", "reset"])
@pytest.mark.parametrize("when", ["open step", "overlap"])
def test_none_can_be_called_in_the_middle_of_something(call, when):
    param, new = torch.nn.Parameter(torch.ones(4, 2)), torch.nn.Parameter(torch.ones(5, 2))
    optimizer = fastadam.torch.Adam([param])
    step(optimizer)
    calls = {
        "resize": lambda: optimizer.resize(param, new),
        "forget": lambda: optimizer.forget(param),
        "reset": optimizer.reset,
    }
    if when == "overlap":
        overlap = fastadam.torch.overlap(optimizer).attach()
    else:
        optimizer.begin_step()
    with pytest.raises(RuntimeError, match=f"^{call}: "):
        calls[call]()
    if when == "overlap":
        overlap.detach()
    else:
        optimizer.abort_step()
    calls[call]()
