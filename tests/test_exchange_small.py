"""States of bitsandbytes and torchao in 8 bits: read as they read them, written so that they go on, refused by name."""

from __future__ import annotations

import copy
import importlib
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import codes_reference as codes  # noqa: E402
import fastadam.torch  # noqa: E402
from absent import need, stand_in  # noqa: E402
from fastadam import exchange  # noqa: E402
from fastadam.exchange._foreign import foreign_states  # noqa: E402
from small_states import DATA, HALF, STEPS, gradients, start  # noqa: E402

QUANT = "__bnb_optimizer_quant_state__"
KEYS = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")
GROUP = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
EIGHT_BITS = ["Adam8bit", "AdamW8bit"]
DECAY = {"Adam8bit": 0.1, "AdamW8bit": 0.01, "AdamW32bit": 0.01, "torchao8": 0.01, "torchaofp8": 0.01}
TORCHAO = ["torchao8", "torchaofp8"]


@pytest.fixture(scope="module")
def golden():
    """What the libraries saved, by optimizer and name; tests/data/make_small_states.py made it."""
    with np.load(DATA) as file:
        found = {}
        for key, array in file.items():
            name, _, part = key.partition("/")
            found.setdefault(name, {})[part] = array
    return found


def of_bitsandbytes(found, name, wrapped=True):
    quantized = {key: torch.from_numpy(found[key].copy()) for key in KEYS if key in found}
    state = {"step": HALF, **({QUANT: quantized} if wrapped else quantized)}
    group = {**GROUP, "weight_decay": DECAY[name], "alpha": 0.0, "t_alpha": None, "t_beta3": None}
    return {"state": {0: state}, "param_groups": [group]}


def of_torchao(found, name):
    """With objects that look like torchao's."""
    kind, module = {"torchao8": ("OptimState8bit", "8bit"), "torchaofp8": ("OptimStateFp8", "fp8")}[name]
    state = {"step": torch.tensor(float(HALF))}
    for key, moment in (("exp_avg", "m"), ("exp_avg_sq", "v")):
        parts = {part: torch.from_numpy(found[f"{moment}_{part}"].copy()) for part in ("codes", "scale")}
        if name == "torchaofp8":
            parts["codes"] = parts["codes"].view(torch.float8_e4m3fn)
        else:
            parts["qmap"] = torch.from_numpy(found[f"{moment}_qmap"].copy())
        state[key] = stand_in(f"torchao.optim.subclass_{module}", kind, **parts)
    return {"state": {0: state}, "param_groups": [{**GROUP, "lr": torch.tensor(1e-2), "weight_decay": 0.01}]}


def saved_by(found, name, **options):
    return (of_torchao if name in TORCHAO else of_bitsandbytes)(found[name], name, **options)


def train(optimizer, parameter, steps):
    for step in steps:
        parameter.grad = torch.from_numpy(gradients(step, parameter.numel()))
        optimizer.step()


def trained(size=5000, **options):
    """An AdamW of ours after a few steps."""
    parameter = torch.nn.Parameter(torch.from_numpy(start(size)))
    optimizer = fastadam.torch.AdamW([parameter], lr=1e-2, **options)
    train(optimizer, parameter, range(HALF))
    return optimizer, parameter


# ---- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECAY)
def test_moments_are_what_the_library_itself_reads(golden, name):
    state = foreign_states(saved_by(golden, name))["state"][0]
    assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
    assert (state["step"].item(), state["step"].dtype) == (HALF, torch.float32)
    for key, moment in (("exp_avg", "m"), ("exp_avg_sq", "v")):
        np.testing.assert_array_equal(state[key].numpy().view(np.uint32), golden[name][moment].view(np.uint32))


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_states_are_read_with_and_without_the_wrapping_for_fsdp(golden, name):
    a, b = (exchange.from_bitsandbytes(saved_by(golden, name, wrapped=w))["state"][0] for w in (True, False))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("cls", [fastadam.torch.Adam, fastadam.torch.AdamW])
@pytest.mark.parametrize("name", DECAY)
def test_training_goes_on_in_fastadam(golden, name, cls):
    """The library's own later steps round their moments: by 1/16 of m, and the path differs by that part of a step."""
    if name in TORCHAO and cls is fastadam.torch.Adam:
        cls = lambda params: fastadam.torch.Adam(params, decoupled_weight_decay=True)  # noqa: E731
    found = golden[name]
    parameter = torch.nn.Parameter(torch.from_numpy(found["there"].copy()))
    optimizer = cls([parameter])
    saved = foreign_states(saved_by(golden, name))
    if name in TORCHAO:  # it does not say how weights are decayed
        saved["param_groups"][0]["decoupled_weight_decay"] = True
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["weight_decay"] == DECAY[name]
    train(optimizer, parameter, range(HALF, STEPS))
    off = np.abs(parameter.detach().numpy() - found["after"])
    way = np.abs(found["after"] - found["there"]).max()
    assert way > 0.01
    limit = 1e-6 if name == "AdamW32bit" else 0.05 * way
    large = np.abs(found["v"]) > 1e-3 * found["v"].max()  # what bitsandbytes makes of smaller v is not nearest
    assert off[large].max() < limit


def test_pytorchs_own_optimizer_loads_the_result(golden):
    saved = exchange.from_bitsandbytes(saved_by(golden, "AdamW8bit"))
    ends = []
    for cls in (torch.optim.Adam, fastadam.torch.Adam):
        parameter = torch.nn.Parameter(torch.from_numpy(golden["AdamW8bit"]["there"].copy()))
        optimizer = cls([parameter])
        optimizer.load_state_dict(copy.deepcopy(saved))
        train(optimizer, parameter, range(HALF, STEPS))
        ends.append(parameter.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


def test_what_is_not_foreign_is_returned_itself():
    saved = trained()[0].state_dict()
    for same in (saved, {"state": {}, "param_groups": []}, {}, {"state": []}, {"state": {0: None}}):
        assert foreign_states(same) is same


def test_a_parameter_without_state_stays_without(golden):
    saved = saved_by(golden, "AdamW8bit")
    saved["state"][1] = {}
    assert exchange.from_bitsandbytes(saved)["state"][1] == {}


# ---- refusals ------------------------------------------------------------------------------------------------------


def change(key, value):
    def apply(quantized):
        quantized[key] = value(quantized[key])

    return apply


def drop(*keys):
    return lambda quantized: [quantized.pop(key) for key in keys]


BROKEN = {
    **{f"without {key}": (drop(key), f"parameter 0: without '{key}', expected step, state1") for key in KEYS},
    "without three": (drop("qmap1", "absmax1", "absmax2"), "parameter 0: without 'qmap1', 'absmax1', 'absmax2', expected"),
    "of Lion": (drop("state2", "qmap2", "absmax2"), "parameter 0: without 'state2', 'qmap2', 'absmax2', expected step"),
    "of LAMB": (lambda q: q.update(unorm_vec=torch.zeros(1)), "parameter 0: with 'unorm_vec', expected only step"),
    "of AdEMAMix": (change("state1", lambda t: torch.stack([t, t])), r"state1 of shape \(2, 600\) and state2 of shape \(600,\)"),
    "another block": (change("absmax1", lambda t: t[:2]), r"absmax1: torch.float32 of shape \(2,\), expected .* \(3,\)"),
    "half absmax": (change("absmax2", lambda t: t.half()), r"absmax2: torch.float16 of shape \(3,\), expected torch.float32"),
    "a short map": (change("qmap2", lambda t: t[:255]), r"qmap2: torch.float32 of shape \(255,\), expected .*\(256,\)"),
    "NaN": (change("absmax1", lambda t: t * float("nan")), "absmax1: not finite"),
    "infinity": (change("absmax2", lambda t: t + float("inf")), "absmax2: not finite"),
    "a negative scale": (change("absmax2", lambda t: -t), r"absmax2: -\S+, expected numbers >= 0"),
    "a signed map of v": (change("qmap2", lambda t: -t), r"qmap2: -1.0, expected numbers >= 0"),
    "one moment in 32 bits": (change("state2", lambda t: t.float()), "state2: torch.float32, expected torch.uint8"),
    "not contiguous": (change("state1", lambda t: torch.stack([t, t], 1)[:, 0]), r"state1: strides \(2,\), expected a cont"),
    "without data": (change("state1", lambda t: t.to("meta")), "state1: torch.strided on meta, expected a dense tensor"),
    "no tensor": (change("absmax1", lambda t: t.tolist()), "absmax1: list, expected a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_state_of_bitsandbytes_that_cannot_be_used_is_refused_by_name(golden, kind):
    apply, message = BROKEN[kind]
    saved = saved_by(golden, "AdamW8bit")
    apply(saved["state"][0][QUANT])
    before = copy.deepcopy(saved)
    with pytest.raises((TypeError, ValueError), match=message):
        foreign_states(saved)
    assert saved["state"][0][QUANT].keys() == before["state"][0][QUANT].keys()


@pytest.mark.parametrize("step", [-1, 1.5, float("nan"), 2**25, None, "x"])
def test_a_step_that_is_no_count_is_refused(golden, step):
    saved = saved_by(golden, "AdamW8bit")
    saved["state"][0]["step"] = step
    with pytest.raises((TypeError, ValueError), match="parameter 0: step: .*expected a whole number"):
        exchange.from_bitsandbytes(saved)


def of_moment(key, apply):
    def on_state(state):
        moment = state["exp_avg_sq"]
        setattr(moment, key, apply(getattr(moment, key)))

    return on_state


BROKEN_TORCHAO = {
    "without v": (lambda s: s.pop("exp_avg_sq"), "parameter 0: without 'exp_avg_sq', expected step, exp_avg and exp"),
    "4 bits": (
        lambda s: s.update(exp_avg=stand_in("torchao.optim.subclass_4bit", "OptimState4bit")),
        "exp_avg: OptimState4bit, expected OptimState8bit, OptimStateFp8",
    ),
    "scales": (of_moment("scale", lambda t: torch.ones(7)), r"exp_avg_sq: scale: shape \(7,\) for 4096 codes"),
    "no scales": (of_moment("scale", lambda t: t[:0]), r"exp_avg_sq: scale: shape \(0,\) for 4096 codes"),
    "NaN": (of_moment("scale", lambda t: t * float("nan")), "exp_avg_sq: scale: not finite"),
    "map": (of_moment("qmap", lambda t: t[1:]), r"exp_avg_sq: qmap: shape \(255,\), expected \(256,\)"),
    "negative v": (of_moment("qmap", lambda t: -t), r"exp_avg_sq: -\S+, expected numbers >= 0"),
}


@pytest.mark.parametrize("kind", BROKEN_TORCHAO)
def test_a_state_of_torchao_that_cannot_be_used_is_refused_by_name(golden, kind):
    apply, message = BROKEN_TORCHAO[kind]
    saved = saved_by(golden, "torchao8")
    apply(saved["state"][0])
    with pytest.raises((TypeError, ValueError), match=message):
        foreign_states(saved)


@pytest.mark.parametrize("convert", [exchange.from_bitsandbytes, exchange.to_bitsandbytes, exchange.from_torchao])
@pytest.mark.parametrize("given", [None, [], {}, {"state": []}, {"state": [], "param_groups": []}, {"state": {}, "param_groups": [3]}])  # fmt: skip
def test_what_is_not_a_state_dict_is_refused(convert, given):
    with pytest.raises(TypeError, match="state_dict: .*expected a "):
        convert(given)


@pytest.mark.parametrize("convert", [exchange.from_bitsandbytes, exchange.to_bitsandbytes, exchange.from_torchao])
@pytest.mark.parametrize("state", [torch.ones(2), 3, [1], None], ids=["tensor", "number", "list", "none"])
def test_a_state_that_is_not_a_dict_is_refused(convert, state):
    with pytest.raises(TypeError, match=f"state of parameter 0: {type(state).__name__}, expected a dict"):
        convert({"state": {0: state}, "param_groups": []})


def test_a_wrapping_that_is_not_a_dict_is_refused():
    with pytest.raises(TypeError, match=f"state of parameter 0: {QUANT}: list, expected a dict"):
        exchange.from_bitsandbytes({"state": {0: {"step": 1, QUANT: []}}, "param_groups": []})


@pytest.mark.parametrize("value", [torch.ones(2), "x", object()], ids=["tensor", "string", "object"])
@pytest.mark.parametrize(
    "name", ["lr", "eps", "weight_decay", "betas", "amsgrad", "maximize", "decoupled_weight_decay"]
)
def test_an_option_of_the_wrong_type_is_refused_by_its_name(name, value):
    saved = copy.deepcopy(trained()[0].state_dict())
    saved["param_groups"][0][name] = value
    shown = r"betas(\[0\])?" if name == "betas" else name
    with pytest.raises(TypeError, match=rf"param_groups\[0\]: {shown}: {type(value).__name__}, expected "):
        exchange.to_bitsandbytes(saved)
    if name == "lr":
        with pytest.raises(TypeError, match=rf"param_groups\[0\]: lr: {type(value).__name__}, expected a number"):
            exchange.from_torchao(saved)


# ---- writing -------------------------------------------------------------------------------------------------------


def test_what_is_written_has_the_form_of_bitsandbytes():
    saved = exchange.to_bitsandbytes(trained()[0].state_dict())
    state = saved["state"][0]
    assert (state["step"], type(state["step"]), set(state)) == (HALF, int, {"step", QUANT})
    assert {key: (t.dtype, tuple(t.shape)) for key, t in state[QUANT].items()} == {
        **dict.fromkeys(("state1", "state2"), (torch.uint8, (5000,))),
        **dict.fromkeys(("qmap1", "qmap2"), (torch.float32, (256,))),
        **dict.fromkeys(("absmax1", "absmax2"), (torch.float32, (20,))),
    }
    assert saved["param_groups"] == [{**GROUP, "weight_decay": 0.01}]


def test_the_maps_are_those_of_bitsandbytes(golden):
    quantized = exchange.to_bitsandbytes(trained()[0].state_dict())["state"][0][QUANT]
    for key in ("qmap1", "qmap2"):
        np.testing.assert_array_equal(quantized[key].numpy(), golden["AdamW8bit"][key])


def test_small_parameters_keep_float32_moments():
    optimizer = trained(size=4095)[0]
    quantized = exchange.to_bitsandbytes(optimizer.state_dict())["state"][0][QUANT]
    assert {key: t.dtype for key, t in quantized.items()} == {"state1": torch.float32, "state2": torch.float32}
    again = exchange.from_bitsandbytes(exchange.to_bitsandbytes(optimizer.state_dict()))["state"][0]
    ours = next(iter(optimizer.state.values()))
    assert all(torch.equal(again[key], ours[key]) for key in again)
    assert exchange.to_bitsandbytes(optimizer.state_dict(), min_8bit_size=4095)["state"][0][QUANT].keys() == set(KEYS)


def test_codes_are_the_nearest_and_v_never_becomes_zero():
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp(3 * torch.randn(5000, generator=generator))
    m = torch.randn(5000, generator=generator) * scales
    v = (torch.rand(5000, generator=generator) * scales).square()
    m[:256], v[:256], v[300] = 0, 0, 0
    saved = {"state": {0: {"step": 1.0, "exp_avg": m, "exp_avg_sq": v}}, "param_groups": [GROUP]}
    written = exchange.to_bitsandbytes(saved)
    quantized, read = written["state"][0][QUANT], exchange.from_bitsandbytes(written)["state"][0]
    for number, (key, moment) in enumerate({"exp_avg": m, "exp_avg_sq": v}.items(), 1):
        qmap = quantized[f"qmap{number}"]
        scaled = moment / quantized[f"absmax{number}"].repeat_interleave(256)[:5000].clamp_min(1e-38)
        best = (scaled[:, None] - qmap).abs().amin(1)
        found = (scaled - qmap[quantized[f"state{number}"].long()]).abs()
        floored = (moment > 0) & (scaled < qmap[-255]) if number == 2 else torch.zeros_like(moment, dtype=torch.bool)
        assert torch.all((found <= best * (1 + 1e-6)) | floored)
        assert torch.equal(read[key] == 0, moment == 0) or number == 1
    assert floored.sum() > 10
    assert not read["exp_avg"][:256].any()


def test_of_two_codes_equally_near_the_lower_is_taken():
    saved = exchange.to_bitsandbytes(trained()[0].state_dict())["state"][0][QUANT]
    for number, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
        qmap = saved[f"qmap{number}"]
        middles = torch.cat([(qmap[:-1] + qmap[1:]) / 2, torch.ones(1)]).repeat(16)  # absmax of each block: 1
        moments = {"step": 1.0, "exp_avg": middles.abs(), "exp_avg_sq": middles.abs(), key: middles}
        written = exchange.to_bitsandbytes({"state": {0: moments}, "param_groups": [GROUP]})["state"][0][QUANT]
        expected = torch.arange(256).repeat(16)
        if number == 2:
            expected[expected == 0] = 1  # never the code of 0
        assert torch.equal(written[f"state{number}"].long(), expected)


def small_state(shape, strides_of):
    """Moments in fastadam's 8-bit codes, and their values by the reference."""
    rng = np.random.default_rng(0)
    size = int(np.prod(shape))
    state, values = {"step": torch.tensor(3.0)}, {}
    for key, code in (("exp_avg", codes.M), ("exp_avg_sq", codes.V)):
        array = rng.standard_normal(size).astype(np.float32) * np.float32(10.0) ** rng.integers(-9, 3, size)
        array = array if code.signed else array**2
        words = codes.words(codes.key(0, 1, 0), np.arange(size))
        stored, scales = codes.store(code, array, 128, words)
        state[key] = torch.from_numpy(stored).as_strided(shape, strides_of)
        state[f"{key}_scale"] = torch.from_numpy(scales)
        values[key] = torch.from_numpy(codes.read(code, stored, scales, 128)).as_strided(shape, strides_of)
    return state, values


@pytest.mark.parametrize(("shape", "strides"), [((5000,), (1,)), ((50, 100), (100, 1)), ((100, 50), (1, 100))])
def test_moments_in_fastadams_8_bits_are_read_to_the_bit(shape, strides):
    state, values = small_state(shape, strides)
    saved = {"state": {0: state}, "param_groups": [GROUP]}
    quantized = exchange.to_bitsandbytes(saved, min_8bit_size=10**6)["state"][0][QUANT]
    for number, key in enumerate(("exp_avg", "exp_avg_sq"), 1):
        assert torch.equal(quantized[f"state{number}"], values[key])


def test_half_moments_are_widened():
    moments = {key: torch.linspace(0, 1, 5000).bfloat16() for key in ("exp_avg", "exp_avg_sq")}
    saved = {"state": {0: {"step": 2, **moments}}, "param_groups": [GROUP]}
    quantized = exchange.to_bitsandbytes(saved, min_8bit_size=10**6)["state"][0][QUANT]
    assert torch.equal(quantized["state1"], moments["exp_avg"].float())


UNWRITABLE = {
    "AMSGrad": (lambda g, s: g.update(amsgrad=True), r"param_groups\[0\]: amsgrad: True, expected False"),
    "maximize": (lambda g, s: g.update(maximize=True), r"param_groups\[0\]: maximize: True, expected False"),
    "coupled decay": (
        lambda g, s: g.update(decoupled_weight_decay=False),
        r"param_groups\[0\]: weight_decay: 0.01 added to the gradient, expected 0, or decoupled",
    ),
    "vhat": (lambda g, s: s.update(max_exp_avg_sq=s["exp_avg_sq"]), "parameter 0: with 'max_exp_avg_sq', expected none"),
    "master": (lambda g, s: s.update(master=s["exp_avg"]), "with 'master', .* go on from the rounded parameter"),
    "low half": (lambda g, s: s.update(master_low=s["exp_avg"]), "parameter 0: with 'master_low', expected none"),
    "no v": (lambda g, s: s.pop("exp_avg_sq"), "parameter 0: without 'exp_avg_sq', expected step, exp_avg and exp_avg_sq"),
    "NaN": (lambda g, s: s["exp_avg"].fill_(float("nan")), "exp_avg: not finite, expected finite numbers"),
    "negative v": (lambda g, s: s["exp_avg_sq"].neg_(), "exp_avg_sq: -.*, expected numbers >= 0"),
    "float64": (lambda g, s: s.update(exp_avg=s["exp_avg"].double()), "exp_avg: torch.float64, expected torch.float32"),
    "codes without scales": (lambda g, s: s.update(exp_avg=s["exp_avg"].byte()), "without 'exp_avg_scale', expected exp_avg"),
    "no betas": (lambda g, s: g.pop("betas"), r"param_groups\[0\]: without 'betas', expected lr, betas and eps"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_what_bitsandbytes_does_not_have_is_refused(kind):
    apply, message = UNWRITABLE[kind]
    saved = copy.deepcopy(trained()[0].state_dict())
    apply(saved["param_groups"][0], saved["state"][0])
    with pytest.raises((TypeError, ValueError), match=message):
        exchange.to_bitsandbytes(saved)


# ---- the libraries themselves --------------------------------------------------------------------------------------


def library(name, module):
    need(name)
    with warnings.catch_warnings():  # of the libraries about themselves
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def noisy(step, size, shrink):
    """Independent normal gradients."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, generator=generator) * shrink


def run(optimizer, parameter, steps, shrink=1.0):
    for step in steps:
        parameter.grad = noisy(step, parameter.numel(), shrink).view(parameter.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()


@pytest.mark.parametrize("shape", [(5000,), (64, 80)])
@pytest.mark.parametrize("kind", ["Adam8bit", "AdamW8bit", "AdamW32bit"])
def test_bitsandbytes_goes_on_with_a_state_that_went_through_fastadam(kind, shape):
    """Both ways round: its 20 more steps differ from those of its own state by the rounding of m and v."""
    bnb = library("bitsandbytes", "bitsandbytes")
    make = getattr(bnb.optim, kind)
    theirs = torch.nn.Parameter(torch.linspace(-1, 1, int(np.prod(shape))).view(shape))
    their_optimizer = make([theirs], lr=1e-2, weight_decay=0.1)
    run(their_optimizer, theirs, range(20))
    saved = copy.deepcopy(their_optimizer.state_dict())
    ours = torch.nn.Parameter(theirs.detach().clone())
    our_optimizer = fastadam.torch.AdamW([ours])
    our_optimizer.load_state_dict(foreign_states(saved))
    again = torch.nn.Parameter(theirs.detach().clone())
    again_optimizer = make([again])
    size = 10**6 if kind == "AdamW32bit" else 4096
    again_optimizer.load_state_dict(exchange.to_bitsandbytes(our_optimizer.state_dict(), min_8bit_size=size))
    before = theirs.detach().clone()
    run(their_optimizer, theirs, range(20, 40))
    run(again_optimizer, again, range(20, 40))
    run(our_optimizer, ours, range(20, 40))
    assert again_optimizer.state[again]["step"] == 40
    assert again_optimizer.state[again]["state1"].dtype == their_optimizer.state[theirs]["state1"].dtype
    way = (theirs - before).detach().square().mean().sqrt()
    limits = {"AdamW32bit": (1e-6, 1e-4)}.get(kind, (0.015, 0.04))  # ours keeps what 8 bits round away in each step
    for other, limit in zip((again, ours), limits, strict=True):
        assert (other - theirs).detach().square().mean().sqrt() < limit * way


def test_bitsandbytes_goes_on_from_fastadam_where_a_block_has_mixed_scales():
    """Without the floor under v, elements of small gradients would divide by epsilon alone and run away."""
    bnb = library("bitsandbytes", "bitsandbytes")
    scales = torch.exp(2 * torch.randn(5000, generator=torch.Generator().manual_seed(9)))
    ours = torch.nn.Parameter(torch.zeros(5000))
    optimizer = fastadam.torch.AdamW([ours], lr=1e-3, weight_decay=0.0)
    run(optimizer, ours, range(100), scales)
    theirs = torch.nn.Parameter(ours.detach().clone())
    bitsandbytes = bnb.optim.AdamW8bit([theirs])
    bitsandbytes.load_state_dict(exchange.to_bitsandbytes(optimizer.state_dict()))
    run(bitsandbytes, theirs, [100], scales)
    assert (theirs - ours).detach().abs().max() < 2e-3


@pytest.mark.parametrize(("number", "signed"), [(1, True), (2, False)])
def test_codes_are_at_least_as_near_as_those_of_bitsandbytes(number, signed):
    """Its CPU code looks codes up in a table of finite resolution; ours are the nearest."""
    library("bitsandbytes", "bitsandbytes")
    values = torch.randn(5000, generator=torch.Generator().manual_seed(4)) ** 3
    moments = {"exp_avg": values, "exp_avg_sq": values.abs()}
    saved = {"state": {0: {"step": 1.0, **moments}}, "param_groups": [GROUP]}
    written = exchange.to_bitsandbytes(saved)["state"][0][QUANT]
    qmap, given = written[f"qmap{number}"], values if signed else values.abs()
    theirs, absmax = torch.ops.bitsandbytes.quantize_blockwise(given, qmap, 256)
    assert torch.equal(absmax, written[f"absmax{number}"])
    scale = absmax.repeat_interleave(256)[:5000]
    ours = (qmap[written[f"state{number}"].long()] * scale - given).abs()
    floored = (written[f"state{number}"] == 1) & (not signed)
    assert torch.all((ours <= (qmap[theirs.long()] * scale - given).abs() * (1 + 1e-6)) | floored)


@pytest.mark.parametrize(("kind", "name"), [("OptimState8bit", "subclass_8bit"), ("OptimStateFp8", "subclass_fp8")])
def test_torchaos_own_tensors_load(kind, name, tmp_path):
    module = library("torchao", f"torchao.optim.{name}")
    states = {}
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        options = {"signed": signed} if kind == "OptimState8bit" else {}
        states[key] = getattr(module, kind).zeros((64, 64), **options)
        values = noisy(7, 4096, 1e-3).view(64, 64)
        states[key].copy_(values if signed else values.square())
    saved = {"state": {0: {"step": torch.tensor(3.0), **states}}, "param_groups": [{**GROUP, "lr": torch.tensor(0.01)}]}
    torch.save(saved, tmp_path / "saved.pt")
    plain = foreign_states(torch.load(tmp_path / "saved.pt"))
    for key, state in states.items():
        assert type(plain["state"][0][key]) is torch.Tensor
        assert torch.equal(plain["state"][0][key], state.dequantize())
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = fastadam.torch.AdamW([parameter])
    optimizer.load_state_dict(plain)
    run(optimizer, parameter, [3])
    assert optimizer.param_groups[0]["lr"] == float(np.float32(0.01))
    assert torch.isfinite(parameter).all()


def test_a_shard_of_a_dtensor_is_decoded():
    """FSDP2 keeps torchao's tensors inside of DTensors."""
    module = library("torchao", "torchao.optim.subclass_8bit")
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        mesh = DeviceMesh("cpu", [0])
        local = module.OptimState8bit.zeros((64, 64), signed=True)
        local.copy_(noisy(1, 4096, 1.0).view(64, 64))
        whole = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size((64, 64)), stride=(64, 1))
        state = {"step": torch.tensor(1.0), "exp_avg": whole, "exp_avg_sq": torch.zeros(64, 64)}
        found = foreign_states({"state": {0: state}, "param_groups": [GROUP]})["state"][0]["exp_avg"]
        assert isinstance(found, DTensor)
        assert torch.equal(found.to_local(), local.dequantize())
        assert found.placements == whole.placements
    finally:
        destroy_process_group()
