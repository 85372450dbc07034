"""``optimizer.state`` of fastadam.torch in the deferred modes: whoever reads it, and however, finds rows up to date."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict, defaultdict

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("rows_wait")
ROWS = 200


def trained(mode="deferred", attached=False, steps=range(5)):
    """A table whose rows wait, a dense parameter beside it, and the moments that the table has after all steps."""
    table = torch.nn.Embedding(ROWS, 3, sparse=True)
    torch.nn.init.ones_(table.weight)
    bias = torch.nn.Parameter(torch.ones(3))
    optimizer = fastadam.torch.Adam([table.weight, bias], lr=0.1, sparse_update=mode)
    if attached:
        optimizer.attach(table)
    train(optimizer, table.weight, steps)
    twin = copy.deepcopy(optimizer)  # which is brought up to date to be copied; so is the original
    train(optimizer, table.weight, [40, 41])
    train(twin, twin.param_groups[0]["params"][0], [40, 41])
    twin.sync()
    expected = [value.clone() for value in dict.get(twin.state, twin.param_groups[0]["params"][0]).values()]
    assert not is_current(dict.get(optimizer.state, table.weight), expected)
    return optimizer, table.weight, expected


def train(optimizer, weight, rows):
    for row in rows:
        optimizer.gather(weight, torch.tensor([row, row + 1]))  # they are read through the optimizer
        weight.grad = torch.sparse_coo_tensor([[row, row + 1]], torch.ones(2, 3), weight.shape, check_invariants=True)
        optimizer.param_groups[0]["params"][1].grad = torch.ones(3)
        optimizer.step()


def is_current(state, expected):
    return len(state) == 3 and all(map(torch.equal, state.values(), expected))


def of_table(states):
    return next(state for state in states if state["exp_avg"].dim() == 2)


def keyed(state, param):
    """As ``torchrec.optim.KeyedOptimizer.state_dict`` reads the mapping that it was given."""
    return {id(key): dict(value.items()) for key, value in state.items()}[id(param)]


READS = {
    "[]": lambda state, p: state[p],
    "get": lambda state, p: state.get(p),
    "setdefault": lambda state, p: state.setdefault(p, {}),
    "pop": lambda state, p: state.pop(p),
    "popitem": lambda state, p: of_table([state.popitem()[1], state.popitem()[1]]),
    "items": lambda state, p: of_table(value for _, value in state.items()),
    "values": lambda state, p: of_table(state.values()),
    "dict": lambda state, p: dict(state)[p],
    "OrderedDict": lambda state, p: OrderedDict(state)[p],
    "**": lambda state, p: {**state}[p],
    "update": lambda state, p: defaultdict(dict, state)[p],
    "|": lambda state, p: (state | {})[p],
    "| on the right": lambda state, p: ({} | state)[p],
    "copy": lambda state, p: state.copy()[p],
    "copy.copy": lambda state, p: copy.copy(state)[p],
    "copy.deepcopy": lambda state, p: of_table(copy.deepcopy(state).values()),
    "pickle": lambda state, p: of_table(pickle.loads(pickle.dumps(state)).values()),
    "KeyedOptimizer": keyed,
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
def test_a_read_finds_the_moments_after_all_steps(mode, attached, read):
    optimizer, weight, expected = trained(mode, attached)
    assert is_current(READS[read](optimizer.state, weight), expected)


@pytest.mark.parametrize("write", ["repr", "=="])
def test_moments_are_up_to_date_in_what_shows_or_compares_them(write):
    optimizer, weight, expected = trained()
    if write == "repr":
        text = repr(optimizer.state)
        assert text.startswith("defaultdict(<class 'dict'>, {")
        assert text == repr(defaultdict(dict, dict.items(optimizer.state)))
    else:
        assert optimizer.state == dict(dict.items(optimizer.state))
    assert is_current(dict.get(optimizer.state, weight), expected)


@pytest.mark.parametrize("view", ["items", "values"])
def test_a_view_reads_when_it_is_iterated_over(view):
    optimizer, weight, _ = trained()
    found = getattr(optimizer.state, view)()
    train(optimizer, weight, [50, 51])
    state = of_table(each if view == "values" else each[1] for each in found)
    before = [value.clone() for value in state.values()]
    optimizer.sync()
    assert is_current(state, before)


@pytest.mark.parametrize("look", [len, bool, list, lambda s: s.keys(), lambda s: None in s], ids=range(5))
def test_what_reads_no_moment_moves_no_row(look):
    optimizer, weight, expected = trained()
    look(optimizer.state)
    optimizer.state.get("nothing")
    optimizer.state[optimizer.param_groups[0]["params"][1]]  # another parameter
    assert not is_current(dict.get(optimizer.state, weight), expected)


def test_a_mapping_like_any_other():
    optimizer, weight, _ = trained()
    bias = optimizer.param_groups[0]["params"][1]
    assert isinstance(optimizer.state, defaultdict)
    assert {*optimizer.state} == {weight, bias}
    assert optimizer.state["new"] == {}
    assert optimizer.state.pop("new") == {}
    assert optimizer.state.pop("new", 3) == 3
    with pytest.raises(KeyError):
        optimizer.state.pop("new")
    for copied in (optimizer.state.copy(), copy.deepcopy(optimizer.state), optimizer.state | {}, {} | optimizer.state):
        assert type(copied) in (defaultdict, dict)
    assert type(fastadam.torch.Adam([bias]).state) is defaultdict
    assert type(fastadam.torch.Adam([bias], sparse_update="lazy").state) is defaultdict


def same(optimizer, tmp_path):
    return optimizer


def loaded(optimizer, tmp_path):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


def refused(optimizer, tmp_path):
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    return optimizer


def unpickled(optimizer, tmp_path):
    return pickle.loads(pickle.dumps(optimizer))


def wrapped(optimizer, tmp_path):
    """As ``LightningOptimizer``: an object of a subclass with the attributes of the optimizer."""
    wrapper = object.__new__(type("Wrapper", (type(optimizer),), {}))
    wrapper.__dict__ = {**optimizer.__dict__}
    return wrapper


@pytest.mark.parametrize("become", [same, loaded, refused, unpickled, wrapped, lambda o, _: copy.copy(o)])
def test_an_optimizer_that_was_loaded_or_copied_goes_on_like_this(become, tmp_path):
    optimizer = become(trained()[0], tmp_path)
    weight = optimizer.param_groups[0]["params"][0]
    train(optimizer, weight, [60, 61])
    state = optimizer.state[weight]
    before = [value.clone() for value in state.values()]
    optimizer.sync()
    assert is_current(state, before)
    assert all(value[150].any() == 0 and value[41].any() for value in list(state.values())[1:])


def test_a_mapping_of_the_past_is_left_alone():
    """``load_state_dict`` gives the optimizer other states, as in torch."""
    optimizer, weight, expected = trained()
    past = optimizer.state
    loaded(optimizer, None)
    train(optimizer, weight, [60, 61])
    assert is_current(past[weight], expected)
    assert optimizer.state is not past
    waits = weight.detach().clone()
    list(past.items())
    assert torch.equal(weight, waits)


def test_nothing_is_kept_alive():
    optimizer, weight, _ = trained()
    kept, gone = optimizer.state, weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
    assert kept[weight]["step"] == 7


def test_a_moment_read_from_the_state_may_be_written_to():
    """As ``KeyedOptimizer.load_state_dict`` does."""
    found = []
    for syncs in (True, False):
        optimizer, weight, _ = trained()
        if syncs:
            optimizer.sync()
        optimizer.state[weight]["exp_avg"].fill_(0.5)
        train(optimizer, weight, range(60, 65))
        found.append([weight.detach().clone(), *optimizer.state[weight].values()])
    assert all(map(torch.equal, *found))


# ---- the parameter itself, which is read and written as before ---------------------------------------------------------


def test_reading_the_state_does_not_hide_that_the_parameter_was_read_from_memory():
    table = torch.nn.Embedding(ROWS, 3, sparse=True)
    optimizer = fastadam.torch.Adam(table.parameters(), sparse_update="deferred")

    def step(ids):
        optimizer.zero_grad()
        table(torch.tensor(ids)).sum().backward()
        optimizer.state[table.weight]  # as a logger
        optimizer.step()

    step([1, 2])
    with pytest.warns(UserWarning, match="its rows were read from its memory"):
        step([2, 3])


@pytest.mark.parametrize("then", ["step", "sync", "state_dict", "state"])
def test_reading_the_state_does_not_hide_a_write_of_values_that_lag(then):
    optimizer, weight, _ = trained()
    lagging = weight.detach().clone()
    optimizer.state[weight]
    weight.detach().copy_(lagging)
    calls = {
        "step": lambda: train(optimizer, weight, [50]),
        "sync": optimizer.sync,
        "state_dict": optimizer.state_dict,
        "state": lambda: optimizer.state[weight],
    }
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"written to while rows waited .*; call sync\(\) before"):
            calls[then]()
    assert torch.equal(weight, lagging)
    del optimizer.state[weight]
    train(optimizer, weight, [50])


@pytest.mark.parametrize("attached", [False, True])
def test_a_write_after_sync_or_to_an_attached_weight_goes_on(attached):
    optimizer, weight, _ = trained(attached=attached)
    optimizer.state[weight]
    if not attached:
        optimizer.sync()
    with torch.no_grad():
        weight.mul_(0.5)
    train(optimizer, weight, [50, 51])
    optimizer.state_dict()
