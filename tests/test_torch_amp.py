"""fastadam.torch with a GradScaler and with engines that use one: what torch does, with and without ``fused=True``."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from torch_twins import PAIRS  # noqa: E402

INF = float("inf")


def by_both(act, name="Adam", **options):
    """What `act` finds with torch's optimizer and with ours."""
    found = []
    for cls in PAIRS[name]:
        weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.full((2, 2), 2.0))]
        found.append(act(cls(weights, lr=0.1, **options), weights))
    return found


def scaled_steps(optimizer, weights, scaler, spoilt=(1,), steps=4, unscale_first=False):
    for k in range(steps):
        optimizer.zero_grad()
        scaler.scale(sum((w**2).sum() for w in weights)).backward()
        if k in spoilt:
            weights[0].grad[0] = INF
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        yield k
        scaler.update()


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("fused", [None, False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_grad_scaler_leaves_the_gradients_hooks_and_counts_that_torch_leaves(name, fused, unscale_first):
    def act(optimizer, weights):
        calls, found = [], []
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        for k in scaled_steps(optimizer, weights, scaler, unscale_first=unscale_first):
            if k == 0:
                assert torch.equal(weights[0].grad, torch.full((3,), 2.0))
            steps = [float(named["step"]) for named in optimizer.state.values()]
            values = [w.detach().clone() for w in weights] + [w.grad.clone() for w in weights]
            found.append((values, steps, list(calls), scaler.get_scale()))
        return found

    for theirs, ours in zip(*by_both(act, name, fused=fused), strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
        assert ours[1:] == theirs[1:]


@pytest.mark.parametrize("fused", [None, False, True])
@pytest.mark.parametrize("copied", [lambda o: o, copy.deepcopy], ids=["itself", "copy"])
def test_amp_is_announced_by_the_configuration(fused, copied):
    """What Lightning, accelerate and GradScaler ask an optimizer."""
    theirs, ours = by_both(lambda o, _: hasattr(copied(o), "_step_supports_amp_scaling"), fused=fused)
    assert ours is theirs
    assert "_step_supports_amp_scaling" not in vars(fastadam.torch.Adam)


class NotesSkippedSteps:
    """How accelerate's AcceleratedOptimizer finds out that GradScaler has skipped a step."""

    def __init__(self, optimizer):
        self.optimizer, self.step, self.was_called = optimizer, optimizer.step, False
        optimizer.step = self.patched

    def patched(self, *arguments):
        self.was_called = True
        return self.step(*arguments)

    def step_was_skipped(self):
        was_called, self.was_called = self.was_called, False
        return not was_called


@pytest.mark.parametrize("fused", [None, True])
def test_a_skipped_step_is_seen_by_whoever_patches_step(fused):
    def act(optimizer, weights):
        notes, scaler = NotesSkippedSteps(optimizer), torch.amp.GradScaler("cpu", init_scale=128.0)
        return [notes.step_was_skipped() for _ in scaled_steps(optimizer, weights, scaler)]

    theirs, ours = by_both(act, fused=fused)
    assert ours == theirs == [False, fused is None, False, False]


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("mixed_precision", ["no", "fp16"])
def test_accelerate_sees_skipped_steps(fused, mixed_precision):
    accelerate = pytest.importorskip("accelerate")

    def act(optimizer, weights):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0) if mixed_precision == "fp16" else None
        wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
        assert accelerator.mixed_precision == "no"
        skipped = []
        for k in range(3):
            wrapped.zero_grad()
            loss = sum((w**2).sum() for w in weights)
            (loss if scaler is None else scaler.scale(loss)).backward()
            if k == 1 and scaler is not None:
                weights[0].grad[0] = INF
            wrapped.step()
            skipped.append(wrapped.step_was_skipped)
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        return skipped, [w.detach() for w in weights]

    theirs, ours = by_both(act, fused=fused)
    assert ours[0] == theirs[0] == [False, mixed_precision == "fp16" and fused is None, False]
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=0)


def gradients():
    shared = torch.full((3,), 8.0)
    rows = torch.sparse_coo_tensor([[0, 2, 0]], torch.full((3, 2), 8.0), (4, 2), check_invariants=True)
    columns = torch.full((2, 6), 8.0)[:, ::2]
    return {
        "dense": [torch.full((3,), 8.0)],
        "shared by parameters": [shared, shared],
        "sparse": [rows],
        "strided": [columns],
        "complex": [torch.full((3,), 8.0 - 16.0j)],
        "float64": [torch.full((3,), 8.0, dtype=torch.float64)],
        "bfloat16": [torch.full((3,), 8.0, dtype=torch.bfloat16)],
        "float16": [torch.full((3,), 8.0, dtype=torch.float16)],
        "dtypes together": [torch.full((3,), 8.0), torch.full((3,), 8.0, dtype=torch.float16)],
    }


@pytest.mark.parametrize("kind", gradients())
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_every_kind_of_gradient_is_unscaled_once_unless_the_step_is_skipped(kind, found_inf):
    scaled = gradients()[kind]
    weights = [torch.nn.Parameter(torch.zeros(g.shape, dtype=g.dtype)) for g in scaled]
    optimizer = fastadam.torch.Adam(weights, fused=True)
    for weight, gradient in zip(weights, scaled, strict=True):
        weight.grad = gradient
    expected = [g.clone() if found_inf else g.clone() / 8 for g in scaled]
    for _ in range(3):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found_inf)
        optimizer.step()
        for weight, wanted in zip(weights, expected, strict=True):
            assert torch.equal(weight.grad.to_dense(), wanted.to_dense())
        if not found_inf:
            for gradient in {id(w.grad): w.grad for w in weights}.values():
                gradient.mul_(8)


def test_a_refused_step_leaves_the_gradients_scaled():
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = fastadam.torch.Adam(weights, fused=True)
    optimizer.grad_scale = torch.tensor(8.0)
    for weight in weights:
        weight.grad = torch.full((3,), 8.0)
    optimizer.param_groups[0]["weight_decay"] = float("nan")
    with pytest.raises(ValueError, match="weight_decay"):
        optimizer.step()
    assert all(bool((weight.grad == 8).all()) for weight in weights)


@pytest.mark.filterwarnings("ignore")  # of Dynamo
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_compiled_fused_step_unscales(found_inf):
    def act(optimizer, weights):
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        scaler.scale(sum((w**2).sum() for w in weights)).backward()
        if found_inf:
            weights[0].grad[0] = INF
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(128.0), torch.tensor(found_inf)
        step = optimizer.step
        if isinstance(optimizer, fastadam.torch.Adam):
            step = torch.compile(lambda: optimizer.step(), fullgraph=True, backend="aot_eager")
        step()
        torch._dynamo.reset()
        return [w.detach() for w in weights], [w.grad for w in weights]

    theirs, ours = by_both(act, fused=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [2.0**126, 2.0**127, 3e38, 2.0**-126, 2.0**-127, 1e-40, INF, 0.0, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore")  # of Dynamo
def test_extreme_scales_do_what_torch_does(scale, dtype, compiled):
    found = []
    for cls in PAIRS["AdamW"]:
        weight = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = cls([weight], lr=0.1, fused=True)
        step = optimizer.step
        if compiled and cls is fastadam.torch.AdamW:
            step = torch.compile(lambda: optimizer.step(), backend="eager")  # noqa: B023
        for k in range(4):
            weight.grad = torch.tensor([1.0, -0.5, 2.0]).to(dtype) * (k + 1) * min(max(scale, 1e-30), 2.0**124)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            step()
        found.append([weight.detach(), *optimizer.state[weight].values(), weight.grad])
    torch._dynamo.reset()
    if scale == 0:  # infinite second moments become NaN: see the docstring of the class
        found = [each[:1] for each in found]
    torch.testing.assert_close(found[1], found[0], rtol=2e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler_whose_scale_grows_above_2_to_126(fused):
    """As GradScaler grows it where all gradients are small; no message names a factor that users do not give."""

    def act(optimizer, weights):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**124, growth_interval=1)
        found = []
        for _ in range(5):
            optimizer.zero_grad()
            scaler.scale(sum((w * 1e-6).sum() for w in weights)).backward()
            scaler.step(optimizer)
            scaler.update()
            found += [w.detach().clone() for w in weights]
        return found, scaler.get_scale()

    theirs, ours = by_both(act, fused=fused)
    assert theirs[1] == ours[1] == 2.0**127
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
