"""Steps of fastadam.torch in buckets: the bits of step(), whatever the buckets, their order and the threads."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import threading

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from helpers import run_python, weekly  # noqa: E402
from test_interrupts import either_way, interrupted  # noqa: E402


def same(a, b):
    """To the bit, payloads of NaN aside."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and bool(((a.view(integers) == b.view(integers)) | (a.isnan() & b.isnan())).all())


def state_of(optimizer, params):
    tensors = [(p, key, value) for p in params for key, value in sorted(optimizer.state[p].items())]
    return [p.detach().clone() for p in params] + [value.clone() for _, _, value in tensors]


def are_same(first, second):
    return len(first) == len(second) and all(map(same, first, second))


def random_options(choose):
    clips = [{}, {"global_clipnorm": choose.choice([1.0, 30.0, 300.0])}, {"clipnorm": choose.choice([1.0, 20.0])}]
    return {
        "lr": 1e-2,
        "amsgrad": choose.random() < 0.4,
        "weight_decay": choose.choice([0, 0.1]),
        "maximize": choose.random() < 0.2,
        "skip_nonfinite": choose.random() < 0.5,
        **choose.choice([*clips, {"clipvalue": 0.5}]),
    }


def random_pair(choose):
    shapes = [
        (choose.randint(1, 4000),) if choose.random() < 0.8 else (choose.randint(1, 60), choose.randint(1, 60))
        for _ in range(choose.randint(1, 12))
    ]
    dtypes = [choose.choice([torch.float32] * 4 + [torch.bfloat16, torch.float64]) for _ in shapes]
    first = [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s, dtype in zip(shapes, dtypes, strict=True)]
    options, cut = random_options(choose), choose.randint(0, len(first))
    cls = choose.choice([fastadam.torch.Adam, fastadam.torch.AdamW])
    pair = []
    for params in (first, [torch.nn.Parameter(p.detach().clone()) for p in first]):
        groups = [{"params": params[:cut]}, {"params": params[cut:], "lr": 0.02}] if 0 < cut < len(params) else params
        pair.append((cls(groups, **options), params))
    return pair


def give_some(optimizer, params, choose):
    """Give most parameters in random buckets, half of them from other threads."""
    order, errors = list(params), []
    choose.shuffle(order)
    while order:
        count = choose.randint(1, 4)
        chunk, order = order[:count], order[count:]

        def call(chunk=chunk):
            try:
                optimizer.step_bucket(chunk)
            except BaseException as error:
                errors.append(error)

        if choose.random() < 0.1:
            continue
        if choose.random() < 0.5:
            call()
        else:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
    assert errors == []


@pytest.mark.parametrize("seed", range(60))
def test_buckets_have_the_bits_of_a_step(seed):
    torch.manual_seed(seed)
    choose = random.Random(seed)
    (plain, params), (bucketed, others) = random_pair(choose)
    for _ in range(choose.randint(3, 12)):
        scale = choose.choice([1.0, 1.0, 8.0])
        for p, q in zip(params, others, strict=True):
            p.grad = q.grad = None
            if choose.random() < 0.9:
                p.grad = torch.randn_like(p) * choose.choice([0.1, 1.0, 1.0])
                if choose.random() < 0.02:
                    p.grad.view(-1)[0] = choose.choice([float("nan"), float("inf")])
                q.grad = p.grad * scale
        if choose.random() < 0.2:
            for optimizer in (plain, bucketed):
                optimizer.param_groups[0]["lr"] *= 0.5
        plain.step()
        if choose.random() < 0.2:
            before = [q.detach().clone() for q in others]
            bucketed.begin_step(early=True)
            give_some(bucketed, others, choose)
            bucketed.abort_step()
            assert all(map(same, before, others))
        bucketed.begin_step(early=choose.random() < 0.8, threads=choose.choice([None, 1, 2]), loss_scale=scale)
        give_some(bucketed, others, choose)
        bucketed.end_step()
        assert plain.last_step_skipped == bucketed.last_step_skipped
        assert are_same(state_of(plain, params), state_of(bucketed, others))


# ---- what must not happen during a step ------------------------------------------------------------------------------


def begun(early=True, sizes=(4000, 3, 600), **options):
    params = [torch.nn.Parameter(torch.linspace(1, 2, n)) for n in sizes]
    optimizer = fastadam.torch.AdamW(params, lr=0.1, **options)
    for size in (0.5, 0.25):
        for p in params:
            p.grad = torch.full_like(p, size)
        if size == 0.5:
            optimizer.step()
    before = state_of(optimizer, params)
    optimizer.begin_step(early=early)
    return optimizer, params, before


def test_a_parameter_that_comes_twice_or_is_unknown():
    optimizer, params, _ = begun()
    handle = optimizer.step_bucket(params[:1])
    handle.result(30)
    assert handle.done()
    with pytest.raises(ValueError, match=r"step_bucket: .*\[0\] was given before in this step"):
        optimizer.step_bucket(params[:1])
    with pytest.raises(ValueError, match="was given before in this step, expected it once"):
        optimizer.step_bucket([params[1], params[1]])
    for stranger in (torch.nn.Parameter(torch.ones(4000)), "text"):
        with pytest.raises(ValueError, match=r"step_bucket: params\[1\]: .*expected a parameter of this optimizer"):
            optimizer.step_bucket([params[1], stranger])
    optimizer.step_bucket(params[1:])
    optimizer.end_step()
    again, others, _ = begun()
    again.abort_step()
    again.step()
    assert are_same(state_of(optimizer, params), state_of(again, others))
    for call in (lambda: optimizer.step_bucket(params), optimizer.end_step):
        with pytest.raises(RuntimeError, match="no step is open, expected begin_step"):
            call()


def test_parameters_that_no_bucket_had_are_stepped_at_the_end():
    optimizer, params, before = begun()
    optimizer.step_bucket(params[1:2])
    params[2].grad = None
    optimizer.end_step()
    steps = [int(optimizer.state[p]["step"]) for p in params]
    assert steps == [2, 2, 1]
    assert not same(before[0], params[0].detach())


CHANGES = {
    "in place": lambda p: p.grad.mul_(-1),
    "accumulated": lambda p: (p * 2).sum().backward(),
    "zeroed": lambda p: p.grad.zero_(),
    "replaced": lambda p: setattr(p, "grad", torch.ones_like(p)),
}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_gradient_that_changes(change, early):
    optimizer, params, before = begun(early, global_clipnorm=1e9)
    optimizer.step_bucket(params).result(30)
    CHANGES[change](params[0])
    with pytest.raises(RuntimeError, match=r"radients? of .*\[0\]: changed since step_bucket"):
        optimizer.end_step()
    after = state_of(optimizer, params)
    lost = [place for place, (a, b) in enumerate(zip(before, after, strict=True)) if not same(a, b)]
    moments = [3, 4]
    assert lost == (moments if early and change != "replaced" else [])
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()


def test_a_gradient_that_is_dropped_was_kept():
    optimizer, params, _ = begun(global_clipnorm=0.1)
    optimizer.step_bucket(params)
    for p in params:
        p.grad = None
    optimizer.end_step()
    again, others, _ = begun(global_clipnorm=0.1)
    again.abort_step()
    again.step()
    assert are_same(state_of(optimizer, params), state_of(again, others))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("end", ["end_step", "abort_step"])
def test_a_parameter_that_another_thread_writes_to(early, end):
    optimizer, params, before = begun(early)
    optimizer.step_bucket(params).result(30)

    def write():
        with torch.no_grad():
            params[1].fill_(7.0)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    if end == "end_step":
        with pytest.raises(RuntimeError, match=r"\[1\]: was written to while a step was open"):
            optimizer.end_step()
    else:
        optimizer.abort_step()
    assert params[1].tolist() == [7.0] * 3
    after = state_of(optimizer, params)
    assert all(same(before[k], after[k]) for k in (0, 2, 3, 4, 5, 9, 10, 11))
    optimizer.step()


OTHERS = {
    "step": lambda o: o.step(),
    "begin_step": lambda o: o.begin_step(),
    "state_dict": lambda o: o.state_dict(),
    "load_state_dict": lambda o: o.load_state_dict({}),
    "copy": copy.deepcopy,
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_are_refused_while_a_step_is_open(name):
    optimizer, params, before = begun()
    optimizer.step_bucket(params[:1]).result(30)
    with pytest.raises(RuntimeError, match="a step is open, expected end_step.. or abort_step.. first"):
        OTHERS[name](optimizer)
    optimizer.abort_step()
    assert are_same(before, state_of(optimizer, params))
    optimizer.state_dict()


def test_zero_grad_drops_the_step():
    optimizer, params, before = begun()
    optimizer.step_bucket(params).result(30)
    optimizer.zero_grad()
    assert are_same(before, state_of(optimizer, params))
    optimizer.begin_step()
    optimizer.end_step()


def test_two_optimizers_at_once_and_one_that_is_dropped():
    pair = [begun() for _ in range(3)]
    for place in range(3):
        for optimizer, params, _ in pair:
            optimizer.step_bucket(params[place : place + 1])
    pair[0][0].abort_step()
    pair[1][0].end_step()
    assert are_same(pair[0][2], state_of(*pair[0][:2]))
    assert [int(pair[1][0].state[p]["step"]) for p in pair[1][1]] == [2, 2, 2]
    params = pair.pop()[1]
    optimizer = fastadam.torch.Adam(params)
    optimizer.step()


def test_a_shared_step_count_must_be_in_one_bucket():
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = fastadam.torch.Adam(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[params[1]]["step"] = optimizer.state[params[0]]["step"]
    optimizer.begin_step(early=True)
    optimizer.step_bucket(params[:1])
    with pytest.raises(ValueError, match="share their step count with those of an earlier bucket"):
        optimizer.step_bucket(params[1:])
    optimizer.abort_step()


@either_way
@pytest.mark.parametrize("options", [{}, {"early": False}, *weekly({"global_clipnorm": 1.0})], ids=str)
def test_a_signal_at_any_line(options, way):
    def step(optimizer, params):
        for p in params:
            optimizer.step_bucket([p])
        optimizer.end_step()

    optimizer, params, before = begun(**options)
    step(optimizer, params)
    outcomes = [before, state_of(optimizer, params)]
    for place in itertools.count():
        optimizer, params, _ = begun(**options)
        if interrupted(lambda o=optimizer, p=params: step(o, p), place, way) is None:
            break
        optimizer.abort_step()
        which = [are_same(state_of(optimizer, params), outcome) for outcome in outcomes]
        assert any(which), place
        optimizer.step()
        assert int(optimizer.state[params[0]]["step"]) == 2 + which.index(True)
    assert place > 50


def test_a_fork_while_a_step_is_open():
    code = """
import os, signal, torch, fastadam.torch
torch.set_num_threads(1)
params = [torch.nn.Parameter(torch.linspace(1, 2, n)) for n in (100_000, 3)]
optimizer = fastadam.torch.AdamW(params, lr=0.1, global_clipnorm=1.0)
for p in params: p.grad = torch.full_like(p, 0.5)
optimizer.step()
before = [p.detach().clone() for p in params]
optimizer.begin_step(early=True)
handle = optimizer.step_bucket(params[:1])
process = os.fork()
if process == 0:
    signal.alarm(20)
    code = 1
    try:
        handle.result(10)
        optimizer.abort_step()
        assert all(map(torch.equal, before, params))
        optimizer.step()
        code = 0
    finally:
        os._exit(code)
status = os.waitpid(process, 0)[1]
optimizer.end_step()
print(status, any(map(torch.equal, before, params)))
optimizer.begin_step(early=True)  # and the interpreter exits
optimizer.step_bucket(params)
"""
    result = run_python(code, exits=True)
    assert (result.stdout.split(), result.stderr) == (["0", "False"], "")
