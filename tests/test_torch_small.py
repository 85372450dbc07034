"""Smaller states in fastadam.torch: moments of 8 or 16 bits, split masters, parameters that are rounded at random.

A step is compared to the bit with the step of a float32 optimizer that begins with what is stored, the results of which
codes_reference.py stores.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import codes_reference as codes  # noqa: E402
import fastadam.torch  # noqa: E402
from torch_twins import parameters  # noqa: E402

SHAPES = ((5, 7), (1000,), (3, 129), (1,), (128, 3))  # whole blocks, tails and less than a block
SEED = 2**63 + 5
CODES = {"exp_avg": codes.M, "exp_avg_sq": codes.V}
OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"maximize": True, "decoupled_weight_decay": True, "weight_decay": 0.1},
    {"clipnorm": 0.5},
    {"global_clipnorm": 0.5, "clipvalue": 1.0, "skip_nonfinite": True},
    {"fused": True},
    {"foreach": True},
]
HALVES = [torch.bfloat16, torch.float16]


def give_gradients(params, k, scale=1.0):
    generator = torch.Generator().manual_seed(k)
    for param in params:
        gradient = torch.randn(param.shape, generator=generator) * 10.0 ** -(k % 4) * scale
        param.grad = torch.empty_like(param, requires_grad=False).copy_(gradient)


def in_order(tensor):
    """The elements of a tensor without gaps in the order of memory, as an array."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).clone()


def floats(tensor):
    return in_order(tensor.detach().float()).numpy()


def bits_of_bfloat16(tensor):
    return in_order(tensor).view(torch.int16).numpy().view(np.uint16)


class Reference:
    """The float32 steps of an optimizer with smaller states, and how their results are stored."""

    def __init__(self, params, numbers=None, **options):
        self.numbers = range(len(params)) if numbers is None else numbers
        self.plain = [torch.nn.Parameter(param.detach().float().clone()) for param in params]
        self.optimizer = fastadam.torch.Adam(self.plain, **options)

    def words(self, k, place, stream=0):
        key = codes.key(SEED, k + 1, self.numbers[place], stream)
        return codes.words(key, np.arange(self.plain[place].numel()))

    def step(self, tested, params, k):
        """Expects of a step of ``tested`` what a float32 step from its state makes."""
        before = [copy.deepcopy(tested.state.get(param)) for param in params]
        for place, (param, plain) in enumerate(zip(params, self.plain, strict=True)):
            plain.grad = param.grad.float()
            with torch.no_grad():
                plain.copy_(value_of(param, before[place]))
            if before[place]:
                for key in CODES:
                    self.optimizer.state[plain][key].copy_(moment_of(before[place], key))
        self.optimizer.step()
        tested.step()
        for place, (param, plain) in enumerate(zip(params, self.plain, strict=True)):
            state, expected = tested.state[param], self.optimizer.state[plain]
            assert float(state["step"]) == float(expected["step"]) == k + 1
            for key in CODES:
                self.check_moment(state, expected, key, self.words(k, place))
            self.check_value(tested, param, state, plain, self.words(k, place, stream=1))

    def check_moment(self, state, expected, key, words):
        values = floats(expected[key])
        if state[key].dtype == torch.uint8:
            stored, scales = codes.store(CODES[key], values, 128, words)
            np.testing.assert_array_equal(in_order(state[key]).numpy(), stored)
            np.testing.assert_array_equal(state[f"{key}_scale"].numpy(), scales)
        elif state[key].dtype == torch.bfloat16:
            np.testing.assert_array_equal(bits_of_bfloat16(state[key]), codes.bfloat16(values, words >> 16))
        else:
            assert torch.equal(state[key], expected[key])

    def check_value(self, tested, param, state, plain, words):
        values = floats(plain)
        if "master_low" in state:
            high, low = codes.split(values)
            np.testing.assert_array_equal(bits_of_bfloat16(param), high)
            np.testing.assert_array_equal(in_order(state["master_low"]).numpy(), low)
        elif "master" in state:
            assert torch.equal(state["master"], plain)
            assert torch.equal(param, plain.detach().to(param.dtype))
        elif param.dtype == torch.bfloat16 and tested.param_groups[0].get("stochastic_rounding"):
            np.testing.assert_array_equal(bits_of_bfloat16(param), codes.bfloat16(values, words >> 16))
        else:
            assert torch.equal(param, plain.detach().to(param.dtype))


def value_of(param, state):
    """The float32 value of a parameter: its master, if it has one."""
    if state and "master" in state:
        return state["master"]
    if state and "master_low" in state:
        joined = codes.joined(bits_of_bfloat16(param), in_order(state["master_low"]).numpy())
        return torch.from_numpy(joined.copy()).as_strided(param.shape, param.stride())
    return param.detach().float()


def moment_of(state, key):
    moment = state[key]
    if moment.dtype != torch.uint8:
        return moment.float()
    read = codes.read(CODES[key], in_order(moment).numpy(), state[f"{key}_scale"].numpy(), 128)
    return torch.from_numpy(read.copy()).as_strided(moment.shape, moment.stride())


def small(params, cls=fastadam.torch.Adam, **options):
    return cls(params, **{"lr": 0.01, "float32_for": 0, "seed": SEED, **options})


def check_equal(ours, other):
    """Two optimizers have the same bits in parameters and states."""
    for a, b in zip(groups_of(ours), groups_of(other), strict=True):
        assert torch.equal(a, b)
        mine, theirs = ours.state[a], other.state[b]
        assert list(mine) == list(theirs)
        for key, value in mine.items():
            assert value.dtype == theirs[key].dtype
            assert torch.equal(value, theirs[key])


def groups_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


# ---- a step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("moments", ["8bit", "bfloat16"])
def test_small_moments_store_what_a_float32_step_makes_of_what_was_stored(moments, options):
    params = parameters(*SHAPES, dtype=torch.float32)
    reference = Reference(params, lr=0.01, **options)
    tested = small(params, moments=moments, **options)
    for k in range(6):
        give_gradients(params, k)
        reference.step(tested, params, k)
    dtype = torch.uint8 if moments == "8bit" else torch.bfloat16
    assert all(tested.state[param][key].dtype == dtype for param in params for key in CODES)


@pytest.mark.parametrize("moments", ["8bit", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "choice", [{"master": "split"}, {"master": "float32"}, {"stochastic_rounding": True}, {}], ids=str
)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_parameters_with_each_kind_of_state(dtype, choice, moments):
    if dtype == torch.float16 and choice == {"master": "split"}:
        return
    params = parameters(*SHAPES, dtype=dtype)
    reference = Reference(params, lr=0.01)
    tested = small(params, moments=moments, **choice, **({"float32_for": None} if moments == "float32" else {}))
    for k in range(6):
        give_gradients(params, k)
        reference.step(tested, params, k)


def test_amsgrad_with_bfloat16_moments():
    params = parameters((300,), dtype=torch.float32)
    tested = small(params, moments="bfloat16", amsgrad=True)
    largest = torch.zeros(300)
    for k in range(6):
        give_gradients(params, k)
        tested.step()
        state = tested.state[params[0]]
        assert state["max_exp_avg_sq"].dtype == torch.bfloat16
        assert (state["max_exp_avg_sq"].float() >= largest).all()
        largest = state["max_exp_avg_sq"].float()


@pytest.mark.parametrize("moments", ["8bit", "bfloat16"])
@pytest.mark.parametrize(
    "make", [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t[1:, 1:]], ids=["transposed", "steps", "slice"]
)
def test_strided_parameters_are_coded_in_the_order_of_their_memory(make, moments):
    base = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    params = [torch.nn.Parameter(make(base))]
    dense = [torch.nn.Parameter(torch.empty_like(params[0]).copy_(params[0].detach()))]
    tested, reference = small(params, moments=moments), small(dense, moments=moments)
    for k in range(4):
        give_gradients(dense, k)
        params[0].grad = dense[0].grad.contiguous()
        tested.step()
        reference.step()
        assert torch.equal(params[0], dense[0])
        for key, value in reference.state[dense[0]].items():
            assert torch.equal(tested.state[params[0]][key], value)


def test_parameters_of_all_formats_step_together():
    """Numbers are places in all groups, whatever sets and groups the parameters are in."""
    params = parameters((200,), (4100,), (300,), (4200,), dtype=torch.float32)
    groups = [{"params": params[:2]}, {"params": params[2:], "moments": "bfloat16"}]
    tested = fastadam.torch.Adam(groups, lr=0.01, moments="8bit", seed=SEED, global_clipnorm=1.0)
    reference = Reference(params, lr=0.01, global_clipnorm=1.0)
    for k in range(4):
        give_gradients(params, k)
        reference.step(tested, params, k)
    kinds = [tested.state[param]["exp_avg"].dtype for param in params]
    assert kinds == [torch.float32, torch.uint8, torch.float32, torch.bfloat16]


def test_steps_that_differ_give_each_parameter_the_words_of_its_own():
    params = parameters((200,), (300,), dtype=torch.float32)
    tested = small(params, moments="8bit")
    alone = [small([param], moments="8bit") for param in copy.deepcopy(params)]
    for k in range(5):
        give_gradients(params, k)
        if k % 2:
            params[0].grad = None
        tested.step()
        if k % 2 == 0:
            other = groups_of(alone[0])[0]
            other.grad = params[0].grad.clone()
            alone[0].step()
            assert torch.equal(params[0], other)
            assert torch.equal(tested.state[params[0]]["exp_avg"], alone[0].state[other]["exp_avg"])
    assert [float(state["step"]) for state in tested.state.values()] == [3, 5]


def test_other_seeds_and_numbers_give_other_bits():
    def run(place, seed):
        params = [torch.nn.Parameter(torch.ones(512)) for _ in range(3)]
        tested = small(params, moments="8bit", seed=seed)
        give_gradients([params[place]], 0)
        tested.step()
        return tested.state[params[place]]["exp_avg"]

    assert torch.equal(run(0, 1), run(0, 1))
    assert not torch.equal(run(0, 1), run(1, 1))
    assert not torch.equal(run(0, 1), run(0, 2))


@pytest.mark.parametrize("how", ["buckets", "early", "overlap", "closure", "compiled"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Dynamo
@pytest.mark.parametrize(
    "options", [{"moments": "8bit"}, {"master": "split", "moments": "8bit"}, {"stochastic_rounding": True}]
)
def test_every_way_to_step_gives_the_same_bits(how, options):
    dtype = torch.float32 if options == {"moments": "8bit"} else torch.bfloat16
    rule = {"float32_for": 500} if "moments" in options else {"float32_for": None}
    params = parameters((50, 20), (10,), dtype=dtype)
    twins = copy.deepcopy(params)
    tested = small(params, global_clipnorm=1.0, **options, **rule)
    plain = small(twins, global_clipnorm=1.0, **options, **rule)
    compiled = torch.compile(tested.step, backend="eager") if how == "compiled" else None
    for k in range(5):
        give_gradients(twins, k)
        for param, twin in zip(params, twins, strict=True):
            param.grad = None if how == "overlap" else twin.grad.clone()
        plain.step()
        if how in ("buckets", "early"):
            tested.begin_step(early=how == "early")
            for param in params[::-1]:
                tested.step_bucket([param]).result()
            tested.end_step()
        elif how == "overlap":
            with fastadam.torch.overlap(tested):
                sum((param * twin.grad).sum() for param, twin in zip(params, twins, strict=True)).backward()
        elif how == "closure":
            assert tested.step(lambda: 3) == 3
        else:
            compiled()
        check_equal(tested, plain)


def test_a_step_that_is_skipped_or_refused_changes_nothing():
    params = parameters((300,), (5,), dtype=torch.bfloat16)
    tested = fastadam.torch.AdamW(params, moments="8bit", master="split", float32_for=10, skip_nonfinite=True)
    give_gradients(params, 0)
    tested.step()
    before = copy.deepcopy(tested)
    give_gradients(params, 1)
    params[1].grad[2] = float("nan")
    tested.step()
    assert tested.last_step_skipped
    check_equal(tested, before)
    params[1].grad = torch.ones(5, dtype=torch.bfloat16)
    tested.state[params[0]]["exp_avg_scale"] = torch.zeros(7, dtype=torch.uint8)
    kept = [params[0].detach().clone(), params[1].detach().clone()]
    with pytest.raises(ValueError, match=r"params'\]\[0\]: exp_avg_scale: shape \(7,\), expected \(3,\)"):
        tested.step()
    assert all(map(torch.equal, params, kept))


def test_telemetry_measures_split_parameters():
    params = parameters((300,), dtype=torch.bfloat16)
    tested = small(params, moments="8bit", master="split", telemetry=True, lr=1e-3)
    give_gradients(params, 0)
    before = params[0].detach().clone()
    tested.step()
    report = tested.telemetry().to_dict()
    assert report["gradient_norm/0.0"] == pytest.approx(params[0].grad.double().norm().item(), rel=1e-5)
    assert report["update_rms/0.0"] == pytest.approx(1e-3, rel=1e-2)
    changed = int((params[0] != before).sum())
    assert 0 < changed < 300
    assert report["unchanged/0.0"] == pytest.approx(1 - changed / 300)


def test_a_grad_scaler_scales_and_skips():
    params = parameters((600,), dtype=torch.float32)
    twins = copy.deepcopy(params)
    tested, plain = small(params, moments="8bit"), small(twins, moments="8bit")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10)
    for k in range(4):
        give_gradients(twins, k)
        params[0].grad = twins[0].grad * 4.0
        if k == 2:
            params[0].grad[3] = float("inf")
        scaler.scale(torch.ones(()))  # as a loss
        scaler.step(tested)
        scaler.update(4.0)
        if k != 2:
            plain.step()
        check_equal(tested, plain)


# ---- split masters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_split_master_is_a_float32_parameter_to_the_bit(options):
    params = parameters(*SHAPES, dtype=torch.bfloat16)
    plain = [torch.nn.Parameter(param.detach().float()) for param in params]
    tested = small(params, master="split", float32_for=None, **options)
    reference = fastadam.torch.Adam(plain, lr=0.01, **options)
    for k in range(20):
        give_gradients(params, k)
        for param, other in zip(params, plain, strict=True):
            other.grad = param.grad.float()
        tested.step()
        reference.step()
        for param, other in zip(params, plain, strict=True):
            state = tested.state[param]
            assert torch.equal(value_of(param, state).view(torch.int32), other.detach().view(torch.int32))
            expected = ((other.detach().view(torch.int32) + 0x8000) >> 16).to(torch.int16)
            assert torch.equal(param.detach().view(torch.int16), expected)
            assert state["exp_avg"].dtype == torch.float32
            assert torch.equal(state["exp_avg"], reference.state[other]["exp_avg"])


def test_a_split_master_moves_where_its_parameter_cannot():
    (param,) = parameters((64,), dtype=torch.bfloat16)
    with torch.no_grad():
        param.fill_(1.0)
    tested = fastadam.torch.Adam([param], lr=1e-5, master="split")
    for _ in range(1000):
        param.grad = torch.ones_like(param)
        tested.step()
    assert torch.equal(param, torch.full_like(param, 0.99))


@pytest.mark.parametrize("value", [0.0, -0.0, 2.0, float("inf"), float("nan")])
def test_what_is_written_to_a_split_parameter_is_what_it_goes_on_from(value):
    (param,) = parameters((64,), dtype=torch.bfloat16)
    tested = fastadam.torch.Adam([param], lr=1e-3, master="split")
    give_gradients([param], 0)
    tested.step()
    assert (tested.state[param]["master_low"] < 0).any()
    with torch.no_grad():
        param.fill_(value)
    param.grad = torch.zeros_like(param)
    tested.param_groups[0]["lr"] = 0.0
    tested.step()
    if value != value:
        assert param.isnan().all()
    else:
        assert torch.equal(param, torch.full_like(param, value))


def test_float32_parameters_beside_split_ones_are_stepped_as_usual():
    half, single = *parameters((33,), dtype=torch.bfloat16), *parameters((9,), dtype=torch.float32)
    (twin,) = parameters((9,), dtype=torch.float32)
    tested, plain = fastadam.torch.Adam([half, single], master="split"), fastadam.torch.Adam([twin])
    for k in range(3):
        give_gradients([half, single], k)
        twin.grad = single.grad.clone()
        tested.step()
        plain.step()
    assert torch.equal(single, twin)
    assert list(tested.state[single]) == ["step", "exp_avg", "exp_avg_sq"]
    assert "master_low" in tested.state[half]


# ---- parameters that are rounded at random ---------------------------------------------------------------------------


def test_bfloat16_parameters_learn_with_stochastic_rounding():
    """Steps of 1e-3 from 1.0, where the neighbours are 0.0039 and 0.0078 apart: to nearest none would move.

    100 steps of 65,536 elements. The sum of their roundings has a standard deviation of at most sqrt(100) * 0.0039 / 2
    for one element, so the mean of one of at most 7.7e-5; 5 of them are exceeded with a probability of 6e-7.
    """
    runs = {}
    for name, dtype, options in [
        ("float32", torch.float32, {}),
        ("stochastic", torch.bfloat16, {"stochastic_rounding": True, "moments": "float32", "seed": 3}),
        ("nearest", torch.bfloat16, {"moments": "float32"}),
    ]:
        param = torch.nn.Parameter(torch.ones(65536, dtype=dtype))
        optimizer = fastadam.torch.Adam([param], lr=1e-3, **options)
        for _ in range(100):
            param.grad = torch.ones_like(param)
            optimizer.step()
        runs[name] = param.detach().double().mean().item()
    assert runs["float32"] == pytest.approx(0.9, abs=1e-5)
    assert runs["nearest"] == 1.0
    assert abs(runs["stochastic"] - runs["float32"]) < 5 * 7.7e-5


def test_bfloat16_moments_keep_their_means():
    """v after gradients have shrunk to a tenth: 1.00 of float32's within 0.01, where to nearest it is several times.

    The mean over 16,384 elements of v / v_float32, each with an error below 2**-8 * sqrt(1000) = 0.12, has a standard
    deviation of less than 1e-3: 0.01 is exceeded with a probability below 1e-22.
    """
    means = {}
    for name, dtype, moments in [
        ("float32", torch.float32, None),
        ("random", torch.float32, "bfloat16"),
        ("nearest", torch.bfloat16, None),
    ]:
        param = torch.nn.Parameter(torch.zeros(16384, dtype=dtype))
        optimizer = fastadam.torch.Adam([param], lr=0.0, moments=moments, seed=1)
        for k in range(2500):
            param.grad = torch.full_like(param, 1.0 if k < 500 else 0.1)
            optimizer.step()
        means[name] = optimizer.state[param]["exp_avg_sq"].double().mean().item()
    assert means["random"] / means["float32"] == pytest.approx(1.0, abs=0.01)
    assert means["nearest"] / means["float32"] > 2


def test_turning_stochastic_rounding_on_is_noticed():
    params = parameters((3000,), dtype=torch.bfloat16)
    twins = copy.deepcopy(params)
    tested = fastadam.torch.Adam(params, lr=1e-4, moments="float32")
    plain = fastadam.torch.Adam(twins, lr=1e-4, moments="float32")
    for k in range(6):
        give_gradients(params, k)
        twins[0].grad = params[0].grad.clone()
        if k == 3:
            tested.param_groups[0]["stochastic_rounding"] = True
        tested.step()
        plain.step()
        assert torch.equal(params[0], twins[0]) == (k < 3)
