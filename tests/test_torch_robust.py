"""What users do to a fastadam.torch optimizer from outside: emptied states, threads, signals, broken state dicts."""

from __future__ import annotations

import collections

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from helpers import run_python  # noqa: E402
from torch_twins import PAIRS  # noqa: E402


def give_gradients(parameters):
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter) + parameter.detach()


# ---- states that are emptied ----------------------------------------------------------------------------------------


def clear(optimizer):
    optimizer.state.clear()


def replace(optimizer):
    optimizer.state = collections.defaultdict(dict)


def pop_first(optimizer):
    optimizer.state.pop(optimizer.param_groups[0]["params"][0])


def move_to_second(optimizer):
    first, second = (group["params"][0] for group in optimizer.param_groups)
    moved = optimizer.state.pop(first)
    optimizer.state.pop(second, None)
    optimizer.state[second] = moved


@pytest.mark.parametrize("place", ["between", "closure", "hook"])
@pytest.mark.parametrize("second_has_gradient", [True, False])
@pytest.mark.parametrize("empty", [clear, replace, pop_first, move_to_second])
def test_states_emptied_after_one_step_start_anew(empty, second_has_gradient, place):
    found = []
    for cls in PAIRS["Adam"]:
        weights = [torch.nn.Parameter(torch.full((3,), float(k + 1), dtype=torch.float64)) for k in range(2)]
        optimizer = cls([{"params": [w]} for w in weights], lr=0.1)
        give_gradients(weights[: 1 + second_has_gradient])
        optimizer.step()
        give_gradients(weights)
        if place == "between":
            empty(optimizer)
        hook = optimizer.register_step_pre_hook(lambda o, *_: empty(o)) if place == "hook" else None
        optimizer.step((lambda: empty(optimizer)) if place == "closure" else None)  # noqa: B023
        if hook:
            hook.remove()
        give_gradients(weights)
        optimizer.step()
        found.append((optimizer, weights))
    (theirs, expected), (ours, weights) = found
    assert len(ours.state) == 2
    for ours_of, theirs_of in zip(weights, expected, strict=True):
        torch.testing.assert_close(ours_of, theirs_of, rtol=1e-14, atol=0)
        for name, value in theirs.state[theirs_of].items():
            torch.testing.assert_close(ours.state[ours_of][name], value, rtol=1e-14, atol=0)


@pytest.mark.usefixtures("rows_wait")
def test_rows_that_wait_step_with_the_moments_of_a_state_that_was_emptied():
    tables = []
    for mode in ("deferred", "dense"):
        table = torch.nn.Embedding.from_pretrained(torch.ones(9, 2, dtype=torch.float64), freeze=False, sparse=True)
        optimizer = fastadam.torch.Adam(table.parameters(), lr=0.1, eps=1e-300, sparse_update=mode)
        for row in range(6):
            if row == 4:
                optimizer.state.clear()
            table.weight.grad = torch.sparse_coo_tensor([[row]], torch.ones(1, 2).double(), (9, 2), check_invariants=True)  # fmt: skip
            optimizer.step()
        optimizer.sync()
        assert float(optimizer.state[table.weight]["step"]) == 2
        tables.append(table.weight)
    torch.testing.assert_close(*tables, rtol=1e-12, atol=0)


# ---- threads --------------------------------------------------------------------------------------------------------


THREADS = """
import copy, pickle, sys, threading
import fastadam._core.deferred.history
import torch, fastadam.torch

sys.setswitchinterval(1e-4)
fastadam._core.deferred.history.crossover = lambda *_: 64  # rows wait

def check(mode):
    table = torch.nn.Embedding.from_pretrained(torch.ones(50, 4), freeze=False, sparse=True)
    optimizer = fastadam.torch.Adam(table.parameters(), lr=1e-3, sparse_update=mode)
    errors = []

    def train():
        try:
            for k in range(200):
                ids = torch.tensor([[k % 50, (7 * k) % 50, k % 50]])
                table.weight.grad = torch.sparse_coo_tensor(ids, torch.ones(3, 4), (50, 4), check_invariants=True)
                optimizer.step()
                optimizer.gather(table.weight, ids)
                if k % 50 == 0:
                    optimizer.state_dict()
                    optimizer.sync()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert float(optimizer.state[table.weight]["step"]) == 400
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin._stepper.lock is not optimizer._stepper.lock
        twin.param_groups[0]["params"][0].grad = table.weight.grad
        twin.step()

for mode in ("dense", "lazy", "deferred"):
    check(mode)
"""


def test_two_threads_step_one_optimizer():
    found = run_python(THREADS)
    assert (found.returncode, found.stderr) == (0, "")


# ---- signals --------------------------------------------------------------------------------------------------------


class Interrupted:
    """A native plan after whose step Ctrl-C is found to have been pressed."""

    def __init__(self, plan):
        self.plan = plan

    def __getattr__(self, name):
        return getattr(self.plan, name)

    def step(self, *arguments):
        self.plan.step(*arguments)
        raise KeyboardInterrupt


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_a_step_that_was_made_is_counted_though_a_signal_came(apart, first, finished, monkeypatch):
    strided = torch.ones(4, 2, dtype=torch.float64)[:, 0]  # copied around the native call
    weights = [torch.nn.Parameter(w) for w in (torch.ones(2, dtype=torch.float64), strided)]
    optimizer = fastadam.torch.Adam(weights, lr=0.1)
    twin = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    reference = torch.optim.Adam(twin, lr=0.1)
    stepped = 0 if first else 2
    for k in range(stepped + 1):
        for each in (weights, twin):
            give_gradients(each)
        reference.step()
        if k == stepped:
            break
        optimizer.step()
        if apart:
            for w in weights:
                optimizer.state[w]["step"] = optimizer.state[w]["step"].clone()
    together = fastadam.torch._parameter_set.ParameterSet
    make, finish = together.__init__, together.finish

    def with_signal(self, *arguments, **named):
        make(self, *arguments, **named)
        self.plan = Interrupted(self.plan)

    def cut_off(self, count):
        finish(self, count)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(together, "__init__", with_signal)
    if not finished:
        monkeypatch.setattr(together, "finish", cut_off)
    optimizer._stepper.partitions.clear()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.undo()
    optimizer._stepper.partitions.clear()
    for k in range(2):
        saved = optimizer.state_dict()["state"]
        assert [float(named["step"]) for named in saved.values()] == [stepped + 1 + k] * 2
        for a, b in zip(weights, twin, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
        give_gradients(weights)
        give_gradients(twin)
        optimizer.step()
        reference.step()


INTERRUPTS = """
import _thread, signal, threading
import torch, fastadam.torch

signal.signal(signal.SIGINT, signal.default_int_handler)
weight = torch.zeros(100_000, dtype=torch.float64)
weight.grad = torch.ones_like(weight)
optimizer = fastadam.torch.Adam([weight], lr=1.0, eps=0.0)
interrupted = 0
for k in range(300):
    timer = threading.Timer(2e-6 * k, _thread.interrupt_main)
    try:
        timer.start()
        for _ in range(10):
            optimizer.step()
        timer.join()
    except KeyboardInterrupt:
        interrupted += 1
    named = optimizer.state_dict()["state"].get(0, {"step": 0})
    assert int(named["step"]) == round(-float(weight[0])), (k, named["step"], weight[0])
    assert bool((weight == weight[0]).all())
assert interrupted > 20, interrupted
"""


def test_signals_at_any_time():
    found = run_python(INTERRUPTS)
    assert (found.returncode, found.stderr) == (0, "")


# ---- state dicts that are refused -----------------------------------------------------------------------------------


def kept_somewhere(value):
    if isinstance(value, dict):
        return any(map(kept_somewhere, value.values()))
    return type(value).__name__ == "_Kept" or (isinstance(value, list) and any(map(kept_somewhere, value)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("exp_avg", torch.zeros(3, device="meta"), "parameter 'b': exp_avg: on meta, without data"),
        ("exp_avg_sq", torch.zeros(3).to_sparse(), "parameter 'b': exp_avg_sq: torch.sparse_coo, expected a dense"),
        ("exp_avg", [1.0], "parameter 'b': exp_avg: list, expected a tensor"),
        ("step", "x", "parameter 'b': step: 'x', expected a number"),
        ("step", torch.zeros(2), r"parameter 'b': step: tensor\(\[0., 0.\]\), expected a number"),
        (None, [1], "parameter 'b': list, expected a dict"),
    ],
)
def test_loading_what_is_refused_leaves_the_optimizer_as_it_was(key, value, message):
    weights, twins = ([torch.nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2))
    optimizer, twin = (fastadam.torch.Adam(zip("ab", each, strict=True), lr=0.1) for each in (weights, twins))
    for each in (weights, twins):
        give_gradients(each)
    optimizer.step()
    twin.step()
    saved = twin.state_dict()
    saved["param_groups"][0]["lr"] = 0.7
    saved["state"][0]["step"] = torch.tensor(9.0)
    if key is None:
        saved["state"][1] = value
    else:
        saved["state"][1][key] = value
    before = optimizer.state, optimizer.param_groups, dict(optimizer.state)
    with pytest.raises((TypeError, ValueError), match=f"state of {message}"):
        optimizer.load_state_dict(saved)
    assert (optimizer.state, optimizer.param_groups) == before[:2]
    assert all(optimizer.state[w] is before[2][w] for w in weights)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not kept_somewhere(dict(optimizer.state))
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    give_gradients(weights)
    optimizer.step()
    assert [float(optimizer.state[w]["step"]) for w in weights] == [2, 2]


def test_states_of_no_parameter_stay_as_they_are():
    (weight,) = weights = [torch.nn.Parameter(torch.ones(3))]
    optimizer = fastadam.torch.Adam(weights, lr=0.1)
    give_gradients(weights)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][7] = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)}
    optimizer.load_state_dict(saved)
    assert optimizer.state[7] == saved["state"][7]
    assert not kept_somewhere(dict(optimizer.state))
    optimizer.step()
    assert float(optimizer.state[weight]["step"]) == 2


# ---- views ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", [True, False])
@pytest.mark.parametrize("view", [lambda t: t.conj(), lambda t: t.conj().imag], ids=["conjugated", "negated"])
def test_conjugated_and_negated_parameters_are_refused(view, later):
    values = torch.full((2,), 1 + 2j)
    seen = view(values)
    other = torch.nn.Parameter(torch.ones(2))
    weight = torch.nn.Parameter(seen.resolve_conj().resolve_neg() if later else seen)
    optimizer = fastadam.torch.Adam([other, weight], lr=0.1)
    give_gradients([other, weight])
    if later:
        optimizer.step()
        weight.data = seen
    before = other.detach().clone()
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[1\]: a conjugated or negated view"):
        optimizer.step()
    assert torch.equal(other, before)
    assert torch.equal(values, torch.full((2,), 1 + 2j))
    assert [float(named["step"]) for named in optimizer.state.values()] == [1.0, 1.0] * later


def test_a_conjugated_moment_is_refused_and_a_conjugated_gradient_is_taken():
    weight, twin = (torch.nn.Parameter(torch.full((2,), 1 + 2j)) for _ in range(2))
    ours, theirs = fastadam.torch.Adam([weight], lr=0.1), torch.optim.Adam([twin], lr=0.1)
    for each, optimizer in ((weight, ours), (twin, theirs)):
        gradient = torch.full((2,), 3 - 4j).conj()
        each.grad = gradient if optimizer is ours else gradient.resolve_conj()  # torch refuses the other
        optimizer.step()
    torch.testing.assert_close(weight, twin, rtol=1e-6, atol=0)
    ours.state[weight]["exp_avg"] = torch.zeros_like(weight).conj()
    with pytest.raises(ValueError, match="exp_avg: a conjugated or negated view"):
        ours.step()


def negate_parameter(optimizer, parameter, view):
    parameter.data = view


def replace_moment(optimizer, parameter, view):
    optimizer.state[parameter]["exp_avg"] = view


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(
    ("spoil", "size", "what"),
    [
        (negate_parameter, 1, "a conjugated or negated view"),
        (replace_moment, 1, "exp_avg: a conjugated or negated view"),
        (replace_moment, 5, "exp_avg: a conjugated or negated view"),
    ],
)
def test_a_view_that_negates_the_same_memory_is_refused_later(spoil, size, what, steps):
    complex_ = torch.full((size,), 1 + 2j)
    weight = torch.nn.Parameter(complex_.imag if size == 1 else torch.ones(size))
    optimizer = fastadam.torch.Adam([weight], lr=0.1)
    for _ in range(steps):
        give_gradients([weight])
        optimizer.step()
    of_moment = spoil is not negate_parameter
    known = optimizer.state[weight]["exp_avg"] if of_moment else weight.detach()
    view = torch._neg_view(known) if of_moment else complex_.conj().imag
    assert view.data_ptr() == known.data_ptr()
    before, moment = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()
    spoil(optimizer, weight, view)
    for _ in range(2):
        with pytest.raises(ValueError, match=what):
            optimizer.step()
    assert torch.equal(weight, -before if spoil is negate_parameter else before)
    assert torch.equal(optimizer.state[weight]["exp_avg"], -moment if of_moment else moment)
