"""``master_weights``: half parameters are the rounded values of float32 masters that the optimizer owns."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from torch_twins import PAIRS, parameters  # noqa: E402

SHAPES = ((33,), (5, 7), ())
HALF = [torch.bfloat16, torch.float16]
OPTIONS = [
    {},
    {"amsgrad": True, "weight_decay": 0.1},
    {"maximize": True, "moments": "float32"},
    {"clipnorm": 0.5},
    {"global_clipnorm": 0.5, "clipvalue": 1.0, "skip_nonfinite": True},
    {"fused": True},
]


class Pair:
    """Half parameters with masters, and float32 parameters that begin alike."""

    def __init__(self, name="AdamW", dtype=torch.bfloat16, **options):
        make = PAIRS[name][1]
        self.params = parameters(*SHAPES, dtype=dtype)
        self.plain = [torch.nn.Parameter(param.detach().float()) for param in self.params]
        self.tested = make(self.params, lr=0.01, master_weights=True, **options)
        self.reference = make(self.plain, lr=0.01, **options)

    def set_gradients(self, k, which=(0, 1, 2)):
        generator = torch.Generator().manual_seed(k)
        for place, (param, plain) in enumerate(zip(self.params, self.plain, strict=True)):
            gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad = gradient if place in which else None
            plain.grad = gradient.float() if place in which else None

    def step(self, k, which=(0, 1, 2)):
        self.set_gradients(k, which)
        self.tested.step()
        self.reference.step()
        self.assert_equal(which)

    def assert_equal(self, which=(0, 1, 2)):
        for place in which:
            param, plain = self.params[place], self.plain[place]
            state, other = self.tested.state[param], self.reference.state[plain]
            assert torch.equal(param, plain.detach().to(param.dtype))
            assert torch.equal(state["master"], plain)
            for key, value in other.items():
                assert torch.equal(state[key], value)
                assert state[key].dtype == value.dtype


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_masters_have_the_bits_of_float32_parameters(looked_up, name, dtype, options):
    pair = Pair(name, dtype, **options)
    for k in range(6):
        versions = [param._version for param in pair.params]
        pair.step(k)
        assert all(param._version > version for param, version in zip(pair.params, versions, strict=True))
    assert len(looked_up) < 2 * 6  # the last steps were repeated natively


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="needs PyTorch 2.11")
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_are_read_in_their_own_dtype(grad_dtype):
    pair = Pair()
    for k in range(5):
        for param, plain in zip(pair.params, pair.plain, strict=True):
            gradient = torch.randn(param.shape, generator=torch.Generator().manual_seed(k)).to(grad_dtype)
            param.grad_dtype = grad_dtype
            param.grad, plain.grad = gradient, gradient.float()
        pair.tested.step()
        pair.reference.step()
        pair.assert_equal()


def test_parameters_without_a_gradient_and_of_other_dtypes_are_stepped_as_usual():
    pair = Pair()
    full, double = parameters((3,), dtype=torch.float32) + parameters((3,), dtype=torch.float64)
    pair.tested.add_param_group({"params": [full, double]})
    for k, which in enumerate([(0, 1, 2), (2,), (0, 1), (2,), (0, 1, 2)]):
        full.grad, double.grad = torch.ones(3), torch.ones(3, dtype=torch.float64)
        pair.step(k, which)
    assert "master" not in pair.tested.state[full]
    assert "master" not in pair.tested.state[double]
    torch.testing.assert_close(full.double(), double, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_sparse_gradients_step_masters(mode):
    param = torch.nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).bfloat16())
    plain = torch.nn.Parameter(param.detach().float())
    opt = fastadam.torch.Adam([param], lr=0.1, sparse_update=mode, master_weights=True)
    reference = fastadam.torch.Adam([plain], lr=0.1, sparse_update=mode)
    for k in range(4):
        gradient = torch.sparse_coo_tensor(
            torch.tensor([[k, 2, 2]]), torch.ones(3, 3), param.shape, check_invariants=True
        )
        param.grad, plain.grad = gradient.to(torch.bfloat16), gradient
        opt.step()
        reference.step()
        assert torch.equal(opt.state[param]["master"], plain)
        assert torch.equal(param, plain.detach().bfloat16())


@pytest.mark.parametrize("kind", ["permuted", "gaps"])
def test_parameters_may_have_any_strides(kind):
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    param = torch.nn.Parameter(whole.t() if kind == "permuted" else whole[:, ::2])
    plain = torch.nn.Parameter(param.detach().float())
    opt = fastadam.torch.Adam([param], lr=0.1, master_weights=True)
    reference = fastadam.torch.Adam([plain], lr=0.1)
    for k in range(4):
        plain.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(k)).bfloat16().float()
        param.grad = torch.empty_like(param).copy_(plain.grad)
        opt.step()
        reference.step()
        assert torch.equal(opt.state[param]["master"], plain)
        assert torch.equal(param, plain.detach().bfloat16())


# ---- written from outside --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("how", ["copy_", "item", "data", "load_state_dict"])
def test_what_is_written_to_a_parameter_becomes_the_masters_value(steps, how):
    pair = Pair()
    for k in range(steps):
        pair.step(k)
    param, plain = pair.params[0], pair.plain[0]
    value = torch.full_like(param, 0.75, requires_grad=False)
    with torch.no_grad():
        if how == "item":
            param[3] = plain[3] = 0.75
        else:
            plain.copy_(value)
        if how == "copy_":
            param.copy_(value)
        elif how == "data":
            param.data = value
        elif how == "load_state_dict":
            torch.nn.ParameterDict({"w": param}).load_state_dict({"w": value})
    for k in range(steps, steps + 4):
        pair.step(k)


def test_writing_the_same_value_keeps_the_master():
    pair = Pair()
    for k in range(5):
        pair.step(k)
    with torch.no_grad():
        for param in pair.params:
            param.copy_(param.clone())
    pair.step(5)


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_checkpoint_of_both_goes_on_to_the_bit(order):
    pair, again = Pair(), Pair()
    for k in range(3):
        pair.step(k)
    saved = copy.deepcopy(pair.tested.state_dict())
    weights = [param.detach().clone() for param in pair.params]
    again.step(7)

    def load_model():
        with torch.no_grad():
            for param, weight in zip(again.params, weights, strict=True):
                param.copy_(weight)

    loads = [load_model, lambda: again.tested.load_state_dict(saved)]
    for load in loads if order == "model first" else loads[::-1]:
        load()
    again.plain, again.reference = pair.plain, pair.reference
    for k in range(3, 8):
        again.step(k)


@pytest.mark.parametrize("name", PAIRS)
def test_torchs_state_dicts_are_loaded_and_torch_loads_ours(name):
    theirs, params = parameters(*SHAPES, dtype=torch.bfloat16), parameters(*SHAPES, dtype=torch.bfloat16)
    reference, make = PAIRS[name]
    reference = reference(theirs, lr=0.01)
    for param in theirs:
        param.grad = torch.ones_like(param)
    reference.step()
    ours = make(params, lr=0.5, master_weights=True)
    ours.load_state_dict(reference.state_dict())
    for param, their in zip(params, theirs, strict=True):
        assert ours.state[param]["exp_avg"].dtype == torch.float32
        assert torch.equal(ours.state[param]["exp_avg"], reference.state[their]["exp_avg"].float())
        param.grad = torch.ones_like(param)
    start = [param.detach().float() for param in params]
    ours.step()
    for param, before in zip(params, start, strict=True):
        moved = before - ours.state[param]["master"]
        assert ours.state[param]["step"] == 2
        assert 0.005 < moved.min() <= moved.max() < 0.02  # no more than a step away from the parameter
    reference.load_state_dict(ours.state_dict())
    assert reference.param_groups[0]["lr"] == 0.01
    reference.step()
    assert all(reference.state[their]["step"] == 3 for their in theirs)


@pytest.mark.parametrize("name", PAIRS)
def test_masters_and_moments_become_a_float32_model(name):
    pair = Pair(name)
    for k in range(3):
        pair.step(k)
    plain = [torch.nn.Parameter(pair.tested.state[param]["master"].clone()) for param in pair.params]
    other = PAIRS[name][1](plain, lr=0.5)
    other.load_state_dict(pair.tested.state_dict())
    assert all("master" not in state for state in other.state.values())
    pair.step(3)
    for param, known in zip(plain, pair.plain, strict=True):
        param.grad = known.grad
    other.step()
    assert all(map(torch.equal, plain, pair.plain))


def test_masters_that_nobody_steps_are_not_loaded():
    pair = Pair()
    pair.step(0)
    other = fastadam.torch.AdamW(parameters(*SHAPES, dtype=torch.bfloat16))
    other.load_state_dict(pair.tested.state_dict())
    assert all("master" not in state for state in other.state.values())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_and_pickles_keep_masters_and_the_option(how):
    pair = Pair()
    for k in range(4):
        pair.step(k)
    again = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert again.tested.master_weights
    for k in range(4, 9):
        again.step(k)
    for k in range(4, 9):
        pair.step(k)


def test_an_optimizer_that_was_pickled_by_an_older_version_has_none():
    opt = fastadam.torch.Adam(parameters((2,)))
    state = opt.__getstate__()
    options = object.__new__(type(opt._options))
    older = {k: v for k, v in vars(opt._options).items() if k not in ("float32_rule", "telemetry")}
    options.__setstate__(older)
    opt.__setstate__({**state, "_options": options})
    assert opt.master_weights is False


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (torch.zeros(3), ValueError, r"master: shape \(3,\), expected \(4,\)"),
        (torch.zeros(4, dtype=torch.bfloat16), TypeError, "master: torch.bfloat16, expected torch.float32"),
        ("a string", TypeError, "master: str, expected a tensor"),
    ],
    ids=["shape", "dtype", "kind"],
)
def test_a_wrong_master_is_refused(wrong, error, text):
    (param,) = parameters((4,), dtype=torch.bfloat16)
    opt = fastadam.torch.Adam([param], master_weights=True)
    param.grad = torch.ones_like(param)
    opt.step()
    before = param.detach().clone()
    opt.state[param]["master"] = wrong
    with pytest.raises(error, match=text):
        opt.step()
    assert torch.equal(param, before)
    assert opt.state[param]["step"] == 1


# ---- skipping, scaling, compiling ------------------------------------------------------------------------------------


def test_a_skipped_step_changes_nothing():
    pair = Pair(skip_nonfinite=True)
    for k in range(5):
        pair.step(k)
    for param, plain in zip(pair.params, pair.plain, strict=True):
        param.grad, plain.grad = torch.full_like(param, float("inf")), torch.full_like(plain, float("inf"))
    for _ in range(2):
        pair.tested.step()
        assert pair.tested.last_step_skipped
        pair.assert_equal()
    pair.step(5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_scales_and_skips(fused):
    pair = Pair(fused=fused)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10) for _ in range(2)]
    for k in range(6):
        pair.set_gradients(k)
        for param, plain in zip(pair.params, pair.plain, strict=True):
            param.grad.mul_(4.0)
            plain.grad.mul_(4.0)
            if k == 3:
                param.grad.fill_(float("inf"))
                plain.grad.fill_(float("inf"))
        for scaler, opt in zip(scalers, (pair.tested, pair.reference), strict=True):
            scaler.scale(torch.ones(()))  # as a loss
            scaler.step(opt)
            scaler.update(4.0)
        pair.assert_equal()


@pytest.mark.filterwarnings("ignore")  # of Dynamo
def test_a_compiled_step_breaks_the_graph_and_steps_masters():
    pair = Pair()
    compiled = torch.compile(lambda: pair.tested.step(), backend="eager")
    for k in range(3):
        pair.set_gradients(k)
        compiled()
        pair.reference.step()
        pair.assert_equal()
    torch._dynamo.reset()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [1, None, "yes"])
def test_the_option_is_a_bool(wrong):
    with pytest.raises(TypeError, match="master_weights: .*, expected a bool"):
        fastadam.torch.Adam(parameters((2,)), master_weights=wrong)


@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
def test_deferred_modes_are_refused(mode):
    with pytest.raises(ValueError, match=f"master: 'float32' with sparse_update='{mode}'"):
        fastadam.torch.Adam(parameters((2,)), master_weights=True, sparse_update=mode)


def test_half_parameters_that_share_memory_are_refused():
    whole = torch.zeros(5, dtype=torch.bfloat16)
    parts = [torch.nn.Parameter(whole[:3]), torch.nn.Parameter(whole[2:])]
    opt = fastadam.torch.Adam(parts, master_weights=True)
    for part in parts:
        part.grad = torch.ones_like(part)
    with pytest.raises(ValueError, match="master: 'float32' with .* shares memory with another parameter"):
        opt.step()
    assert not whole.any()


def test_parameters_without_memory_get_masters_without_memory():
    param = torch.nn.Parameter(torch.empty(4, dtype=torch.bfloat16, device="meta"))
    opt = fastadam.torch.Adam([param], master_weights=True)
    param.grad = torch.empty_like(param)
    opt.step()
    assert opt.state[param]["master"].is_meta
    assert opt.state[param]["exp_avg"].dtype == torch.float32


# ---- buckets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True])
def test_buckets_step_masters_with_the_same_bits(early):
    """Steps are made early, undone where the norm is clipped or not finite, and made after writes from outside."""
    pair = Pair(global_clipnorm=1.0, skip_nonfinite=True)
    for k in range(12):
        pair.set_gradients(k)
        for param, plain in zip(pair.params, pair.plain, strict=True):
            scale = 1e-3 if k % 3 else 1.0
            param.grad.mul_(scale)
            plain.grad.copy_(param.grad)
            if k == 7:
                param.grad.fill_(float("nan"))
                plain.grad.fill_(float("nan"))
        if k == 5:
            with torch.no_grad():
                pair.params[1].fill_(0.5)
                pair.plain[1].fill_(0.5)
        pair.tested.begin_step(early=early)
        for param in pair.params[::-1]:
            pair.tested.step_bucket([param]).result()
        pair.tested.end_step()
        pair.reference.step()
        assert pair.tested.last_step_skipped == pair.reference.last_step_skipped == (k == 7)
        pair.assert_equal()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_optimizer_that_a_receiver_refers_to_is_collected(dtype):
    weight, tensor = torch.nn.Parameter(torch.ones(3, dtype=dtype)), torch.zeros(3)
    group = {"params": [weight], "compute_params": [tensor if dtype == torch.float32 else None]}
    optimizer = fastadam.torch.Adam([group], master_weights=True)
    weight.owner = tensor.owner = optimizer
    for _ in range(4):
        weight.grad = torch.ones(3, dtype=dtype)
        optimizer.step()
    gone = weakref.ref(optimizer)
    del optimizer, weight, tensor, group
    gc.collect()
    assert gone() is None


def test_a_parameter_that_is_written_while_a_step_is_open_keeps_that_value():
    pair = Pair(global_clipnorm=1.0)
    for k in range(3):
        pair.step(k)
    pair.set_gradients(3)
    pair.tested.begin_step(early=True)
    pair.tested.step_bucket(pair.params).result()
    with torch.no_grad():
        pair.params[0].fill_(0.25)
        pair.plain[0].fill_(0.25)
    with pytest.raises(RuntimeError, match="was written to while a step was open"):
        pair.tested.end_step()
    assert (pair.params[0] == 0.25).all()
    pair.step(4)
