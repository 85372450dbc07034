"""fastadam.torch.Adam and AdamW beside torch.optim's: every setting, dtype and layout, and what they refuse."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from torch_twins import PAIRS, Twins, parameters  # noqa: E402

SHAPES = [(17, 5), (33,), (), (2, 3, 4), (0, 3), (1,)]
# The inputs over which torch runs its own tests of Adam, then pairs of options that these leave out.
INPUTS = [
    {},
    {"lr": 0.01},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "amsgrad": True},
    {"lr": torch.tensor(0.01, dtype=torch.float64)},
    {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
    {
        "betas": (torch.tensor([[0.9]], dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64)),
        "lr": torch.tensor(0.01, dtype=torch.float64),
        "amsgrad": True,
    },
    {"betas": (0.0, 0.0)},
    {"betas": (0.5, 0.9), "eps": 1e-2, "maximize": True, "amsgrad": True},
    {"eps": 0.0},
    {"lr": 0.0, "weight_decay": 0.5},
    {"foreach": True},
    {"foreach": False, "fused": False},
    {"fused": True, "weight_decay": 0.1},
]


def named(options):
    return ",".join(f"{key}={value}".replace("torch.", "") for key, value in options.items()) or "default"


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("options", INPUTS, ids=named)
def test_float64_is_torch_to_1e_12(name, options):
    twins = Twins(name, parameters(*SHAPES), **options)
    for _ in range(60):
        twins.step()
        assert twins.difference() < 1e-12
    for a, b in zip(twins.theirs, twins.ours, strict=True):
        for key, value in twins.reference.state[a].items():
            torch.testing.assert_close(twins.tested.state[b][key], value, rtol=1e-12, atol=1e-15)


def test_decoupled_weight_decay_is_an_option_of_adam():
    twins = Twins("Adam", parameters(*SHAPES), weight_decay=0.1, decoupled_weight_decay=True, lr=0.1)
    for _ in range(20):
        twins.step()
    assert twins.difference() < 1e-12


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"weight_decay": 0.1}, {"maximize": True}], ids=named)
def test_float32_is_within_ulps_of_the_float64_trajectory(name, options):
    """Not further from exact arithmetic than torch's float32, give or take ulps of the parameter and of the update."""
    eps, rate, steps = torch.finfo(torch.float32).eps, 0.01, 50
    start = parameters((1000,), dtype=torch.float32)[0]
    twins = Twins(name, [start], lr=rate, **options)
    exact = torch.nn.Parameter(start.detach().double())
    reference = PAIRS[name][0]([exact], lr=rate, **options)
    for _ in range(steps):
        twins.step()
        exact.grad = twins.theirs[0].grad.double()
        reference.step()
    exact = exact.detach()
    ours, theirs = ((found[0].detach() - exact).abs() for found in (twins.ours, twins.theirs))
    assert bool((ours <= eps * steps * (exact.abs() + 8 * rate)).all())
    assert float(ours.mean()) < 1.1 * float(theirs.mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"weight_decay": 0.1}, {"maximize": True}], ids=named)
def test_a_step_of_half_parameters_is_that_of_torchs_fused_kernel_to_one_rounding(dtype, options):
    twins = Twins("Adam", parameters((1000,), (7, 9), dtype=dtype), lr=0.01, fused=True, **options)
    twins.step()
    for a, b in zip(twins.theirs, twins.ours, strict=True):
        pairs = [
            (a, b),
            *((twins.reference.state[a][key], twins.tested.state[b][key]) for key in twins.tested.state[b]),
        ]
        for theirs, ours in pairs[:1] + pairs[2:]:
            assert ours.dtype == dtype
            spacing = torch.finfo(dtype).eps * theirs.double().abs() + torch.finfo(dtype).smallest_normal
            assert bool(((ours.double() - theirs.double()).abs() <= spacing).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_moments_of_half_parameters_keep_what_half_ones_lose(dtype):
    start = parameters((1000,), dtype=dtype)[0]
    runs = {}
    for option in (None, "float32"):
        weight = torch.nn.Parameter(start.detach().clone())
        optimizer = fastadam.torch.Adam([weight], lr=0.01, betas=(0.9, 0.9999), moments=option)
        exact = torch.nn.Parameter(start.detach().double())
        reference = torch.optim.Adam([exact], lr=0.01, betas=(0.9, 0.9999))
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            weight.grad = torch.randn(1000, generator=generator).to(dtype)
            exact.grad = weight.grad.double()
            optimizer.step()
            reference.step()
        runs[option] = (weight.detach(), optimizer.state[weight], reference.state[exact])
    for option, (_, state, _) in runs.items():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == (torch.float32 if option else dtype)
    _, state, exact_state = runs["float32"]
    torch.testing.assert_close(state["exp_avg_sq"].double(), exact_state["exp_avg_sq"], rtol=1e-5, atol=0)
    lost = runs[None][1]["exp_avg_sq"].double()
    assert bool(((lost - exact_state["exp_avg_sq"]).abs() > 1e-3 * exact_state["exp_avg_sq"]).any())


# ---- layouts --------------------------------------------------------------------------------------------------------


def layouts():
    whole = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {
        "channels_last": torch.randn(4, 3, 5, 5).double().to(memory_format=torch.channels_last),
        "transposed": whole.t(),
        "permuted": torch.randn(2, 3, 4).double().permute(1, 2, 0),
        "one axis of one": torch.randn(3, 1, 4).double().transpose(0, 2),
        "every second column": whole[:, ::2],
        "a column": whole[:, 1:2],
        "complex": torch.randn(3, 4, dtype=torch.complex128),
        "complex transposed": torch.randn(3, 4, dtype=torch.complex128).t(),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}], ids=named)
def test_any_strides(layout, options):
    twins = Twins("Adam", [layouts()[layout], torch.ones(3, dtype=torch.float64)], lr=0.1, **options)
    strides = twins.ours[0].stride()
    for _ in range(5):
        twins.step()
    assert twins.difference() < 1e-12
    assert twins.ours[0].stride() == strides
    assert (
        twins.tested.state[twins.ours[0]]["exp_avg"].stride()
        == twins.reference.state[twins.theirs[0]]["exp_avg"].stride()
    )


@pytest.mark.parametrize("layout", layouts())
def test_a_gradient_in_another_order_than_its_parameter(layout):
    """torch's fused CPU kernel pairs the elements in the order of memory, and is silently wrong here."""
    start = layouts()[layout]
    theirs, ours = (torch.nn.Parameter(start.detach().clone()) for _ in range(2))
    reference, tested = torch.optim.Adam([theirs], lr=0.1), fastadam.torch.Adam([ours], lr=0.1)
    for seed in range(3):
        torch.manual_seed(seed)
        gradient = torch.randn(start.shape[::-1], dtype=start.dtype).permute(*reversed(range(start.dim())))
        theirs.grad, ours.grad = gradient.contiguous(), gradient
        reference.step()
        tested.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_moments_in_another_order_than_their_parameter():
    start = torch.randn(4, 3, 5, 5).double()
    theirs = torch.nn.Parameter(start.clone())
    ours = torch.nn.Parameter(start.clone().to(memory_format=torch.channels_last))
    reference, tested = torch.optim.Adam([theirs], lr=0.1), fastadam.torch.Adam([ours], lr=0.1)
    for step in range(4):
        theirs.grad = torch.randn_like(start)
        ours.grad = theirs.grad.clone()
        reference.step()
        if step == 0:
            tested.load_state_dict(reference.state_dict())
            ours.data.copy_(theirs)
        else:
            tested.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_negated_gradients_are_negated():
    weight, twin = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    gradient = torch.linspace(-1, 2, 5)
    weight.grad, twin.grad = torch._neg_view(gradient), -gradient
    for parameter in (weight, twin):
        fastadam.torch.Adam([parameter], lr=0.1).step()
    assert torch.equal(weight, twin)


def test_a_parameter_given_other_memory_goes_on_there():
    twins = Twins("Adam", parameters((5, 3), (4,)), lr=0.1)
    for step in range(4):
        for parameter in (*twins.theirs, *twins.ours):
            parameter.data = parameter.data.clone() if step % 2 else parameter.data.t().contiguous().t()
        twins.step()
    assert twins.difference() < 1e-12


# ---- which parameters step ------------------------------------------------------------------------------------------


def test_parameters_without_gradient_wait_and_counts_differ():
    twins = Twins("AdamW", parameters((3,), (4,), (5,), (2, 2)), lr=0.1)
    for which in ({0, 1}, {1}, None, {0, 3}, None, {2}, None, set(), None):
        twins.step(which)
        assert twins.difference() < 1e-12
    counts = [[float(s["step"]) for s in o.state.values()] for o in (twins.reference, twins.tested)]
    assert counts[0] == counts[1]
    assert len(set(counts[1])) > 1


def test_groups_with_their_own_options():
    start = parameters((3, 2), (4,), (5,))
    pairs = []
    for cls in PAIRS["Adam"]:
        weights = [torch.nn.Parameter(w.detach().clone()) for w in start]
        optimizer = cls(
            [{"params": weights[:1]}, {"params": weights[1:2], "lr": 0.5, "amsgrad": True}], weight_decay=0.1
        )
        optimizer.add_param_group({"params": weights[2:], "betas": (0.5, 0.6), "maximize": True})
        for step in range(6):
            torch.manual_seed(step)
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            if step == 3:
                optimizer.param_groups[0]["lr"] = 0.2
                optimizer.param_groups[2]["amsgrad"] = False
            optimizer.step()
        pairs.append(weights)
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_float32_and_float64_in_one_group():
    twins = Twins("Adam", [*parameters((9,)), *parameters((9,), dtype=torch.float32)], lr=0.1)
    for _ in range(5):
        twins.step()
    assert twins.difference() < 1e-6
    del twins.theirs[1], twins.ours[1]
    assert twins.difference() < 1e-12


def test_no_gradient_at_all_changes_nothing():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = fastadam.torch.Adam([weight])
    assert optimizer.step() is None
    assert torch.equal(weight, torch.ones(3))
    assert not optimizer.state


def test_zero_gradients_move_nothing():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = fastadam.torch.AdamW([weight], weight_decay=0.0, amsgrad=True)
    for _ in range(3):
        weight.grad = torch.zeros(3)
        optimizer.step()
    assert torch.equal(weight, torch.ones(3))
    assert float(optimizer.state[weight]["step"]) == 3


@pytest.mark.parametrize("name", PAIRS)
def test_version_counters_rise(name):
    twins = Twins(name, [torch.randn(4, 4).t(), torch.randn(3)])
    twins.step()
    tensors = [t for p in twins.ours for t in (p, *twins.tested.state[p].values())]
    before = [tensor._version for tensor in tensors]
    twins.step()
    assert all(tensor._version > version for tensor, version in zip(tensors, before, strict=True))
    loss = (twins.ours[1] ** 2).sum()
    twins.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("cls", "ours"), [(fastadam.torch.Adam, ["Adam"]), (fastadam.torch.AdamW, ["AdamW", "Adam"])])
def test_an_optimizer_inherits_from_torchs_and_holds_its_parts(cls, ours):
    assert [base.__name__ for base in cls.__mro__ if base.__module__.startswith("fastadam")] == ours
    held = vars(cls([torch.nn.Parameter(torch.ones(2))])).keys() - vars(torch.optim.Adam([torch.ones(2)])).keys()
    assert held == {"_options", "_stepper"}


@pytest.mark.parametrize("beta_2", [0.999, 0.1, 1e-3, 1e-5])
def test_a_small_beta_2_leaves_what_the_docstring_says(beta_2):
    weight, twin = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1).double())
    pairs = [
        (fastadam.torch.Adam([weight], betas=(0.0, beta_2)), weight),
        (torch.optim.Adam([twin], betas=(0.0, beta_2)), twin),
    ]
    for gradient in (3.0, 1e-4):
        for optimizer, parameter in pairs:
            parameter.grad = torch.full_like(parameter, gradient)
            optimizer.step()
    found, expected = (float(optimizer.state[parameter]["exp_avg_sq"]) for optimizer, parameter in pairs)
    assert abs(found - expected) <= (1.2e-7 / beta_2 + 1.2e-7 / (1 - beta_2)) * expected


def test_a_square_that_overflows():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = fastadam.torch.Adam([weight])
    for expected in (float("inf"), float("nan")):
        weight.grad = torch.full((1,), 1.9e19)
        optimizer.step()
        found = optimizer.state[weight]["exp_avg_sq"]
        torch.testing.assert_close(found, torch.full((1,), expected), equal_nan=True)
