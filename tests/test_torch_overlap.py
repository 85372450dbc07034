"""overlap: the step of each parameter while the backward pass goes on, with the bits of step()."""

from __future__ import annotations

import contextlib
import gc

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from helpers import run_python  # noqa: E402
from test_torch_buckets import are_same, state_of  # noqa: E402

BUCKET = 0.004  # MB: a thousand parameters


def model_of(width=32, layers=4):
    torch.manual_seed(1)
    layer = lambda: (torch.nn.Linear(width, width), torch.nn.GELU())  # noqa: E731
    return torch.nn.Sequential(*[module for _ in range(layers) for module in layer()])


def loss_of(net, step=0):
    torch.manual_seed(step)
    return net(torch.randn(8, 32)).square().mean() * (30 if step % 5 == 4 else 1)


def prepared(**options):
    net = model_of()
    return net, fastadam.torch.AdamW(net.parameters(), lr=1e-2, **options), list(net.parameters())


def run(mode, steps=12, **options):
    net, optimizer, params = prepared(**options)
    overlap = fastadam.torch.overlap(optimizer, bucket_mb=BUCKET, threads=1)
    if mode == "attach":
        overlap.attach()
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(net, step)
        if mode == "with":
            with fastadam.torch.overlap(optimizer, bucket_mb=BUCKET, threads=1):
                loss.backward()
        else:
            loss.backward()
            optimizer.step()
    overlap.detach()
    return state_of(optimizer, params)


OPTIONS = [
    {},
    {"global_clipnorm": 0.02},
    {"global_clipnorm": 1.0, "skip_nonfinite": True},
    {"clipnorm": 0.01},
    {"amsgrad": True, "weight_decay": 0.0, "clipvalue": 1e-3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["with", "attach"])
def test_overlapped_steps_have_the_bits_of_steps(mode, options):
    assert are_same(run(mode, **options), run("plain", **options))


def test_a_parameter_moves_before_the_backward_pass_ends():
    net, optimizer, params = prepared()
    last, seen = params[-2], []
    before = last.detach().clone()

    def look(_):
        step = optimizer._stepper.open
        for group in step._open._groups:
            group.handle.result(30)
        seen.append(torch.equal(before, last))

    params[0].register_hook(look)  # its gradient is the last one
    with fastadam.torch.overlap(optimizer, bucket_mb=0):
        loss_of(net).backward()
    assert seen == [False]


class StrangeError(Exception):
    """Raised by code that a backward pass runs."""


def fail(*_):
    raise StrangeError


def stepped(**options):
    net, optimizer, params = prepared(**options)
    loss_of(net).backward()
    optimizer.step()
    optimizer.zero_grad()
    return net, optimizer, params, state_of(optimizer, params)


@pytest.mark.parametrize("where", ["backward", "hook", "block", "interrupt"])
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_an_exception_in_the_block_undoes_the_step(options, where):
    net, optimizer, params, before = stepped(**options)
    error = KeyboardInterrupt if where == "interrupt" else StrangeError
    if where == "backward":
        handle = params[0].register_hook(fail)
    if where == "hook":
        handle = params[0].register_post_accumulate_grad_hook(fail)

    def block():
        with fastadam.torch.overlap(optimizer, bucket_mb=0):
            loss_of(net).backward()
            raise error

    with pytest.raises(error):
        block()
    if where in ("backward", "hook"):
        handle.remove()
    assert are_same(before, state_of(optimizer, params))
    assert all(not p._post_accumulate_grad_hooks for p in params)
    with fastadam.torch.overlap(optimizer, bucket_mb=0):
        for p in params:
            p.grad = None
        loss_of(net).backward()
    assert all(int(optimizer.state[p]["step"]) == 2 for p in params)


def test_an_exception_with_attached_hooks_is_undone_by_zero_grad():
    net, optimizer, params, before = stepped()
    overlap = fastadam.torch.overlap(optimizer, bucket_mb=0).attach()
    handle = params[0].register_hook(fail)
    with pytest.raises(StrangeError):
        loss_of(net).backward()
    handle.remove()
    optimizer.zero_grad()
    assert are_same(before, state_of(optimizer, params))
    loss_of(net).backward()
    optimizer.step()
    assert all(int(optimizer.state[p]["step"]) == 2 for p in params)
    overlap.detach()
    optimizer.zero_grad()
    loss_of(net).backward()
    optimizer.step()
    assert all(int(optimizer.state[p]["step"]) == 3 for p in params)


@pytest.mark.parametrize("mode", ["with", "attach"])
def test_a_second_backward_pass_is_refused_and_the_step_undone(mode):
    net, optimizer, params, before = stepped()
    overlap = fastadam.torch.overlap(optimizer, bucket_mb=0)

    def both():
        loss_of(net).backward()
        loss_of(net, 1).backward()

    if mode == "with":
        with pytest.raises(RuntimeError, match="a second backward pass in one step, which was undone"), overlap:
            both()
    else:
        overlap.attach()
        with pytest.raises(RuntimeError, match="a second backward pass in one step, which was undone"):
            both()
        overlap.detach()
    assert are_same(before, state_of(optimizer, params))


def test_gradients_are_accumulated_before_the_block():
    results = []
    for overlaps in (False, True):
        net, optimizer, params, _ = stepped(global_clipnorm=0.05)
        loss_of(net).backward()
        if overlaps:
            with fastadam.torch.overlap(optimizer, bucket_mb=BUCKET):
                loss_of(net, 1).backward()
        else:
            loss_of(net, 1).backward()
            optimizer.step()
        results.append(state_of(optimizer, params))
    assert are_same(*results)


def test_parameters_without_gradient_and_frozen_ones_stay():
    net, optimizer, params, _ = stepped()
    params[0].requires_grad_(False)
    with fastadam.torch.overlap(optimizer):
        net[2:](torch.ones(8, 32)).sum().backward()
    assert [int(optimizer.state[p]["step"]) for p in params[:4]] == [1, 1, 2, 2]


def test_a_scaled_loss():
    results = []
    for scale in (1.0, 1024.0):
        net, optimizer, params, _ = stepped(global_clipnorm=0.05)
        with fastadam.torch.overlap(optimizer, loss_scale=scale, bucket_mb=BUCKET):
            (loss_of(net) * scale).backward()
        results.append(state_of(optimizer, params))
    assert are_same(*results)


def test_a_scaler_is_refused():
    net, optimizer, params, before = stepped()
    overlap = fastadam.torch.overlap(optimizer, bucket_mb=0).attach()
    loss_of(net).backward()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    with pytest.raises(RuntimeError, match=r"grad_scale, found_inf: .* expected overlap\(..., loss_scale=...\)"):
        optimizer.step()
    assert are_same(before, state_of(optimizer, params))
    overlap.detach()


def test_hooks_that_a_signal_has_left_do_nothing():
    net, optimizer, params, before = stepped()
    left = fastadam.torch.overlap(optimizer, bucket_mb=0)
    left.__enter__()  # Ctrl-C came before the first line of __exit__
    loss_of(net).backward()
    optimizer.zero_grad()
    assert are_same(before, state_of(optimizer, params))
    with fastadam.torch.overlap(optimizer, bucket_mb=0):
        loss_of(net).backward()
    optimizer.zero_grad()
    loss_of(net).backward()
    optimizer.step()
    assert all(int(optimizer.state[p]["step"]) == 3 for p in params)


def test_mistakes():
    _, optimizer, _, _ = stepped()
    overlap = fastadam.torch.overlap(optimizer).attach()
    with pytest.raises(RuntimeError, match="attach: already attached, expected detach"):
        overlap.attach()
    overlap.detach()
    with fastadam.torch.overlap(optimizer), pytest.raises(RuntimeError, match="begin_step: a step is open"):
        fastadam.torch.overlap(optimizer).__enter__()
    gc.collect()


def test_the_interpreter_exits_in_a_block():
    code = """
import torch, fastadam.torch
net = torch.nn.Linear(400, 400)
optimizer = fastadam.torch.AdamW(net.parameters())
overlap = fastadam.torch.overlap(optimizer, bucket_mb=0).attach()
net(torch.ones(2, 400)).sum().backward()
print("exits")
"""
    result = run_python(code, exits=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "exits\n", "")


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_gradients_of_compute_params_step_their_masters(attach, clip):
    def trained(how):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).bfloat16()
        weights = list(model.parameters())
        masters = [torch.nn.Parameter(weight.detach().float()) for weight in weights]
        groups = [{"params": masters, "compute_params": weights}]
        optimizer = fastadam.torch.AdamW(groups, lr=0.01, global_clipnorm=clip)
        x = torch.randn(32, 8).bfloat16()
        overlapped = fastadam.torch.overlap(optimizer, bucket_mb=0)
        if how == "attach":
            overlapped.attach()
        for _ in range(10):
            optimizer.zero_grad()
            with overlapped if how == "with" else contextlib.nullcontext():
                (model(x) - x.sum(1, keepdim=True)).float().square().mean().backward()
            if how == "plain":
                for master, weight in zip(masters, weights, strict=True):
                    master.grad_dtype = torch.bfloat16
                    master.grad, weight.grad = weight.grad, None
            if how != "with":
                optimizer.step()
        return masters, weights

    (masters, weights), (ours, copies) = trained("plain"), trained("attach" if attach else "with")
    for master, weight, mine, copy in zip(masters, weights, ours, copies, strict=True):
        assert torch.equal(mine, master)
        assert torch.equal(copy, weight)
        assert torch.equal(copy, mine.bfloat16())
