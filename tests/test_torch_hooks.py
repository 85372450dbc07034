"""What PyTorch has around an optimizer: global hooks, averages of parameters, schedulers and their resumption."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from torch_network import assert_same, batches, bits, network  # noqa: E402

KINDS = [torch.optim.AdamW, fastadam.torch.AdamW]


def steps_of(kind, then=lambda optimizer: None, start=lambda model, optimizer: None, count=6, **options):
    """Parameters after some steps, with what ``start`` returned; ``then`` is called after each step with it."""
    model = network()
    optimizer = kind(model.parameters(), lr=0.1, **options)
    helper = start(model, optimizer)
    for batch in batches()[:count]:
        optimizer.zero_grad()
        model.eval()(batch).square().mean().backward()
        optimizer.step()
        then(helper)
    return model, optimizer, helper


@pytest.mark.parametrize("fused", [None, True])
def test_global_hooks_see_every_step(fused):
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    def calls(kind):
        seen = []
        handles = [
            register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append(("before", len(o.state)))),
            register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append(("after", len(o.state)))),
        ]
        try:
            steps_of(kind, count=2, fused=fused)
        finally:
            for handle in handles:
                handle.remove()
        steps_of(kind, count=1)
        return seen

    theirs, ours = map(calls, KINDS)
    assert ours == theirs == [("before", 0), ("after", 4), ("before", 4), ("after", 4)]


def test_a_hook_may_change_gradients_and_rates():
    def double(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
            for param in group["params"]:
                param.grad.mul_(2.0)

    theirs, ours = (steps_of(kind, start=lambda _, o: o.register_step_pre_hook(double))[0] for kind in KINDS)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_averages_and_rates_of_swa_utils():
    from torch.optim import swa_utils

    def start(model, optimizer):
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
        return average, swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=3), model

    def then(helper):
        average, rate, model = helper
        average.update_parameters(model)
        rate.step()

    (_, _, theirs), (_, optimizer, ours) = (steps_of(kind, then, start) for kind in KINDS)
    assert optimizer.param_groups[0]["lr"] == theirs[1].get_last_lr()[0] == pytest.approx(0.01)
    for a, b in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_average_is_resumed_to_the_bit():
    """Its parameters are copies that no step touches, in memory of their own."""
    from torch.optim import swa_utils

    def start():
        model = network()
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
        return model, fastadam.torch.AdamW(model.parameters(), lr=0.1), average

    def train_on(model, optimizer, average, data):
        for batch in data:
            optimizer.zero_grad()
            model.eval()(batch).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)

    whole, resumed, data = start(), start(), batches()
    train_on(*whole, data[:4])
    for part, other in zip(whole, resumed, strict=True):
        other.load_state_dict(copy.deepcopy(part.state_dict()))
    for each in (whole, resumed):
        train_on(*each, data[4:])
    assert_same(bits(*resumed[:2]), bits(*whole[:2]))
    assert_same(list(resumed[2].state_dict().values()), list(whole[2].state_dict().values()))
    assert int(whole[2].n_averaged) == 8
    assert not torch.equal(next(whole[2].parameters()), next(whole[0].parameters()))


def test_hooks_of_state_dicts_see_and_change_what_they_do_in_torch():
    def calls(kind):
        seen = []
        _, optimizer, _ = steps_of(kind, count=2)

        def change(o, state_dict):
            seen.append(("saved", sorted(state_dict)))
            state_dict["param_groups"][0]["lr"] = 0.5
            return {**state_dict, "more": 1}

        def before(o, state_dict):
            seen.append(("loading", state_dict.pop("more")))
            return state_dict

        optimizer.register_state_dict_pre_hook(lambda o: seen.append(("saving", len(o.state))))
        optimizer.register_state_dict_post_hook(change)
        optimizer.register_load_state_dict_pre_hook(before)
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append(("loaded", o.param_groups[0]["lr"])))
        optimizer.load_state_dict(optimizer.state_dict())
        return seen

    theirs, ours = map(calls, KINDS)
    assert ours == theirs
    assert [name for name, _ in ours] == ["saving", "saved", "loading", "loaded"]
    assert ours[-1] == ("loaded", 0.5)


def test_a_step_in_the_backward_pass_has_the_bits_of_one_after_it():
    """One optimizer for each parameter, in a hook that PyTorch calls when its gradient is there; and so resumed."""

    def start():
        model = network().eval()
        optimizers = {p: fastadam.torch.AdamW([p], lr=0.1) for p in model.parameters()}

        def step(p):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in optimizers:
            p.register_post_accumulate_grad_hook(step)
        return model, list(optimizers.values())

    def train_on(model, data):
        for batch in data:
            model(batch).square().mean().backward()

    (whole, optimizers), (resumed, others), data = start(), start(), batches()
    train_on(whole, data[:4])
    resumed.load_state_dict(whole.state_dict())
    for optimizer, other in zip(optimizers, others, strict=True):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (whole, resumed):
        train_on(each, data[4:])
    plain, _, _ = steps_of(fastadam.torch.AdamW, count=8)
    assert_same(list(whole.parameters()), list(plain.parameters()))
    assert_same(list(resumed.parameters()), list(plain.parameters()))


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
            milestones=[2],
        ),
        lambda o: torch.optim.lr_scheduler.ChainedScheduler(
            [torch.optim.lr_scheduler.ConstantLR(o, 0.5, 2), torch.optim.lr_scheduler.StepLR(o, 2)]
        ),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    ],
    ids=["LambdaLR", "SequentialLR", "ChainedScheduler", "CosineAnnealingWarmRestarts", "ReduceLROnPlateau"],
)
def test_a_run_with_a_scheduler_is_resumed_to_the_bit(make):
    def advance(scheduler):
        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*([1.0] if plateau else []))

    def train_on(model, optimizer, scheduler, data):
        for batch in data:
            optimizer.zero_grad()
            model.eval()(batch).square().mean().backward()
            optimizer.step()
            advance(scheduler)

    def start():
        model = network()
        optimizer = fastadam.torch.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, make(optimizer)

    whole, resumed, data = start(), start(), batches()
    train_on(*whole, data[:4])
    for part, other in zip(whole, resumed, strict=True):
        other.load_state_dict(copy.deepcopy(part.state_dict()))
    for each in (whole, resumed):
        train_on(*each, data[4:])
    assert_same(bits(*resumed[:2]), bits(*whole[:2]))
    assert resumed[2].get_last_lr() == whole[2].get_last_lr() != [0.1]
