"""clipvalue, clipnorm and global_clipnorm of fastadam.torch: one norm of all groups, dtypes and layouts together."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")


import fastadam  # noqa: E402
import fastadam.torch  # noqa: E402
from fastadam.torch._clipping import Clipping  # noqa: E402
from torch_twins import parameters  # noqa: E402

SHAPES = ((3,), (2, 4), (), (5, 1), (70, 90))
BOUNDS = [
    {"clipvalue": 0.5},
    {"clipnorm": 0.7},
    {"global_clipnorm": 0.9},
    {"clipvalue": 0.5, "clipnorm": 0.7},
    {"clipvalue": 0.5, "global_clipnorm": 0.9},
    {"global_clipnorm": 1e6},
]


def random_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)


def clipped(params, *, clipvalue=np.inf, clipnorm=np.inf, global_clipnorm=np.inf):
    """The gradients as the core clips them, with one rounding of the factor."""
    gradients = [param.grad.clamp(-clipvalue, clipvalue) for param in params]
    norms = [fastadam.global_norm([gradient.numpy()]) for gradient in gradients]
    factors = [1.0 if norm <= clipnorm else clipnorm / norm for norm in norms]
    norm = sum(norm * norm for norm in norms) ** 0.5
    shared = 1.0 if norm <= global_clipnorm else global_clipnorm / norm
    dtype = params[0].dtype
    return [g * torch.tensor(f * shared, dtype=dtype) for g, f in zip(gradients, factors, strict=True)]


def states(optimizer):
    """Every parameter and every tensor of its state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [t.detach().clone() for p in params for t in (p, *optimizer.state.get(p, {}).values())]


def check_bits(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(torch.nan_to_num(a, nan=7.0), torch.nan_to_num(b, nan=7.0))


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}], ids=str)
def test_the_bits_are_those_of_clipped_gradients(bounds, dtype, options):
    ours, theirs = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    tested = fastadam.torch.AdamW(ours, lr=0.1, **options, **bounds)
    plain = fastadam.torch.AdamW(theirs, lr=0.1, **options)
    for seed in range(6):
        random_gradients(ours, seed)
        before = [param.grad.clone() for param in ours]
        for param, gradient in zip(theirs, clipped(ours, **bounds), strict=True):
            param.grad = gradient
        tested.step()
        plain.step()
        check_bits(states(tested), states(plain))
        check_bits([param.grad for param in ours], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_global_clipnorm_is_close_to_clip_grad_norm(dtype):
    ours, theirs = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    tested = fastadam.torch.Adam(ours, lr=0.1, global_clipnorm=0.5)
    plain = fastadam.torch.Adam(theirs, lr=0.1)
    for seed in range(6):
        random_gradients(ours, seed)
        random_gradients(theirs, seed)
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        tested.step()
        plain.step()
    for a, b in zip(states(tested), states(plain), strict=True):  # torch divides by the norm plus 1e-6
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_it_clips_as_the_core_does():
    """Up to epsilon, which PyTorch adds after the bias correction: here it is too small to matter."""
    weights = [param.detach().numpy().copy() for param in parameters(*SHAPES)]
    core = fastadam.Adam(0.1, epsilon=1e-300, global_clipnorm=0.3, clipvalue=0.4)
    params = parameters(*SHAPES)
    tested = fastadam.torch.Adam(params, lr=0.1, eps=1e-300, global_clipnorm=0.3, clipvalue=0.4)
    for seed in range(5):
        random_gradients(params, seed)
        core.apply_gradients([(p.grad.numpy(), w) for p, w in zip(params, weights, strict=True)])
        tested.step()
    for param, weight in zip(params, weights, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), weight, rtol=1e-13, atol=1e-14)


# ---- how parameters are split ---------------------------------------------------------------------------------------


def mixed():
    """Parameters of every kind of set, and how their gradients are made."""
    double = parameters((3, 2), (4,), seed=1)
    single = parameters((6, 4), (70, 90), (), dtype=torch.float32, seed=2)
    half = parameters((8, 3), dtype=torch.bfloat16, seed=3)
    complex_ = [torch.nn.Parameter(torch.randn(3, 2, dtype=torch.complex64, generator=torch.manual_seed(4)))]
    strided = [torch.nn.Parameter(torch.randn(6, 4, generator=torch.manual_seed(5)).t())]
    return [*double, *single, *half, *complex_, *strided]


def mixed_gradients(params, seed, without=()):
    generator = torch.Generator().manual_seed(seed)
    for place, param in enumerate(params):
        if place == 2:  # sparse, with repeated rows
            values = torch.randn(5, 4, generator=generator)
            rows = torch.tensor([[1, 4, 1, 0, 4]])
            param.grad = torch.sparse_coo_tensor(rows, values, param.shape, check_invariants=True)
        elif param.is_complex():
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        else:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        if place in without:
            param.grad = None


def split(params, cuts):
    edges = [0, *sorted(cuts), len(params)]
    return [{"params": params[a:b]} for a, b in itertools.pairwise(edges) if a < b]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred", "deferred_fast"])
@pytest.mark.parametrize("seed", range(3))
def test_groups_that_are_split_at_random_give_the_same_bits(bounds, mode, seed):
    rng = random.Random(seed)
    whole, parts = mixed(), mixed()
    options = {"lr": 0.1, "sparse_update": mode, **bounds}
    expected = fastadam.torch.Adam(whole, **options)
    tested = fastadam.torch.Adam(split(parts, rng.sample(range(1, len(parts)), 3)), **options)
    for step in range(6):
        without = rng.sample(range(len(whole)), 2) if step % 3 == 1 else ()  # their step counts fall behind
        for params, optimizer in ((whole, expected), (parts, tested)):
            mixed_gradients(params, step, without)
            optimizer.step()
            optimizer.sync()
        check_bits(states(tested), states(expected))


def test_the_norm_is_of_everything_that_has_a_gradient():
    """A sparse gradient counts as its sum, a complex one with both parts, and a parameter twice if it comes twice."""
    params = mixed()
    mixed_gradients(params, 0, without=(1,))
    dense = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in params if p.grad is not None]
    norm = float(sum(g.abs().double().square().sum() for g in dense)) ** 0.5
    optimizer = fastadam.torch.Adam(split(params, [2, 5]), betas=(0.0, 0.9), global_clipnorm=norm / 8)
    optimizer.step()
    stepped = [param for param in params if param.grad is not None]
    for param, gradient in zip(stepped, dense, strict=True):  # beta_1 is 0: the moment is the clipped gradient
        tolerance = 1e-2 if param.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(optimizer.state[param]["exp_avg"], gradient / 8, rtol=tolerance, atol=0)


def test_a_parameter_that_comes_twice_counts_twice():
    param = torch.nn.Parameter(torch.zeros(2))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = fastadam.torch.Adam([param, param], betas=(0.0, 0.9), global_clipnorm=1.0)
    param.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    expected = torch.tensor([3.0, 4.0]) / 50**0.5
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], expected, rtol=1e-6, atol=0)
    assert float(optimizer.state[param]["step"]) == 2


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred", "deferred_fast"])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_a_sparse_gradient_counts_as_its_coalesced_form(mode, bounds):
    def train(prepare):
        table, other = parameters((50, 4), (3,), dtype=torch.float32)
        optimizer = fastadam.torch.Adam([table, other], lr=0.1, sparse_update=mode, **bounds)
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            rows = torch.randint(0, 50, (1, 30), generator=generator)
            gradient = torch.sparse_coo_tensor(
                rows, torch.randn(30, 4, generator=generator), (50, 4), check_invariants=True
            )
            table.grad, other.grad = prepare(gradient), torch.ones(3)
            optimizer.step()
            optimizer.sync()
        return states(optimizer)

    # PyTorch sums more than two values in another order.
    for a, b in zip(train(lambda gradient: gradient), train(lambda gradient: gradient.coalesce()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("mode", ["dense", "deferred"])
def test_a_sparse_gradient_is_clipped_like_the_dense_one(mode, bounds):
    """Close: sums of squares run over a tree of another shape."""
    results = []
    for is_sparse in (True, False):
        (table,) = parameters((50, 4), dtype=torch.float32)
        # With rows epsilon is added before the bias correction.
        optimizer = fastadam.torch.Adam([table], lr=0.1, eps=1e-30, sparse_update=mode, **bounds)
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            rows = torch.cat([torch.arange(50), torch.randint(0, 50, (30,), generator=generator)])[None]
            values = torch.randn(80, 4, generator=generator)
            gradient = torch.sparse_coo_tensor(rows, values, (50, 4), check_invariants=True)
            table.grad = gradient if is_sparse else gradient.to_dense()
            optimizer.step()
        optimizer.sync()
        results.append(states(optimizer))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---- repeated steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"global_clipnorm": 0.5}, {"clipvalue": 0.1, "skip_nonfinite": True}], ids=str)
def test_a_clipped_step_of_several_groups_is_repeated_natively(looked_up, options):
    params, others = parameters(*SHAPES), parameters(*SHAPES)
    optimizer = fastadam.torch.Adam(split(params, [2, 3]), lr=0.1, **options)
    single = fastadam.torch.Adam(others, lr=0.1, **options)
    for seed in range(10):
        for optimizer_, params_ in ((optimizer, params), (single, others)):
            random_gradients(params_, seed)
            if seed == 4:
                del looked_up[:]
            optimizer_.step()
        check_bits(states(optimizer), states(single))
    assert not looked_up


def test_bounds_that_are_set_later_count_from_the_next_step_on():
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    tested, plain = fastadam.torch.Adam(ours, lr=0.1), fastadam.torch.Adam(theirs, lr=0.1)
    for seed, bounds in enumerate([{}] * 5 + [{"clipnorm": 0.2}] * 5 + [{"global_clipnorm": 0.1}] * 5 + [{}] * 5):
        tested.clipnorm = tested.global_clipnorm = None
        for name, bound in bounds.items():
            setattr(tested, name, bound)
        random_gradients(ours, seed)
        for param, gradient in zip(theirs, clipped(ours, **bounds), strict=True):
            param.grad = gradient
        tested.step()
        plain.step()
        check_bits(states(tested), states(plain))


# ---- scaled gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1024.0, 3.0, 2.0**-130])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_bounds_are_for_unscaled_gradients(scale, bounds):
    ours, theirs = parameters(*SHAPES, dtype=torch.float32), parameters(*SHAPES, dtype=torch.float32)
    tested = fastadam.torch.Adam(ours, lr=0.1, fused=True, **bounds)
    plain = fastadam.torch.Adam(theirs, lr=0.1, **bounds)
    for seed in range(5):
        random_gradients(ours, seed)
        random_gradients(theirs, seed)
        for param in ours:
            param.grad *= scale
        tested.grad_scale, tested.found_inf = torch.tensor(scale), torch.tensor(0.0)
        tested.step()
        plain.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)  # 2**-130 is subnormal
    for a, b in zip(states(tested), states(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- the options ----------------------------------------------------------------------------------------------------


def test_they_belong_to_the_optimizer_and_are_copied_but_not_in_state_dicts():
    params = parameters(*SHAPES)
    optimizer = fastadam.torch.Adam(params, clipvalue=2, global_clipnorm=0.5, skip_nonfinite=True)
    assert type(optimizer.clipvalue) is float
    random_gradients(params, 0)
    optimizer.step()
    assert not {"clipvalue", "clipnorm", "global_clipnorm", "skip_nonfinite"} & set(optimizer.param_groups[0])
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        options = other.clipvalue, other.clipnorm, other.global_clipnorm, other.skip_nonfinite
        assert options == (2.0, None, 0.5, True)
        other.clipvalue = None
        assert optimizer.clipvalue == 2.0
    plain = fastadam.torch.Adam(parameters(*SHAPES), clipnorm=0.25)
    plain.load_state_dict(optimizer.state_dict())
    assert (plain.clipvalue, plain.clipnorm, plain.global_clipnorm, plain.skip_nonfinite) == (None, 0.25, None, False)


def test_options_that_an_older_version_pickled_clip_nothing():
    optimizer = fastadam.torch.Adam(parameters((2,)), clipnorm=0.5)
    state = optimizer.__getstate__()
    older = vars(state["_options"]).copy()
    del older["clipping"]
    state["_options"] = type(state["_options"]).__new__(type(state["_options"]))
    state["_options"].__setstate__(older)
    restored = fastadam.torch.Adam.__new__(fastadam.torch.Adam)
    restored.__setstate__(state)
    assert (restored.clipnorm, restored.skip_nonfinite, restored.sparse_update) == (None, False, "dense")


@pytest.mark.parametrize("cls", [fastadam.torch.Adam, fastadam.torch.AdamW])
@pytest.mark.parametrize("name", ["clipvalue", "clipnorm", "global_clipnorm"])
@pytest.mark.parametrize(
    ("bound", "error"),
    [(-1.0, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("1", TypeError), (True, TypeError)],
)
def test_a_bound_that_cannot_be_used_is_refused_by_its_name(cls, name, bound, error):
    with pytest.raises(error, match=name):
        cls(parameters((2,)), **{name: bound})
    optimizer = cls(parameters((2,)), **{name: 0.5})
    with pytest.raises(error, match=name):
        setattr(optimizer, name, bound)
    assert getattr(optimizer, name) == 0.5


@pytest.mark.parametrize("flag", [1, None, "yes", 0.0])
def test_skip_nonfinite_is_a_flag(flag):
    with pytest.raises(TypeError, match="skip_nonfinite: .*, expected True or False"):
        fastadam.torch.Adam(parameters((2,)), skip_nonfinite=flag)


def test_both_norms_at_once_are_refused():
    with pytest.raises(ValueError, match="Cannot accept both `clipnorm` and `global_clipnorm`"):
        fastadam.torch.Adam(parameters((2,)), clipnorm=1.0, global_clipnorm=1.0)
    optimizer = fastadam.torch.Adam(parameters((2,)), clipnorm=1.0)
    with pytest.raises(ValueError, match="Cannot accept both"):
        optimizer.global_clipnorm = 1.0
    assert (optimizer.clipnorm, optimizer.global_clipnorm) == (1.0, None)


@pytest.mark.parametrize(
    ("keyword", "meant"), [("max_grad_norm", "global_clipnorm"), ("clip_norm", "clipnorm"), ("clip_value", "clipvalue")]
)
def test_other_names_of_the_bounds_are_understood(keyword, meant):
    with pytest.raises(TypeError, match=f"{keyword}; did you mean .*{meant}"):
        fastadam.torch.Adam(parameters((2,)), **{keyword: 1.0})


@pytest.mark.parametrize("option", [{"clipvalue": 1.0}, {"global_clipnorm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_parameters_on_a_gpu_are_refused(option):
    clipping = Clipping()
    clipping.set(**option)
    group = {"params": [torch.zeros(1), SimpleNamespace(is_cuda=True, device="cuda:0")]}
    clipping.require_host(0, group, [torch.zeros(1), None])
    with pytest.raises(
        ValueError, match=rf"{next(iter(option))}: .* with param_groups\[0\]\['params'\]\[1\] on cuda:0"
    ):
        clipping.require_host(0, group, [torch.zeros(1), torch.zeros(1)])


def test_a_refused_step_changes_nothing():
    params = parameters((2,), (3,))
    optimizer = fastadam.torch.Adam([{"params": [params[0]]}, {"params": [params[1]]}], global_clipnorm=0.1)
    random_gradients(params, 0)
    optimizer.step()
    before = states(optimizer)
    optimizer.param_groups[1]["eps"] = -1.0
    with pytest.raises(ValueError, match="eps"):
        optimizer.step()
    check_bits(states(optimizer), before)


def test_gradients_that_are_not_finite_are_not_hidden():
    """As in the core, a global norm that is not finite makes every parameter NaN unless the step is skipped."""
    params = parameters((2,), (3,))
    optimizer = fastadam.torch.Adam([{"params": [params[0]]}, {"params": [params[1]]}], global_clipnorm=1.0)
    random_gradients(params, 0)
    params[0].grad[0] = float("inf")
    optimizer.step()
    assert all(bool(param.isnan().all()) for param in params)
