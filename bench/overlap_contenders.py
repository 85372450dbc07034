"""The contenders of bench/overlap.py: gradients with the step after them, or meanwhile; and steps that are undone.

`clip` says which steps exceed the bound of the joint norm: None for no bound, "never", "always", or "tenth" for one
step in ten; with a bound, gradients must also be finite. `how` says what a contender does.
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
BUCKETS = 16
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


def _gpt_steps(model, batch: int, how: str, clip: str | None, step_threads: int | None) -> Callable[[], None]:
    """One call: forward, backward and step."""
    context, (words, _) = model.places.weight.shape[0], model.words.weight.shape
    ids = torch.randint(words, (batch, context), generator=torch.Generator().manual_seed(1))
    parameters = list(model.parameters())
    model(ids).backward()
    optimizer = _optimizer(parameters, clip)
    optimizer.zero_grad()
    count = 0

    def step() -> None:
        nonlocal count
        loss = model(ids) * (SPIKE if _is_spike(clip, count) else 1.0)
        count += 1
        if how == "overlap":
            with overlap(optimizer, threads=step_threads):
                loss.backward()
        else:
            loss.backward()
            if how == "step after":
                optimizer.step()
        optimizer.zero_grad()

    return step


def gpt(sizes, how, clip=None, batch=2, threads=None, step_threads=None):
    """A GPT on the CPU; how: "backward only", "step after" or "overlap". `threads`: of the backward pass."""
    if threads is not None:
        torch.set_num_threads(threads)
    small = [small_gpt(64, 2, 100, 8) for _ in range(2)]
    _compare(
        [_gpt_steps(model, 2, way, clip, step_threads) for model, way in zip(small, (how, "step after"), strict=True)],
        [list(model.parameters()) for model in small],
        how,
    )
    return _many(_gpt_steps(small_gpt(), batch, how, clip, step_threads))


# ---- gradients that arrive ------------------------------------------------------------------------------------------


def _arrival_steps(sizes: list[int], rate: float, how: str, clip: str | None):
    """One call: all gradients arrive, and are stepped. Also returns the parameters."""
    parameters, (come,) = _tensors(sizes, 1)
    spikes = [gradient * SPIKE for gradient in come] if clip == "tenth" else come
    for parameter, gradient in zip(parameters, come, strict=True):
        parameter.grad = gradient.clone()
    sources = [dict(zip(parameters, each, strict=True)) for each in (come, spikes)]
    parts = _parts(parameters[::-1], BUCKETS)
    optimizer = _optimizer(parameters, clip)
    count = 0

    def step() -> None:
        nonlocal count
        source = sources[_is_spike(clip, count)]
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
    """Gradients that arrive at `rate` GB/s, as from a GPU; how: "arrival only", "step after" or "overlap"."""
    torch.set_num_threads(1)  # of the copies
    runs = [_arrival_steps([70_000, 37, 5000], 1e12, way, clip) for way in (how, "step after")]
    _compare([run[0] for run in runs], [run[1] for run in runs], how)
    return _many(_arrival_steps(sizes, rate * 1e9, how, clip)[0])


# ---- steps that are undone ------------------------------------------------------------------------------------------


def undo(sizes, how):
    """A step with a bound; how: "plain", "made early", "undone and made again", or "given up", which undoes it."""
    clip = "always" if how == "undone and made again" else "never"
    if how != "given up":
        runs = [_undo_steps([70_000, 37], way, clip) for way in (how, "plain")]
        _compare([run[0] for run in runs], [run[1] for run in runs], how)
    step = _undo_steps(sizes, how, clip)[0]
    for _ in range(100):  # until the log is as it stays
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


def log_bytes(sizes: list[int], steps: int) -> float:
    """Bytes for each parameter that the log takes after so many steps."""
    step, _, optimizer = _undo_steps(sizes, "made early", "never")
    for _ in range(steps):
        step()
    return sum(log.nbytes for log in optimizer._stepper.logs.values()) / sum(sizes)


# ---- all of them ----------------------------------------------------------------------------------------------------


def _tensors(sizes: list[int], count: int):
    """Parameters, and `count` lists of gradients."""
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(size, generator=generator) for size in sizes] for _ in range(count + 1)]
    return [torch.nn.Parameter(values) for values in lists[0]], lists[1:]


def _many(step: Callable[[], None]) -> Contender:
    def steps() -> None:
        for _ in range(STEPS):
            step()

    return Contender(steps)


def _compare(steps, parameters, how: str) -> None:
    """The same bits after some steps of both, unless `how` makes none."""
    if how in ("backward only", "arrival only"):
        return
    for _ in range(3 * STEPS):
        for step in steps:
            step()
        for found, expected in zip(*parameters, strict=True):
            if not torch.equal(found.detach().view(torch.int32), expected.detach().view(torch.int32)):
                raise RuntimeError(f"{how}: other bits than the plain step")
