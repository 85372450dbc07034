"""A step like the last one is made natively; whatever has changed in between is noticed. Sets of parameters are bounded."""

from __future__ import annotations

import gc
import random
import weakref

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from torch_twins import PAIRS, Twins, parameters  # noqa: E402

SHAPES = ((3,), (2, 4), (), (5, 1))
WARM = 4  # steps after which the next one is repeated natively


def warm(name="Adam", dtype=torch.float64, **options):
    twins = Twins(name, parameters(*SHAPES, dtype=dtype), lr=0.01, **options)
    for _ in range(WARM):
        twins.step()
    return twins


def state_of(optimizer, place=1):
    return optimizer.state[optimizer.param_groups[0]["params"][place]]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True, "weight_decay": 0.1}, {"maximize": True}, {"betas": (0.5, 0.9)}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_like_the_last_one_is_not_looked_up(looked_up, name, options, dtype):
    twins = warm(name, dtype, **options)
    del looked_up[:]
    for _ in range(5):
        twins.step()
    assert not looked_up
    assert twins.difference() < (1e-12 if dtype == torch.float64 else 1e-5)
    assert [float(named["step"]) for named in twins.tested.state.values()] == [WARM + 5] * len(SHAPES)


def test_groups_are_repeated_together(looked_up):
    weights, twins = parameters(*SHAPES), parameters(*SHAPES)
    optimizers = []
    for cls, (a, b, c, d) in ((torch.optim.AdamW, twins), (fastadam.torch.AdamW, weights)):
        optimizers.append(cls([{"params": [a, b], "weight_decay": 0.0}, {"params": [c, d], "lr": 0.1}], lr=0.01))
    for k in range(8):
        if k == WARM:
            del looked_up[:]
        for w, twin in zip(weights, twins, strict=True):
            w.grad = torch.full_like(w, 0.1 * k - 0.3)
            twin.grad = w.grad.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.01 / (k + 1)  # as a scheduler does
            optimizer.step()
    assert not looked_up
    for w, twin in zip(weights, twins, strict=True):
        torch.testing.assert_close(w, twin, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", [float, torch.tensor])
def test_scaled_steps_are_repeated_with_the_scale_of_each_and_skipped_alike(looked_up, form):
    twins = Twins("Adam", parameters(*SHAPES), lr=0.01)
    plain = Twins("Adam", parameters(*SHAPES), lr=0.01)
    for k in range(3 * WARM):
        if k == WARM:
            del looked_up[:]
        skips, scale = k % 3 == 2, 2.0 ** (k % 4)
        twins.tested.grad_scale, twins.tested.found_inf = form(scale), form(float(skips))
        for place, w in enumerate(twins.ours):
            w.grad = torch.full_like(w, 0.1 * k - 0.3 * place)
            plain.ours[place].grad = w.grad / scale
        before = [w.detach().clone() for w in twins.ours]
        twins.tested.step()
        if skips:
            assert all(map(torch.equal, before, twins.ours))
        else:
            plain.tested.step()
    assert not looked_up
    assert all(map(torch.equal, twins.ours, plain.ours))


def test_a_repeated_step_raises_the_version_of_what_it_writes(looked_up):
    twins = warm()
    tensors = [t for p in twins.ours for t in (p, *twins.tested.state[p].values())]
    before = [tensor._version for tensor in tensors]
    del looked_up[:]
    twins.step()
    assert not looked_up
    assert all(tensor._version > version for tensor, version in zip(tensors, before, strict=True))


def put_option(key, value):
    return lambda optimizer: optimizer.param_groups[0].update({key: value})


def put_moment_data(optimizer):
    state_of(optimizer)["exp_avg"].data = torch.full((2, 4), 0.25, dtype=torch.float64)


def put_parameter_data(optimizer):
    optimizer.param_groups[0]["params"][1].data = torch.full((2, 4), 0.25, dtype=torch.float64)


def put_moment(optimizer):
    state_of(optimizer)["exp_avg_sq"] = torch.full((2, 4), 0.25, dtype=torch.float64)


def put_state(optimizer):
    optimizer.state[optimizer.param_groups[0]["params"][1]] = {k: v * 2 for k, v in state_of(optimizer).items()}


def put_step(optimizer):
    state_of(optimizer)["step"] = torch.tensor(9.0)


def put_step_data(optimizer):
    state_of(optimizer)["step"].data = torch.tensor(9.0)


def write_step(optimizer):
    for named in optimizer.state.values():
        named["step"].fill_(40)


def write_one_step(optimizer):
    state_of(optimizer)["step"].add_(3)


def drop_state(optimizer):
    optimizer.state.clear()


def add_group(optimizer):
    extra = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    extra.grad = torch.ones(3, dtype=torch.float64)
    optimizer.add_param_group({"params": [extra]})


def reverse_parameters(optimizer):
    optimizer.param_groups[0]["params"].reverse()


def remove_parameter(optimizer):
    del optimizer.param_groups[0]["params"][1]


def reload(optimizer):
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.2
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    "change",
    [
        put_option("lr", 0.5),
        put_option("lr", torch.tensor(0.5, dtype=torch.float64)),
        put_option("betas", (0.5, 0.9)),
        put_option("betas", [0.5, 0.9]),
        put_option("eps", 0.1),
        put_option("weight_decay", 0.1),
        put_option("maximize", True),
        put_moment,
        put_moment_data,
        put_parameter_data,
        put_state,
        put_step,
        put_step_data,
        write_step,
        write_one_step,
        drop_state,
        add_group,
        reverse_parameters,
        remove_parameter,
        reload,
    ],
    ids=lambda change: change.__name__,
)
def test_changes_between_steps_are_noticed(change):
    twins = warm()
    for optimizer in (twins.reference, twins.tested):
        change(optimizer)
    for _ in range(WARM):
        twins.step()
    assert twins.difference() < 1e-12
    for a, b in zip(twins.theirs, twins.ours, strict=True):
        theirs, ours = twins.reference.state.get(a, {}), twins.tested.state.get(b, {})
        assert theirs.keys() == ours.keys()
        assert all(torch.allclose(theirs[key].double(), ours[key].double(), rtol=1e-12) for key in theirs)


@pytest.mark.parametrize("key", ["lr", "betas", "betas[0]"])
def test_an_option_that_changes_and_stays_the_same_object_is_noticed(key):
    twins = warm()
    for optimizer in (twins.reference, twins.tested):
        group = optimizer.param_groups[0]
        group[key.partition("[")[0]] = {
            "lr": torch.tensor(0.1),
            "betas": [0.9, 0.999],
            "betas[0]": (torch.tensor(0.9), torch.tensor(0.999)),
        }[key]
    for k in range(WARM):
        twins.step()
        for optimizer in (twins.reference, twins.tested):
            group = optimizer.param_groups[0]
            if key == "lr":
                group["lr"].fill_(0.1 * (k + 2))
            elif key == "betas":
                group["betas"][0] = 0.8 - 0.1 * k
            else:
                group["betas"][0].fill_(0.8 - 0.1 * k)
    twins.step()
    assert twins.difference() < 1e-6  # torch computes in float32 with these tensors


def test_amsgrad_that_is_switched_on_is_noticed():
    twins = warm()
    twins.tested.param_groups[0]["amsgrad"] = True
    twins.step()
    assert all("max_exp_avg_sq" in named for named in twins.tested.state.values())


@pytest.mark.parametrize("which", [[0, 2], [1], [], [0, 1, 2, 3]], ids=str)
def test_gradients_that_are_missing_are_noticed(which):
    twins = warm()
    for _ in range(3):
        twins.step(which)
    twins.step()
    assert twins.difference() < 1e-12


@pytest.mark.parametrize(
    "convert",
    [lambda g: g.t().contiguous().t(), lambda g: torch._neg_view(-g), lambda g: g.to_sparse(1)],
    ids=["strided", "negated", "sparse"],
)
def test_gradients_that_cannot_be_read_as_they_are_are_noticed(convert):
    twins = warm()
    for _ in range(WARM):
        for place, (a, b) in enumerate(zip(twins.theirs, twins.ours, strict=True)):
            a.grad = torch.full_like(a, 0.5 + place)
            b.grad = convert(a.grad) if place == 1 else a.grad.clone()
        twins.reference.step()
        twins.tested.step()
    assert twins.difference() < 1e-12


@pytest.mark.parametrize("kind", ["shared with a parameter", "differentiable", "negative weight decay"])
def test_a_repeated_step_that_is_refused_changes_nothing(kind):
    twins = warm()
    before = [p.detach().clone() for p in twins.ours]
    for p in twins.ours:
        p.grad = torch.ones_like(p)
    if kind == "shared with a parameter":
        twins.ours[-1].grad = twins.ours[-1].detach()
    else:
        group = twins.tested.param_groups[0]
        group.update({"differentiable": True} if kind == "differentiable" else {"weight_decay": -1.0})
    with pytest.raises(ValueError, match=r"shares memory with|differentiable: True|Invalid weight_decay value: -1.0"):
        twins.tested.step()
    assert all(map(torch.equal, before, twins.ours))
    assert [float(named["step"]) for named in twins.tested.state.values()] == [WARM] * len(SHAPES)


def test_an_optimizer_that_its_parameter_refers_to_is_collected():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = fastadam.torch.Adam([weight])
    weight.owner = optimizer
    for _ in range(WARM):
        weight.grad = torch.ones(3)
        optimizer.step()
    gone = weakref.ref(optimizer)
    del optimizer, weight
    gc.collect()
    assert gone() is None


def test_random_halves_of_many_parameters_keep_a_bounded_number_of_sets():
    twins = Twins("Adam", parameters(*[(2,)] * 200), lr=0.01)
    choose = random.Random(0)
    for _ in range(300):
        twins.step(set(choose.sample(range(200), 100)))
    partitions = twins.tested._stepper.partitions
    assert len(partitions) <= 256
    assert twins.difference() < 1e-12
    assert all(
        float(twins.reference.state[a]["step"]) == float(twins.tested.state[b]["step"])
        for a, b in zip(twins.theirs, twins.ours, strict=True)
    )


def test_a_repeated_step_that_is_refused_counts_as_no_write():
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = fastadam.torch.Adam([parameter])
    for _ in range(4):
        parameter.grad = torch.ones(4)
        optimizer.step()
    version, before = parameter._version, parameter.detach().clone()
    parameter.grad = parameter.detach()  # shares the memory that the step writes
    with pytest.raises(ValueError, match="shares memory"):
        optimizer.step()
    assert parameter._version == version
    assert torch.equal(parameter.detach(), before)
