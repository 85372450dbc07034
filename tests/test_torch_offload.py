"""``compute_params``: half tensors beside float32 parameters, which the step writes in the same pass."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from torch_twins import PAIRS, parameters  # noqa: E402

SHAPES = ((33,), (5, 7), ())
needs_grad_dtype = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="needs PyTorch 2.11")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OPTIONS = [
    {},
    {"amsgrad": True, "weight_decay": 0.1},
    {"maximize": True},
    {"clipnorm": 0.5},
    {"global_clipnorm": 0.5, "clipvalue": 1.0},
    {"skip_nonfinite": True},
]


def receivers_of(params, dtype=torch.bfloat16):
    return [torch.zeros_like(param, dtype=dtype, requires_grad=False) for param in params]


def gradients_of(k, params):
    generator = torch.Generator().manual_seed(k)
    return [torch.randn(param.shape, generator=generator) for param in params]


class Pair:
    """The same float32 parameters with and without compute parameters."""

    def __init__(self, name="AdamW", dtype=torch.bfloat16, **options):
        self.params, self.plain = (parameters(*SHAPES, dtype=torch.float32) for _ in range(2))
        self.computed = receivers_of(self.params, dtype)
        make = PAIRS[name][1]
        self.tested = make([{"params": self.params, "compute_params": self.computed}], lr=0.01, **options)
        self.reference = make(self.plain, lr=0.01, **options)

    def step(self, k, grad_dtype=torch.float32, which=(0, 1, 2)):
        for place, gradient in enumerate(gradients_of(k, self.params)):
            rounded = gradient.to(grad_dtype)
            self.params[place].grad = rounded if place in which else None
            self.plain[place].grad = rounded.float() if place in which else None
        self.tested.step()
        self.reference.step()
        assert all(map(torch.equal, self.params, self.plain))

    @property
    def group(self):
        return self.tested.param_groups[0]

    def assert_copied(self, computed=None):
        for param, tensor in zip(self.params, computed or self.computed, strict=True):
            assert torch.equal(tensor, param.detach().to(tensor.dtype))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compute_parameters_are_the_rounded_parameters_of_a_plain_step(looked_up, name, dtype, options):
    pair = Pair(name, dtype, **options)
    for k in range(6):
        before = [tensor._version for tensor in pair.computed]
        pair.step(k)
        pair.assert_copied()
        assert all(tensor._version > version for tensor, version in zip(pair.computed, before, strict=True))
    assert len(looked_up) < 2 * 6  # the last steps were repeated natively


@needs_grad_dtype
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_gradients_of_float32_parameters_are_read_as_they_are(looked_up, monkeypatch, dtype):
    pair = Pair()
    for param in pair.params:
        param.grad_dtype = dtype
    casts = []
    monkeypatch.setattr("fastadam.torch._gradients.GradientReader.convert", lambda *given: casts.append(given))
    for k in range(6):
        pair.step(k, dtype)
        pair.assert_copied()
    assert not casts
    assert len(looked_up) < 2 * 6
    loss = sum((param * 2).sum() for param in pair.params)
    pair.tested.zero_grad()
    loss.backward()
    assert {param.grad.dtype for param in pair.params} == {dtype}


def test_it_agrees_with_torchs_sequence_of_clip_step_and_copy():
    params, theirs = (parameters(*SHAPES, dtype=torch.float32) for _ in range(2))
    computed = receivers_of(params)
    ours = fastadam.torch.AdamW([{"params": params, "compute_params": computed}], lr=0.01, global_clipnorm=1.0)
    reference = torch.optim.AdamW(theirs, lr=0.01)
    for k in range(8):
        for param, their, gradient in zip(params, theirs, gradients_of(k, params), strict=True):
            param.grad, their.grad = gradient.clone(), gradient.clone()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
        ours.step()
        for param, their, tensor in zip(params, theirs, computed, strict=True):
            torch.testing.assert_close(param, their, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(tensor, their.detach().to(torch.bfloat16), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("how", ["list", "item", "memory", "none"])
def test_replaced_compute_parameters_are_noticed(how):
    pair = Pair()
    for k in range(5):
        pair.step(k)
    if how == "list":
        pair.computed = receivers_of(pair.params, torch.float16)
        pair.group["compute_params"] = pair.computed
    elif how == "item":
        pair.computed[1] = torch.zeros_like(pair.computed[1])
        pair.group["compute_params"][1] = pair.computed[1]
    elif how == "memory":
        pair.computed[1].data = torch.zeros_like(pair.computed[1])
    else:
        before = [tensor.clone() for tensor in pair.computed]
        pair.group["compute_params"] = None
    for k in range(5, 9):
        pair.step(k)
    if how == "none":
        assert all(map(torch.equal, before, pair.computed))
    else:
        pair.assert_copied()


def test_parameters_that_step_apart_take_their_part_of_the_list():
    pair = Pair()
    pair.group["compute_params"][1] = None
    for k, which in enumerate([(0, 1, 2), (2,), (0, 1), (2,), (0, 1, 2), (0, 1, 2)]):
        pair.step(k, which=which)
    assert not pair.computed[1].any()
    for place in (0, 2):
        assert torch.equal(pair.computed[place], pair.params[place].detach().bfloat16())


@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_rows_of_sparse_gradients_reach_the_copy(mode):
    weight, other = parameters((6, 3), (4,), dtype=torch.float32)
    computed = [tensor.detach().bfloat16() for tensor in (weight, other)]
    opt = fastadam.torch.Adam([{"params": [weight, other], "compute_params": computed}], lr=0.1, sparse_update=mode)
    for k in range(4):
        indices = torch.tensor([[k, 2, 2]])
        weight.grad = torch.sparse_coo_tensor(indices, torch.ones(3, 3), weight.shape, check_invariants=True)
        other.grad = torch.ones(4)
        opt.step()
        assert torch.equal(computed[0], weight.detach().bfloat16())
        assert torch.equal(computed[1], other.detach().bfloat16())


@pytest.mark.parametrize("kind", ["permuted", "gaps", "channels_last"])
@pytest.mark.parametrize("of_copy", [False, True])
def test_parameters_and_copies_may_have_any_strides(kind, of_copy):
    def strided(tensor):
        if kind == "permuted":
            return tensor.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
        if kind == "gaps":
            return tensor.repeat_interleave(2, -1)[..., ::2]
        return tensor.contiguous(memory_format=torch.channels_last)

    start = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    param = torch.nn.Parameter(strided(start))
    tensor = torch.zeros(start.shape, dtype=torch.bfloat16)
    tensor = strided(tensor) if of_copy else tensor
    opt = fastadam.torch.Adam([{"params": [param], "compute_params": [tensor]}], lr=0.1)
    for _ in range(4):
        param.grad = torch.ones_like(param)
        opt.step()
        assert torch.equal(tensor, param.detach().bfloat16())


@pytest.mark.parametrize("name", PAIRS)
def test_state_dicts_leave_compute_parameters_out_and_loading_keeps_them(name):
    pair, again = Pair(name), Pair(name)
    for k in range(3):
        pair.step(k)
    saved = copy.deepcopy(pair.tested.state_dict())
    assert "compute_params" not in saved["param_groups"][0]
    theirs = PAIRS[name][0](parameters(*SHAPES, dtype=torch.float32), lr=0.5)
    theirs.load_state_dict(saved)
    with torch.no_grad():
        for param, plain, known in zip(again.params, again.plain, pair.params, strict=True):
            plain.copy_(param.copy_(known))
    again.tested.load_state_dict(theirs.state_dict())
    again.reference.load_state_dict(saved)
    assert list(again.group["compute_params"]) == again.computed
    again.step(3)
    again.assert_copied()
    pair.step(3)
    assert all(map(torch.equal, pair.params, again.params))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_and_pickles_go_on_with_compute_parameters_of_their_own(how):
    pair = Pair()
    for k in range(3):
        pair.step(k)
    shared = {"opt": pair.tested, "params": pair.params, "computed": pair.computed}
    again = copy.deepcopy(shared) if how == "deepcopy" else pickle.loads(pickle.dumps(shared))
    for param, gradient in zip(again["params"], gradients_of(3, pair.params), strict=True):
        param.grad = gradient
    before = [tensor.clone() for tensor in pair.computed]
    again["opt"].step()
    assert all(map(torch.equal, before, pair.computed))
    pair.step(3)
    pair.assert_copied(again["computed"])


def test_a_skipped_step_leaves_copies_as_they_are():
    pair = Pair(skip_nonfinite=True, global_clipnorm=1.0)
    for k in range(5):
        pair.step(k)
    before = [tensor.clone() for tensor in pair.computed]
    for param in pair.params:
        param.grad = torch.full_like(param, float("nan"))
    for _ in range(2):
        pair.tested.step()
        assert pair.tested.last_step_skipped
        assert all(map(torch.equal, before, pair.computed))


def test_a_compiled_step_writes_them():
    pair = Pair()
    compiled = torch.compile(lambda: pair.tested.step(), backend="eager")
    for param, gradient in zip(pair.params, gradients_of(0, pair.params), strict=True):
        param.grad = gradient
    compiled()
    pair.assert_copied()


def test_the_repr_of_an_optimizer_does_not_print_them():
    assert "compute_params: [3 tensors]" in repr(Pair().tested)


# ---- refusals --------------------------------------------------------------------------------------------------------


def half(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


WRONG = {
    "too few": (lambda p: [half(4)], ValueError, "1 items, expected 2"),
    "too many": (lambda p: [half(4), half(2, 3), half(1)], ValueError, "3 items, expected 2"),
    "one tensor": (lambda p: half(2), TypeError, "Tensor, expected a list"),
    "a set": (lambda p: {None}, TypeError, "set, expected a list"),
    "an array": (lambda p: [None, [1.0]], TypeError, r"\[1\]: list, expected a tensor or None"),
    "double": (lambda p: [half(4).double(), None], TypeError, r"\[0\]: torch.float64, expected torch.bfloat16"),
    "integers": (lambda p: [half(4).int(), None], TypeError, r"\[0\]: torch.int32, expected"),
    "shape": (lambda p: [None, half(3, 2)], ValueError, r"\[1\]: shape \(3, 2\), expected \(2, 3\)"),
    "device": (lambda p: [half(4).to("meta"), None], ValueError, "on meta beside .* on cpu"),
    "sparse": (lambda p: [half(4).to_sparse(), None], ValueError, "sparse_coo"),
    "expanded": (lambda p: [half(1).expand(4), None], ValueError, "elements share memory"),
    "the parameter": (lambda p: [p[0].detach(), None], ValueError, "shares memory with param_groups"),
    "another one": (lambda p: [half(9)[:4], None], None, ""),
}


@pytest.mark.parametrize(("given", "error", "text"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("when", ["made", "added", "replaced"])
def test_wrong_compute_parameters_are_refused(given, error, text, when):
    params = parameters((4,), (2, 3), dtype=torch.float32)
    group = {"params": params, "compute_params": given(params)}
    first = parameters((1,), dtype=torch.float32)
    opt = fastadam.torch.Adam([{"params": params}] if when == "replaced" else first)

    def act():
        if when == "made":
            fastadam.torch.Adam([group])
        elif when == "added":
            opt.add_param_group(group)
        else:
            opt.param_groups[0]["compute_params"] = group["compute_params"]
            for param in params:
                param.grad = torch.ones_like(param)
            opt.step()

    if error is None:
        act()
        return
    before = [param.detach().clone() for param in params]
    with pytest.raises(error, match=text):
        act()
    assert len(opt.param_groups) == 1
    assert all(map(torch.equal, before, params))
    assert not opt.state


def test_two_parameters_cannot_have_one_receiver():
    params, tensor = parameters((4,), (4,), dtype=torch.float32), half(6)
    with pytest.raises(ValueError, match="shares memory with"):
        fastadam.torch.Adam([{"params": params, "compute_params": [tensor[:4], tensor[2:]]}])
    opt = fastadam.torch.Adam([{"params": params[:1], "compute_params": [tensor[:4]]}])
    with pytest.raises(ValueError, match=re.escape("shares memory with param_groups[1]['compute_params'][0]")):
        opt.add_param_group({"params": params[1:], "compute_params": [tensor[2:]]})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_only_float32_parameters_have_them(dtype):
    (param,) = parameters((4,), dtype=dtype)
    with pytest.raises(TypeError, match=f"beside param_groups.* of {dtype}, expected None or a float32 parameter"):
        fastadam.torch.Adam([{"params": [param], "compute_params": [half(4)]}])


def test_deferred_modes_and_shared_memory_are_refused():
    (param,) = parameters((4, 2), dtype=torch.float32)
    with pytest.raises(ValueError, match="compute_params.*sparse_update='deferred'"):
        fastadam.torch.Adam([{"params": [param], "compute_params": [half(4, 2)]}], sparse_update="deferred")
    parts = [torch.nn.Parameter(param.detach()[:3]), torch.nn.Parameter(param.detach()[2:])]
    opt = fastadam.torch.Adam([{"params": parts, "compute_params": [half(3, 2), None]}])
    for part in parts:
        part.grad = torch.ones_like(part)
    with pytest.raises(ValueError, match="compute_params: a tensor with .* shares memory with another parameter"):
        opt.step()


@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_early_buckets_write_copies_and_bring_them_back(mode):
    pair = Pair(global_clipnorm=1.0, skip_nonfinite=True, sparse_update=mode)
    for tensor in pair.computed:
        tensor.fill_(7.0)  # not the rounded parameters yet
    for k in range(8):
        for param, plain, gradient in zip(pair.params, pair.plain, gradients_of(k, pair.params), strict=True):
            param.grad, plain.grad = gradient * (1e-3 if k % 3 else 1.0), gradient * (1e-3 if k % 3 else 1.0)
        before = [tensor.clone() for tensor in pair.computed]
        for end in ("abort_step", "end_step"):
            pair.tested.begin_step(early=True)
            for param in pair.params[::-1]:
                pair.tested.step_bucket([param]).result()
            getattr(pair.tested, end)()
            if end == "abort_step":
                assert all(map(torch.equal, before, pair.computed))
        pair.reference.step()
        assert all(map(torch.equal, pair.params, pair.plain))
        pair.assert_copied()
