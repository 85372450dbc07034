"""GradScaler where a GPU reads what it says, with a GPU's part played by the host, and step counts that are remembered.

On a GPU: test_torch_cuda.py; what its kernels do: test_cuda_numbers.py.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fastadam.torch import _grad_scaler as scaling  # noqa: E402
from fastadam.torch import _parameter_set as sets  # noqa: E402
from fastadam.torch import _partition as partition  # noqa: E402
from fastadam.torch import _step_count as counts  # noqa: E402
from torch_twins import PAIRS, Twins, parameters  # noqa: E402

SHAPES = ((3,), (2, 4), ())


class Context:
    """What the plans of one set share: t, which only they count."""

    def __init__(self):
        self.t, self.betas, self.is_captured, self.failure = 0, None, False, None

    def take_failure(self):
        failure, self.failure = self.failure, None
        return failure

    def step(self):
        return self.t


class Device:
    """A plan of a GPU: it reads ``grad_scale`` and ``found_inf`` in the step and, if it is told to, counts t."""

    fails = False

    def __init__(self, plan, context):
        self._plan, self._context = plan, context

    def __getattr__(self, name):
        return getattr(self._plan, name)

    def set_device_numbers(self, rate, grad_scale, found_inf, counts):
        assert rate is None
        self._scale, self._found_inf, self._counts = grad_scale, found_inf, counts

    def can_count(self, hyper):
        return self._context.betas in (None, (hyper.beta_1, hyper.beta_2))

    def step(self, gradients, hyper, factors, counter, convert, clip_factors=None):
        context = self._context
        context.betas = context.betas or (hyper.beta_1, hyper.beta_2)
        step = context.t + 1 if self._counts else hyper.step
        if self._found_inf is not None and float(self._found_inf):
            context.t = step - 1
            counter += 1
            return True
        context.t = step
        if self.fails:
            raise RuntimeError("a launch has failed")
        scale = 1.0 if self._scale is None else 1.0 / float(self._scale)
        hyper = hyper._replace(step=step, gradient_scale=hyper.gradient_scale * scale)
        return self._plan.step(gradients, hyper, factors, counter, convert)


@pytest.fixture
def waits(monkeypatch):
    """Every tensor counts as one of a GPU; the list of the counts for which the host has waited."""
    for module in (counts, scaling, sets, partition):
        monkeypatch.setattr(module, "is_on_gpu", lambda number: isinstance(number, torch.Tensor))
    make_plan, wait = sets.ParameterSet.make_plan, counts.StepCounts._wait
    found = []

    def make_device(together):
        context = together.context or Context()
        together.context = None
        make_plan(together)
        together.context, together.plan = context, Device(together.plan, context)

    def note_wait(own):
        found.append(wait(own))
        return found[-1]

    def skips(own):
        assert own._found_inf is None, "the host has waited for a GPU"
        return False

    def gradient_scale(own):
        assert own._grad_scale is None, "the host has waited for a GPU"
        return 1.0

    monkeypatch.setattr(sets.ParameterSet, "make_plan", make_device)
    monkeypatch.setattr(sets.ParameterSet, "is_capturing", property(lambda _: False))
    monkeypatch.setattr(sets.ParameterSet, "rate_on_gpu", lambda *_: None)
    monkeypatch.setattr(counts.StepCounts, "_wait", note_wait)
    for known in (skips, gradient_scale):
        monkeypatch.setattr(scaling.ScaledStep, known.__name__, property(known))
    return found


class Scaled(Twins):
    """Twins that step with the scale and the infinity that a GradScaler would have found."""

    def __init__(self, name="Adam", tensors=None, **options):
        super().__init__(name, tensors or parameters(*SHAPES, dtype=torch.float32), **options)

    def scaled_step(self, *, found_inf=False, scale=8.0, which=None):
        for optimizer in (self.reference, self.tested):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(found_inf))
        self.step(which, scale=scale)
        for optimizer in (self.reference, self.tested):
            del optimizer.grad_scale, optimizer.found_inf

    def plain_step(self):
        self.step()

    def check(self, tolerance=1e-6):
        for a, b in zip(self.theirs, self.ours, strict=True):
            theirs, ours = (t.state[p] for t, p in ((self.reference, a), (self.tested, b)))
            assert theirs.keys() == ours.keys()
            assert not ours or float(theirs["step"]) == float(ours["step"])
            if a.grad is not None:  # unscaled, unless the step was skipped
                torch.testing.assert_close(b.grad, a.grad, rtol=1e-6, atol=0)
        assert self.difference() < tolerance


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("options", [{}, {"maximize": True, "amsgrad": True}, {"weight_decay": 0.1}], ids=str)
def test_infinities_as_with_torchs_fused(waits, name, options):
    twins = Scaled(name, lr=0.1, fused=True, **options)
    for found_inf in (False, True, False, False, True, True, False):
        twins.scaled_step(found_inf=found_inf)
        twins.check()
    assert len(waits) == 1  # for a state that is new


def test_a_first_step_that_is_skipped(waits):
    twins = Scaled(lr=0.1, fused=True)
    twins.scaled_step(found_inf=True)
    assert [float(twins.tested.state[p]["step"]) for p in twins.ours] == [0, 0, 0]
    twins.scaled_step()
    twins.check()


def test_grad_scaler(waits):
    trained = []
    for cls in PAIRS["Adam"]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer, scaler = cls(model.parameters(), lr=0.1, fused=True), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for k in range(6):
            optimizer.zero_grad()
            x = torch.randn(2, 4)
            x[0, 0] = float("inf") if k == 3 else 1.0
            scaler.scale(model(x).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        trained.append((model.weight.detach(), scaler.get_scale(), float(optimizer.state[model.weight]["step"])))
    torch.testing.assert_close(trained[0][0], trained[1][0], rtol=1e-6, atol=1e-7)
    assert trained[0][1:] == trained[1][1:]
    assert len(waits) == 1


def test_steps_of_other_kinds_between(waits):
    twins = Scaled(lr=0.1, fused=True)
    twins.plain_step()
    twins.scaled_step()
    twins.scaled_step(found_inf=True)
    assert len(waits) == 1
    twins.plain_step()
    assert waits[1:] == [[2.0] * 3]  # whether the step before was made the GPU alone knew
    twins.plain_step()
    twins.scaled_step(which=[0, 1])
    twins.scaled_step(found_inf=True)
    twins.scaled_step()
    twins.check()


def test_counts_that_differ(waits):
    twins = Scaled(lr=0.1, fused=True)
    for _ in range(2):
        twins.scaled_step(which=[0, 1])
    for found_inf in (False, True, False):
        twins.scaled_step(found_inf=found_inf)
    waits.clear()
    twins.scaled_step()
    twins.scaled_step(found_inf=True)
    assert not waits
    twins.scaled_step(which=[0])
    twins.scaled_step()
    twins.check()


def test_betas_that_change_make_the_host_wait(waits):
    twins = Scaled(lr=0.1, fused=True)
    for beta_1 in (0.9, 0.8, 0.7, 0.9, 0.9):
        for optimizer in (twins.reference, twins.tested):
            optimizer.param_groups[0]["betas"] = (beta_1, 0.999)
        twins.scaled_step(found_inf=beta_1 == 0.8)
    twins.check()
    assert len(waits) == 1 + 2


def fill(optimizer):
    for state in optimizer.state.values():
        state["step"].fill_(40)


def fill_one(optimizer):
    next(iter(optimizer.state.values()))["step"].fill_(40)


def load(optimizer):
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = torch.tensor(40.0)
    optimizer.load_state_dict(saved)


def replace(optimizer):
    for state in optimizer.state.values():
        state["step"] = torch.tensor(40.0)


@pytest.mark.parametrize("write", [fill, fill_one, load, replace])
@pytest.mark.parametrize("scaled", [False, True])
def test_what_others_write_to_step_counts(waits, write, scaled):
    twins = Scaled(lr=0.1, fused=True)
    step = twins.scaled_step if scaled else twins.plain_step
    for _ in range(3):
        step()
    assert len(waits) == 1
    for optimizer in (twins.reference, twins.tested):
        write(optimizer)
    for _ in range(2):
        step()
    twins.check()
    assert float(twins.tested.state[twins.ours[0]]["step"]) == 42


def test_a_step_that_fails_is_not_counted(waits, monkeypatch):
    twins = Scaled(lr=0.1, fused=True)
    twins.scaled_step()
    twins.scaled_step()
    twins.tested.grad_scale, twins.tested.found_inf = torch.tensor(1.0), torch.tensor(0.0)
    monkeypatch.setattr(Device, "fails", True)
    with pytest.raises(RuntimeError, match="a launch has failed"):
        twins.tested.step()
    monkeypatch.setattr(Device, "fails", False)
    del twins.tested.grad_scale, twins.tested.found_inf
    twins.scaled_step()
    twins.check()
    assert waits[1:] == [[2.0] * 3]


def test_a_step_that_a_gpu_found_wrong_is_taken_back(waits):
    twins = Scaled(lr=0.1, fused=True)
    for found_inf in (False, True, False):
        twins.scaled_step(found_inf=found_inf)
    (chosen,) = twins.tested._stepper.partitions
    context = chosen.context
    for parameter in twins.ours:
        twins.tested.state[parameter]["step"].add_(2)  # of steps that have done nothing
    context.failure = 1, "a bad index"
    with pytest.raises(ValueError, match="a bad index; found on the GPU after the call had returned"):
        twins.tested.step()
    waits.clear()
    twins.scaled_step()
    twins.check()
    assert not waits


# ---- counts alone ---------------------------------------------------------------------------------------------------


def side_by_side(count):
    return [step.data for step in torch.zeros(count).unbind()]


@pytest.mark.parametrize("steps", [side_by_side(3), [torch.zeros(()) for _ in range(3)], list(torch.zeros(3).unbind())])
def test_counts_are_read_again_once_another_wrote_to_them(waits, steps):
    own = counts.StepCounts(steps)
    own.set(5)
    assert own.read() == [5.0] * 3
    assert not waits
    steps[2].add_(2)
    assert own.read() == [5.0, 5.0, 7.0]
    assert own.read() == [5.0, 5.0, 7.0]
    assert len(waits) == 2
    own.follow(own.after(torch.tensor(0.0)))
    assert own.are_followed()
    assert [float(step) for step in steps] == [6.0] * 3
    own.follow(own.after(torch.tensor([1.0])))
    assert [float(step) for step in steps] == [6.0] * 3
    torch._foreach_add_(steps, 1)
    assert not own.are_followed()
    assert own.read() == [7.0] * 3
    own.raise_in_graph(torch.tensor(1.0))
    own.raise_in_graph(torch.tensor(0.0))
    own.raise_in_graph(None)
    assert own.read() == [9.0] * 3


def test_counts_that_share_memory_notice_each_other(waits):
    steps = side_by_side(4)
    all_of_them, some = counts.StepCounts(steps), counts.StepCounts(steps[1:3])
    all_of_them.set(3)
    some.set(4)
    assert all_of_them.read() == [3.0, 4.0, 4.0, 3.0]
    others = counts.StepCounts(steps[:1])
    some.set(6)
    others.set(1)
    waits.clear()
    assert some.read() == [6.0, 6.0]
    assert not waits  # those of others are beside them, no more


def test_counts_of_the_host_are_not_remembered():
    steps = side_by_side(2)
    own = counts.StepCounts(steps)
    own.set(5)
    steps[0].data.fill_(6)  # which no version tells of
    assert own.read() == [6.0, 5.0]


def test_inference_tensors_have_no_version(waits):
    with torch.inference_mode():
        own = counts.StepCounts(side_by_side(2))
        own.set(5)
        assert own.read() == [5.0, 5.0]
    assert len(waits) == 1


@pytest.mark.parametrize("found_inf", [0, 0.0, np.float32(0), None])
def test_what_the_host_knows_is_not_waited_for(found_inf):
    assert not scaling.ScaledStep(None, found_inf).host_skips
    assert scaling.ScaledStep(None, torch.tensor(float("nan"))).host_skips
    assert scaling.ScaledStep(4, found_inf).gradient_scale == 0.25
    assert scaling.ScaledStep(torch.tensor(4.0), 1).on(torch.device("cpu")) == (None, None)
