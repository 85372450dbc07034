"""The contenders of bench/overlap.py: gradients with the step after them, or meanwhile; and steps that are undone.

`how` says what a contender does; with "gradients" nothing is stepped. Those that keep a log have made 100 steps before
they are timed. `clip` says which steps exceed the bound of the joint norm: None for no bound, "never", "always", or
"tenth" for one step in ten; with a bound, gradients must also be finite.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from common import Contender
from fastadam._core.native.buckets import Guess
from fastadam.torch import AdamW, overlap
from host_contenders import _parts
from models import small_gpt

STEPS = 10  # in one call of a contender
BEFORE = 100  # steps that a log takes to become as it stays; a multiple of STEPS, so that the tenth ends a call
BUCKETS = 16
BATCHES = 8  # that follow one another, so that moments do not settle on one gradient
SPIKE = 5.0  # what the tenth gradient is multiplied by
BOUNDS = {"never": 1e6, "always": 0.5, "tenth": 2.0}  # times the norm of the first gradients


def _norm(parameters) -> float:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()


def _optimizer(parameters, clip: str | None) -> AdamW:
    """With a rate that leaves norms as they are; the parameters have their first gradients."""
    if clip is None:
        return AdamW(parameters, lr=1e-6)
    return AdamW(parameters, lr=1e-6, global_clipnorm=BOUNDS[clip] * _norm(parameters), skip_nonfinite=True)


def _is_spike(clip: str | None, step: int) -> bool:
    return clip == "tenth" and step % STEPS == STEPS - 1


# ---- a backward pass ------------------------------------------------------------------------------------------------


def _gpt_steps(model, batch: int, how: str, clip: str | None, step_threads: int | None):
    """One call: forward, backward and step. Also returns the parameters and the optimizer."""
    context, (words, _) = model.places.weight.shape[0], model.words.weight.shape
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(words, (batch, context), generator=generator) for _ in range(BATCHES)]
    parameters = list(model.parameters())
    model(batches[0]).backward()
    optimizer = _optimizer(parameters, clip)
    optimizer.zero_grad()
    if how == "overlap":
        megabytes = sum(parameter.nbytes for parameter in parameters) / 2**20
        overlap(optimizer, bucket_mb=megabytes / BUCKETS, threads=step_threads).attach()
    count = 0

    def step() -> None:
        nonlocal count
        loss = model(batches[count % BATCHES]) * (SPIKE if _is_spike(clip, count) else 1.0)
        count += 1
        loss.backward()
        if how != "gradients":
            optimizer.step()
        optimizer.zero_grad()

    return step, parameters, optimizer


def gpt(sizes, how, clip=None, batch=1, threads=None, step_threads=None):
    """A GPT on the CPU; how: "gradients", "step after" or "overlap". `threads`: of the backward pass."""
    if threads is not None:
        torch.set_num_threads(threads)
    runs = [_gpt_steps(small_gpt(64, 2, 100, 8), 2, way, clip, step_threads) for way in (how, "step after")]
    _compare([run[0] for run in runs], [run[1] for run in runs], how)
    return _many(_gpt_steps(small_gpt(), batch, how, clip, step_threads)[0], how)


# ---- gradients that arrive ------------------------------------------------------------------------------------------


def _arrival_steps(sizes: list[int], rate: float, how: str, clip: str | None):
    """One call: all gradients arrive, and are stepped. Also returns the parameters."""
    parameters, lists = _tensors(sizes, 4)
    for parameter, gradient in zip(parameters, lists[0], strict=True):
        parameter.grad = gradient.clone()
    sources = [dict(zip(parameters, each, strict=True)) for each in lists]
    if clip == "tenth":
        sources.append({parameter: gradient * SPIKE for parameter, gradient in sources[0].items()})
    parts = _parts(parameters[::-1], BUCKETS)
    optimizer = _optimizer(parameters, clip)
    count = 0

    def step() -> None:
        nonlocal count
        source = sources[-1 if _is_spike(clip, count) else count % len(lists)]
        count += 1
        if how == "overlap":
            optimizer.begin_step(early=True)
        due = time.perf_counter()
        for part in parts:
            due += sum(parameter.nbytes for parameter in part) / rate
            for parameter in part:
                parameter.grad.copy_(source[parameter])
            time.sleep(max(0.0, due - time.perf_counter()))
            if how == "overlap":
                optimizer.step_bucket(part)
        if how == "overlap":
            optimizer.end_step()
        elif how == "step after":
            optimizer.step()

    return step, parameters


def arrivals(sizes, how, rate, clip=None):
    """Gradients that arrive at `rate` GB/s, as from a GPU; how: "gradients", "step after" or "overlap"."""
    torch.set_num_threads(1)  # of the copies
    runs = [_arrival_steps([70_000, 37, 5000], 1e12, way, clip) for way in (how, "step after")]
    _compare([run[0] for run in runs], [run[1] for run in runs], how)
    return _many(_arrival_steps(sizes, rate * 1e9, how, clip)[0], how)


# ---- steps that are undone ------------------------------------------------------------------------------------------


def undo(sizes, how):
    """A step with a bound; how: "plain", "made early", "undone and made again", or "given up", which undoes it."""
    clip = "always" if how == "undone and made again" else "never"
    if how != "given up":
        runs = [_undo_steps([70_000, 37], way, clip) for way in (how, "plain")]
        _compare([run[0] for run in runs], [run[1] for run in runs], how)
    step = _undo_steps(sizes, how, clip)[0]
    for _ in range(BEFORE):
        step()
    return Contender(step)


def _undo_steps(sizes: list[int], how: str, clip: str):
    """A step; also returns the parameters and the optimizer."""
    parameters, gradients = _tensors(sizes, 4)
    for parameter, gradient in zip(parameters, gradients[0], strict=True):
        parameter.grad = gradient
    optimizer = _optimizer(parameters, clip)
    optimizer.param_groups[0]["lr"] = 1e-3
    count = 0

    def step() -> None:
        nonlocal count
        for parameter, gradient in zip(parameters, gradients[count % 4], strict=True):
            parameter.grad = gradient
        count += 1
        if how == "plain":
            return optimizer.step()
        optimizer._stepper.guess = Guess()  # it would not try again after two failures
        optimizer.begin_step(early=True)
        optimizer.step_bucket(parameters).result()
        return optimizer.abort_step() if how == "given up" else optimizer.end_step()

    return step, parameters, optimizer


def _log_bytes(step, parameters, optimizer) -> float:
    for _ in range(BEFORE):
        step()
    return sum(log.nbytes for log in optimizer._stepper.logs.values()) / sum(p.numel() for p in parameters)


LOG_BYTES = {  # for each parameter, of the log after 100 steps
    "gpt": lambda: _log_bytes(*_gpt_steps(small_gpt(), 1, "overlap", "never", None)),
    "undo": lambda: _log_bytes(*_undo_steps([2**20], "made early", "never")),
}


# ---- all of them ----------------------------------------------------------------------------------------------------


def _tensors(sizes: list[int], count: int):
    """Parameters, and `count` lists of gradients."""
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(size, generator=generator) for size in sizes] for _ in range(count + 1)]
    return [torch.nn.Parameter(values) for values in lists[0]], lists[1:]


def _many(step: Callable[[], None], how: str) -> Contender:
    """So many steps in one call, after others."""
    for _ in range(BEFORE if how == "overlap" else STEPS):
        step()

    def steps() -> None:
        for _ in range(STEPS):
            step()

    return Contender(steps)


def _compare(steps, parameters, how: str) -> None:
    """The same bits after some steps of both, unless `how` makes none."""
    if how == "gradients":
        return
    for _ in range(3 * STEPS):
        for step in steps:
            step()
        for found, expected in zip(*parameters, strict=True):
            if not torch.equal(found.detach().view(torch.int32), expected.detach().view(torch.int32)):
                raise RuntimeError(f"{how}: other bits than the plain step")
