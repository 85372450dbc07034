"""State dicts, pickles, hooks, schedulers, closures and GradScaler with fastadam.torch, as torch's own tests ask."""

from __future__ import annotations

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from torch_twins import PAIRS, Twins, check_same, parameters, step, values  # noqa: E402

SHAPES = [(5, 3), (7,), ()]


# ---- state dicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("to_ours", [False, True])
def test_state_dicts_go_both_ways(name, amsgrad, to_ours):
    classes = PAIRS[name] if to_ours else PAIRS[name][::-1]
    first = classes[0](parameters(*SHAPES), lr=0.1, amsgrad=amsgrad, weight_decay=0.1)
    for seed in range(3):
        step(first, seed)
    second = classes[1]([torch.nn.Parameter(value) for value in values(first)], lr=0.7)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(3, 6):
        step(first, seed)
        step(second, seed)
    check_same(first, second)
    a, b = first.state_dict(), second.state_dict()
    assert [list(group) for group in a["param_groups"]] == [list(group) for group in b["param_groups"]]
    assert {k: list(v) for k, v in a["state"].items()} == {k: list(v) for k, v in b["state"].items()}
    assert all(x["step"].dtype == y["step"].dtype and x["step"].dim() == 0 for x, y in zip(a["state"].values(), b["state"].values(), strict=True))  # fmt: skip


def test_loading_clones():
    first = fastadam.torch.Adam(parameters(*SHAPES))
    step(first, 0)
    saved = first.state_dict()
    second = fastadam.torch.Adam(parameters(*SHAPES))
    second.load_state_dict(saved)
    before = copy.deepcopy(saved["state"])
    step(second, 1)
    for key, named in saved["state"].items():
        assert all(torch.equal(value, before[key][name]) for name, value in named.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loading_keeps_the_dtype_of_moments(dtype):
    wide = fastadam.torch.Adam(parameters(*SHAPES, dtype=dtype), lr=0.1, moments="float32")
    for seed in range(3):
        step(wide, seed)
    saved = copy.deepcopy(wide.state_dict())
    for option in (None, "float32"):
        resumed = fastadam.torch.Adam([torch.nn.Parameter(v) for v in values(wide)], moments=option)
        resumed.load_state_dict(saved)
        assert all(state["exp_avg"].dtype == torch.float32 for state in resumed.state.values())
        twin = copy.deepcopy(wide)
        for seed in range(3, 6):
            step(twin, seed)
            step(resumed, seed)
        check_same(twin, resumed, 0)
    narrow = fastadam.torch.Adam(parameters(*SHAPES, dtype=dtype))
    step(narrow, 0)
    widened = fastadam.torch.Adam(parameters(*SHAPES, dtype=dtype), moments="float32")
    widened.load_state_dict(narrow.state_dict())
    assert all(state["exp_avg_sq"].dtype == torch.float32 for state in widened.state.values())
    single = fastadam.torch.Adam(parameters(*SHAPES, dtype=torch.float32))
    single.load_state_dict(narrow.state_dict())
    assert all(state["exp_avg"].dtype == torch.float32 for state in single.state.values())
    step(single, 1)


def test_saved_groups_do_not_switch_flags_of_the_implementation():
    theirs = torch.optim.Adam(parameters(*SHAPES), lr=0.1, foreach=True)
    step(theirs, 0)
    saved = copy.deepcopy(theirs.state_dict())
    saved["param_groups"][0].update(differentiable=True, capturable=True)
    ours = fastadam.torch.Adam(parameters(*SHAPES), fused=True, sparse_update="lazy", moments="float32")
    ours.load_state_dict(saved)
    group = ours.param_groups[0]
    assert (group["fused"], group["foreach"], group["differentiable"], group["capturable"]) == (
        True,
        None,
        False,
        False,
    )
    assert (ours.sparse_update, group["moments"]) == ("lazy", "float32")
    assert group["lr"] == 0.1
    decoupled = fastadam.torch.AdamW(parameters(*SHAPES))
    decoupled.load_state_dict(saved)
    assert decoupled.param_groups[0]["decoupled_weight_decay"] is True


def test_older_state_dicts_and_steps_that_are_numbers():
    theirs = torch.optim.Adam(parameters(*SHAPES), lr=0.1)
    step(theirs, 0)
    saved = copy.deepcopy(theirs.state_dict())
    for name in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay", "amsgrad"):
        del saved["param_groups"][0][name]
    for named in saved["state"].values():
        named["step"] = 1
    ours = fastadam.torch.Adam([torch.nn.Parameter(value) for value in values(theirs)])
    ours.load_state_dict(saved)
    for seed in (1, 2):
        step(theirs, seed)
        step(ours, seed)
    check_same(theirs, ours)


def test_a_state_dict_of_other_groups_is_refused():
    ours = fastadam.torch.Adam(parameters(*SHAPES))
    step(ours, 0)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        ours.load_state_dict(fastadam.torch.Adam(parameters((2,))).state_dict())
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(before["state"].values(), ours.state_dict()["state"].values(), strict=True))  # fmt: skip
    step(ours, 1)


@pytest.mark.parametrize("weights_only", [False, True])
def test_torch_save(weights_only):
    ours = fastadam.torch.Adam(parameters(*SHAPES), amsgrad=True)
    step(ours, 0)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    resumed = fastadam.torch.Adam([torch.nn.Parameter(v) for v in values(ours)])
    resumed.load_state_dict(torch.load(file, weights_only=weights_only))
    step(ours, 1)
    step(resumed, 1)
    check_same(ours, resumed, 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_copies_go_on_alone(copied):
    ours = fastadam.torch.AdamW(parameters(*SHAPES), lr=0.1, sparse_update="lazy", moments="float32")
    for seed in range(3):
        step(ours, seed)
    twin = copied(ours)
    assert (twin.sparse_update, twin.param_groups[0]["moments"]) == ("lazy", "float32")
    before = values(twin)
    step(ours, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, values(twin), strict=True))
    step(twin, 3)
    check_same(ours, twin, 0)
    assert [float(s["step"]) for s in twin.state.values()] == [4, 4, 4]
    twin.register_step_pre_hook(_raise)
    with pytest.raises(RuntimeError, match="hook"):
        step(twin, 4)


def _raise(*_):
    raise RuntimeError("hook")


def test_steps_that_users_set_count():
    twins = Twins("Adam", parameters(*SHAPES), lr=0.1)
    for round_ in range(3):
        twins.step()
        for optimizer, weights in ((twins.reference, twins.theirs), (twins.tested, twins.ours)):
            if round_ == 0:
                optimizer.state[weights[0]]["step"].fill_(7.0)
            else:
                optimizer.state[weights[1]]["step"] = torch.tensor(3.0)
                optimizer.state[weights[2]]["exp_avg"] = torch.ones_like(weights[2])
    twins.step()
    assert twins.difference() < 1e-12
    assert [float(s["step"]) for s in twins.tested.state.values()] == [10, 4, 4]


def test_a_state_that_was_dropped_starts_anew():
    twins = Twins("Adam", parameters(*SHAPES), lr=0.1)
    twins.step()
    for optimizer, weights in ((twins.reference, twins.theirs), (twins.tested, twins.ours)):
        del optimizer.state[weights[1]]
    twins.step()
    assert twins.difference() < 1e-12
    for optimizer in (twins.reference, twins.tested):
        optimizer.state.clear()
    twins.step()
    assert twins.difference() < 1e-12


# ---- around a step --------------------------------------------------------------------------------------------------


def test_closures_hooks_and_the_profile():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = fastadam.torch.Adam([weight], lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = weight.pow(2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure).detach()) == 3.0
    assert calls == ["before", True, "after"]
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))
    assert "Parameter Group 0" in repr(optimizer)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
    ],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers(schedule, as_tensor):
    rate = torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1
    twins = Twins("AdamW", parameters(*SHAPES), lr=rate)
    schedulers = [schedule(twins.reference), schedule(twins.tested)]
    for _ in range(15):
        twins.step()
        for scheduler in schedulers:
            scheduler.step()
    assert twins.difference() < 1e-12
    assert twins.reference.param_groups[0]["betas"] == twins.tested.param_groups[0]["betas"]


@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler(unscale_first):
    trained = []
    for cls in PAIRS["Adam"]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer, scaler = cls(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for k in range(6):
            optimizer.zero_grad()
            x = torch.randn(2, 4)
            x[0, 0] = float("inf") if k == 3 else 1.0
            scaler.scale(model(x).sum()).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
            before = model.weight.detach().clone()
            scaler.step(optimizer)
            assert torch.equal(before, model.weight) == (k == 3)
            scaler.update()
        assert float(optimizer.state[model.weight]["step"]) == 5
        trained.append((model.weight.detach(), scaler.get_scale()))
    torch.testing.assert_close(trained[0][0], trained[1][0], rtol=1e-6, atol=1e-7)
    assert trained[0][1] == trained[1][1]


def test_a_scale_that_users_set():
    twins = Twins("Adam", parameters(*SHAPES), lr=0.1)
    scale = torch.tensor(8.0)
    twins.step()
    for parameter in twins.ours:
        parameter.grad = torch.ones_like(parameter) * 8
    for parameter in twins.theirs:
        parameter.grad = torch.ones_like(parameter)
    twins.tested.grad_scale = scale
    twins.tested.step()
    twins.reference.step()
    assert twins.difference() < 1e-12
    assert all(bool((parameter.grad == 1).all()) for parameter in twins.ours)
    twins.tested.found_inf = torch.tensor(1.0)
    before = copy.deepcopy(twins.tested.state_dict())
    twins.tested.step()
    assert float(twins.tested.state[twins.ours[0]]["step"]) == float(before["state"][0]["step"])


def test_named_parameters_name_errors():
    model = torch.nn.Linear(2, 2)
    optimizer = fastadam.torch.Adam(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    step(optimizer, 0)
    optimizer.state[model.bias]["exp_avg_sq"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"state of parameter 'bias': exp_avg_sq: shape \(3,\), expected \(2,\)"):
        step(optimizer, 1)


def test_the_groups_have_torchs_keys():
    theirs, ours = (cls(parameters((1,))) for cls in PAIRS["AdamW"])
    assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()
    assert ours.defaults == theirs.defaults


def test_moments_are_made_at_the_first_gradient():
    first, second = parameters((2,), (3,))
    optimizer = fastadam.torch.Adam([first, second])
    first.grad = torch.ones(2).double()
    optimizer.step()
    assert list(optimizer.state) == [first]
    assert list(optimizer.state[first]) == ["step", "exp_avg", "exp_avg_sq"]
    assert optimizer.state[first]["step"].dtype == torch.float32


@pytest.mark.parametrize("count", [1e30, 2.0**63, 2.0**62])
def test_a_step_count_that_no_integer_holds_is_refused_by_name(count):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = fastadam.torch.Adam([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[parameter]["step"] = torch.tensor(count)
    before = parameter.detach().clone()
    with pytest.raises(ValueError, match=r"state of .*: step .*, expected a whole number from 0 to 2\*\*62 - 1"):
        optimizer.step()
    assert torch.equal(parameter.detach(), before)


@pytest.mark.parametrize("options", [{}, {"master": "float32"}, {"moments": "8bit"}, {"moments": "bfloat16"}], ids=str)
@pytest.mark.parametrize(
    ("before", "after"),
    [("float32", "float64"), ("bfloat16", "float64"), ("float16", "float64"), ("bfloat16", "float16")],
)
def test_a_module_converted_after_steps_is_refused_with_a_way_out_that_works(before, after, options):
    module = torch.nn.Linear(100, 50).to(getattr(torch, before))
    optimizer = fastadam.torch.Adam(module.parameters(), lr=0.01, **options)

    def step():
        for param in module.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()

    step()
    module.to(getattr(torch, after))
    values = module.weight.detach().clone()
    if after == "float64" or not options:
        with pytest.raises(
            TypeError,
            match=rf"exp_avg: .*expected torch.{after} .*module.double\(\).* opt.load_state_dict\(opt.state_dict",
        ):
            step()
        assert torch.equal(module.weight, values)
    optimizer.load_state_dict(optimizer.state_dict())
    step()
    assert (module.weight.double() - values.double() + 0.01).abs().max() < 2e-3
    assert optimizer.state[module.weight]["step"] == 2
