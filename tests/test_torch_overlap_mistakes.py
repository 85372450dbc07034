"""overlap: arguments that are refused, steps that are dropped, and gradients that lose their memory."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import fastadam  # noqa: E402
import fastadam.torch  # noqa: E402
from test_torch_overlap import loss_of, prepared  # noqa: E402

ARGUMENTS = {
    "bucket_mb": [(-1, ValueError), (float("nan"), ValueError), ("25", TypeError), (True, TypeError)],
    "threads": [(0, ValueError), (1.5, TypeError), ("2", TypeError)],
    "loss_scale": [(0, ValueError), (float("inf"), ValueError), (None, TypeError)],
}


@pytest.mark.parametrize(("name", "value", "error"), [(n, *case) for n, cases in ARGUMENTS.items() for case in cases])
def test_arguments_are_refused_where_they_are_given(name, value, error):
    """Not in a hook of the first backward pass."""
    _, optimizer, _ = prepared()
    with pytest.raises(error, match=f"^{name}: "):
        fastadam.torch.overlap(optimizer, **{name: value})


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW([torch.ones(1)]), fastadam.Adam(), [torch.ones(1)], None])
def test_what_is_not_an_optimizer_of_fastadam_torch(optimizer):
    with pytest.raises(TypeError, match=f"^optimizer: {type(optimizer).__name__}, expected a fastadam.torch.Adam"):
        fastadam.torch.overlap(optimizer)


@pytest.mark.parametrize("drop", ["zero_grad", "abort_step", "end_step"])
def test_a_step_that_is_dropped_in_the_block(drop):
    net, optimizer, _ = prepared()
    overlap = fastadam.torch.overlap(optimizer)
    overlap.__enter__()
    getattr(optimizer, drop)()
    loss_of(net).backward()
    with pytest.raises(RuntimeError, match=r"^overlap: the step was ended or dropped inside the block, expected no"):
        overlap.__exit__(None, None, None)
    with overlap:
        loss_of(net).backward()


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize(("key", "value"), [("lr", 0.5), ("betas", (0.5, 0.6)), ("weight_decay", 0.3)])
def test_numbers_that_are_set_between_the_backward_pass_and_the_step(key, value, kind, early):
    """The early part has used the old ones, so the step would be neither the old nor the new."""
    _, optimizer, params = prepared()
    [group] = optimizer.param_groups
    group["lr"] = kind(1e-2)
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.begin_step(early=early)
    optimizer.step_bucket(params).result(30)
    old = group[key]
    if isinstance(old, torch.Tensor):
        old.fill_(value)
    else:
        group[key] = value
    with pytest.raises(RuntimeError, match=rf"^param_groups\[0\]\['{key}'\]: set from .* while a step was open"):
        optimizer.end_step()
    assert all(map(torch.equal, before, params))
    optimizer.step()


@pytest.mark.parametrize("option", ["clipvalue", "clipnorm", "global_clipnorm", "skip_nonfinite"])
def test_clipping_is_not_set_while_a_step_is_open(option):
    _, optimizer, _ = prepared()
    optimizer.begin_step()
    with pytest.raises(RuntimeError, match=f"^{option}: a step is open, expected end_step"):
        setattr(optimizer, option, True if option == "skip_nonfinite" else 1.0)
    optimizer.abort_step()
    assert not getattr(optimizer, option)


def test_the_scale_of_the_loss_is_not_rounded_to_the_default_dtype():
    def moment():
        weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float32))
        optimizer = fastadam.torch.Adam([weight])
        weight.grad = torch.ones_like(weight)
        optimizer.begin_step(loss_scale=3.3)
        optimizer.step_bucket([weight])
        optimizer.end_step()
        return optimizer.state[weight]["exp_avg"]

    expected = moment()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(moment(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


TAKEN = {
    "its storage": lambda gradient: gradient.untyped_storage().resize_(0),
    "its elements": lambda gradient: gradient.resize_(0),
}


@pytest.mark.parametrize("taken", TAKEN)
def test_a_gradient_whose_memory_is_taken_away_leaves_all_other_tensors_as_they_were(taken):
    _, optimizer, params = prepared(global_clipnorm=1e-3)
    for scale in (1e-6, 1.0):  # the second step is clipped: it is undone
        for param in params:
            param.grad = torch.full_like(param, scale)
        if scale < 1:
            optimizer.step()
    before = [tensor.detach().clone() for tensor in kept(optimizer, params, but=params[1])]
    optimizer.begin_step(early=True)
    optimizer.step_bucket(params).result(30)
    TAKEN[taken](params[1].grad)
    with pytest.raises(RuntimeError, match=r"gradients of .*'params'\]\[1\]: changed since step_bucket\(\)"):
        optimizer.end_step()
    assert all(map(torch.equal, before, kept(optimizer, params, but=params[1])))


def kept(optimizer, params, but):
    moments = [
        state[name] for p, state in optimizer.state.items() if p is not but for name in ("exp_avg", "exp_avg_sq")
    ]
    return [*params, *moments]


def test_another_overlap_is_refused():
    optimizer = fastadam.torch.AdamW([torch.nn.Parameter(torch.ones(3))])
    attached = fastadam.torch.overlap(optimizer).attach()
    other = fastadam.torch.overlap(optimizer)
    with pytest.raises(RuntimeError, match=r"attach: another overlap\(\) of this optimizer is attached, expected its"):
        other.attach()
    attached.detach()
    other.attach()
