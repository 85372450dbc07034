"""Tables of fastadam.torch whose rows wait, and what users do meanwhile: write to moments, replace or remove them."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("rows_wait")
ROWS = 200


def trained(amsgrad=False, steps=5, groups=1, mode="deferred"):
    weights = [torch.nn.Parameter(torch.ones(ROWS, 2, dtype=torch.float64)) for _ in range(groups)]
    optimizer = fastadam.torch.Adam(
        [{"params": [w]} for w in weights], lr=0.1, amsgrad=amsgrad, sparse_update=mode, eps=1e-3
    )
    step(optimizer, weights, range(steps))
    return optimizer, weights


def step(optimizer, weights, rows):
    for row in rows:
        for weight in weights:
            values = torch.full((2, 2), 1.0 + row, dtype=torch.float64)
            weight.grad = torch.sparse_coo_tensor([[row, row + 1]], values, weight.shape, check_invariants=True)
        optimizer.step()
        for weight in weights:
            optimizer.gather(weight, torch.tensor([0]))  # they are read through the optimizer


def kept(optimizer, weight):
    """The state as one has it who took it before rows waited."""
    return dict.get(optimizer.state, weight)


READS = {
    "step": lambda o, w: step(o, [w], [40]),
    "sync": lambda o, _: o.sync(),
    "gather": lambda o, w: o.gather(w, torch.arange(ROWS)),
    "state_dict": lambda o, _: o.state_dict(),
    "deepcopy": lambda o, _: copy.deepcopy(o),
    "load_state_dict": lambda o, _: o.load_state_dict({"state": {}, "param_groups": [vars_of(o)]}),
}


def vars_of(optimizer):
    return {**optimizer.param_groups[0], "params": [0]}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
@pytest.mark.parametrize(
    "write", [lambda t: t.zero_(), lambda t: t[7].fill_(3.0), lambda t: t.set_(torch.zeros_like(t))], ids=["all", "row", "memory"]
)  # fmt: skip
def test_writing_to_a_moment_while_rows_wait_is_refused(moment, write, read):
    optimizer, (weight,) = trained(amsgrad=True)
    write(kept(optimizer, weight)[moment])
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match=rf"state of .*: {moment}: written to while rows waited .*; call sync\(\)"):
        READS[read](optimizer, weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_writing_to_a_moment_after_sync(moment):
    (optimizer, (weight,)), (dense, (twin,)) = trained(amsgrad=True), trained(amsgrad=True)
    for each, w in ((optimizer, weight), (dense, twin)):
        each.sync()
        each.state[w][moment].fill_(0.5)
        step(each, [w], range(5, 12))
        if each is dense:
            each.sync()
    optimizer.sync()
    assert torch.equal(weight, twin)


@pytest.mark.parametrize("read", [read for read in READS if read != "load_state_dict"])
@pytest.mark.parametrize("moments", [["exp_avg"], ["exp_avg_sq"], ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]])
def test_replacing_a_moment_first_makes_the_steps_that_rows_wait_for(moments, read):
    """As if sync() had been called before."""
    found = []
    for syncs in (True, False):
        optimizer, (weight,) = trained(amsgrad=True)
        if syncs:
            optimizer.sync()
        for moment in moments:
            kept(optimizer, weight)[moment] = torch.full_like(weight, 0.5, requires_grad=False)
        READS[read](optimizer, weight)
        step(optimizer, [weight], range(41, 45))
        optimizer.sync()
        found.append([weight.detach(), *optimizer.state[weight].values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def copy_moment(name):
    return lambda o, w: kept(o, w).update({name: kept(o, w)[name].clone()})


def copy_but_for_a_row(optimizer, weight):
    copied = kept(optimizer, weight)["exp_avg"].clone()
    copied[150] = 1.0
    kept(optimizer, weight)["exp_avg"] = copied


COPIES = {
    "exp_avg": copy_moment("exp_avg"),
    "exp_avg_sq": copy_moment("exp_avg_sq"),
    "all but one row": copy_but_for_a_row,
    "the whole state": lambda o, w: o.state.update({w: copy.deepcopy(kept(o, w))}),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("replace_by_copy", COPIES)
@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
def test_a_copy_that_lags_is_not_taken_for_the_moment(mode, replace_by_copy, read):
    """Its rows would be stepped as if they had had the steps that they waited for when it was made."""
    optimizer, (weight,) = trained(mode=mode)
    COPIES[replace_by_copy](optimizer, weight)
    before = weight.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"exp_avg.*: replaced by a copy .* while rows waited .*; call sync\(\) before"
    ):
        READS[read](optimizer, weight)
    assert torch.equal(weight, before)
    del optimizer.state[weight]  # it was not written to: its rows make their steps with the moments before the copy
    optimizer.sync()
    expected, (twin,) = trained(mode=mode)
    expected.sync()
    assert torch.equal(weight, twin)


@pytest.mark.parametrize("replace_by_copy", COPIES)
def test_a_copy_after_sync_goes_on(replace_by_copy):
    found = []
    for copies in (False, True):
        optimizer, (weight,) = trained()
        optimizer.sync()
        if copies:
            COPIES[replace_by_copy](optimizer, weight)
        elif replace_by_copy == "all but one row":
            optimizer.state[weight]["exp_avg"][150] = 1.0
        step(optimizer, [weight], range(5, 12))
        optimizer.sync()
        found.append(weight.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("read", [read for read in READS if read != "load_state_dict"])
@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
@pytest.mark.parametrize("waits", [True, False])
def test_a_moment_that_is_not_a_tensor_is_refused_by_name(waits, moment, read):
    optimizer, (weight,) = trained(amsgrad=True)
    if not waits:
        optimizer.sync()
    kept(optimizer, weight)[moment] = None
    with pytest.raises(TypeError, match=rf"state of .*: {moment}: NoneType, expected a tensor"):
        READS[read](optimizer, weight)


def enlarge(optimizer, weight):
    weight.grad = None
    weight.data = torch.cat([weight.detach(), torch.ones(3, 2, dtype=torch.float64)])


WRITES = {
    "larger data": enlarge,
    "other data": lambda _, w: setattr(w, "data", torch.ones_like(w)),
    "in place": lambda _, w: w.detach().zero_(),
    "moment": lambda o, w: kept(o, w)["exp_avg"].zero_(),
}


@pytest.mark.parametrize("read", [*READS, "begin_step"])
@pytest.mark.parametrize("write", WRITES)
def test_the_text_about_a_write_names_a_way_out_that_works(write, read):
    """Dropping the state gives up the waiting steps; the parameter begins anew from what was written."""
    optimizer, (weight,) = trained()
    WRITES[write](optimizer, weight)
    written = weight.detach().clone()
    for call in (optimizer.sync, optimizer.state_dict, lambda: copy.deepcopy(optimizer)):
        with pytest.raises(
            RuntimeError,
            match=r"written to while rows waited .*; del optimizer.state\[parameter\] begins anew, without",
        ):
            call()
    del optimizer.state[weight]
    if read == "begin_step":
        weight.grad = None
        optimizer.begin_step()
        optimizer.end_step()
    elif read == "gather":
        assert torch.equal(optimizer.gather(weight, torch.arange(ROWS)), written[:ROWS])
    else:
        READS[read](optimizer, weight)
    if read != "step":
        assert torch.equal(weight, written)
    step(optimizer, [weight], range(41, 45))
    optimizer.state_dict()
    copy.deepcopy(optimizer)


@pytest.mark.parametrize("write", ["larger data", "other data", "in place"])
def test_loading_a_state_is_a_way_out_too(write):
    optimizer, (weight,) = trained()
    WRITES[write](optimizer, weight)
    other = fastadam.torch.Adam([torch.nn.Parameter(weight.detach().clone())], sparse_update="deferred")
    step(other, other.param_groups[0]["params"], range(3))
    optimizer.load_state_dict(other.state_dict())
    step(optimizer, [weight], range(41, 45))
    optimizer.sync()


def shrink(optimizer, weight):
    optimizer.param_groups.pop()


def grow(optimizer, weight):
    """As Hugging Face's resize_token_embeddings, with the moments padded."""
    new = torch.nn.Parameter(torch.cat([weight.detach(), torch.zeros(3, 2, dtype=torch.float64)]))
    named = optimizer.state.pop(weight)
    for moment in ("exp_avg", "exp_avg_sq"):
        named[moment] = torch.cat([named[moment], torch.zeros(3, 2, dtype=torch.float64)])
    optimizer.state[new] = named
    optimizer.param_groups[-1]["params"] = [new]


def replace(optimizer, weight):
    optimizer.param_groups[-1]["params"][0] = torch.nn.Parameter(weight.detach().clone())


@pytest.mark.parametrize("remove", [shrink, grow, replace])
@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
def test_a_table_that_left_the_groups_is_refused_before_anything_is_written(remove, mode):
    optimizer, (first, second) = trained(groups=2, mode=mode)
    remove(optimizer, second)
    before = first.detach().clone(), second.detach().clone()
    step_count = float(kept(optimizer, first)["step"])
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"left param_groups while rows waited .*; call sync\(\) before the step"
        ):
            step(optimizer, [first], [40])
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])
    assert float(kept(optimizer, first)["step"]) == step_count
    optimizer.sync()  # which makes the steps of the table that was removed
    expected = trained(groups=2, mode=mode)
    expected[0].sync()
    assert torch.equal(second, expected[1][1])
    optimizer.state.pop(second, None)  # torch's state_dict, too, raises for states of no parameter
    stepped = [group["params"][0] for group in optimizer.param_groups]
    step(optimizer, stepped, [40, 41])
    optimizer.state_dict()
    copy.deepcopy(optimizer)


@pytest.mark.parametrize("remove", [shrink, grow, replace])
def test_a_table_that_left_the_groups_after_sync_is_forgotten(remove):
    optimizer, (_, second) = trained(groups=2)
    optimizer.sync()
    remove(optimizer, second)
    optimizer.state.pop(second, None)
    stepped = [group["params"][0] for group in optimizer.param_groups]
    gone = weakref.ref(second)
    del second
    for k in range(3):
        step(optimizer, stepped, [40 + k])
    gc.collect()
    assert gone() is None
    optimizer.sync()
    optimizer.state_dict()
    copy.deepcopy(optimizer)
