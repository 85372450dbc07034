"""Smaller states in fastadam.torch, saved, loaded, copied and converted."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import codes_reference as codes  # noqa: E402
import fastadam.torch  # noqa: E402
from test_torch_small import (  # noqa: E402
    CODES,
    SEED,
    bits_of_bfloat16,
    check_equal,
    floats,
    give_gradients,
    in_order,
    moment_of,
    small,
    value_of,
)
from torch_twins import parameters  # noqa: E402

SHAPES = ((40, 7), (1000,), (1,))
CHOICES = [
    {"moments": "8bit"},
    {"moments": "bfloat16"},
    {"moments": "8bit", "master": "split"},
    {"moments": "bfloat16", "master": "split"},
    {"moments": "8bit", "master": "float32"},
    {"master": "split", "float32_for": None},
    {"moments": "bfloat16", "stochastic_rounding": True},
    {"moments": "8bit", "float32_for": 500},
]


def dtype_of(choice):
    return torch.bfloat16 if len({"master", "stochastic_rounding"} & choice.keys()) else torch.float32


def run(optimizer, steps):
    params = optimizer.param_groups[0]["params"]
    for k in steps:
        give_gradients(params, k)
        optimizer.step()


def trained(choice, steps=4, **options):
    optimizer = small(parameters(*SHAPES, dtype=dtype_of(choice)), **choice, **options)
    run(optimizer, range(steps))
    return optimizer


def another(optimizer, choice, **options):
    """An optimizer of parameters with the values of the other's."""
    params = [torch.nn.Parameter(param.detach().clone()) for param in optimizer.param_groups[0]["params"]]
    return small(params, **{**choice, **options})


# ---- the same choice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("how", ["state dict", "file", "pickle", "deepcopy"])
def test_a_resumed_run_goes_on_to_the_bit(how, choice):
    first = trained(choice)
    if how == "pickle":
        second = pickle.loads(pickle.dumps(first))
    elif how == "deepcopy":
        second = copy.deepcopy(first)
    else:
        second = another(first, choice, seed=1, lr=0.5)
        saved = first.state_dict()
        if how == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        second.load_state_dict(saved)
    check_equal(first, second)
    run(first, range(4, 8))
    run(second, range(4, 8))
    check_equal(first, second)


@pytest.mark.parametrize("early", ["model", "optimizer"])
@pytest.mark.parametrize("master", ["split", "float32"])
def test_model_and_optimizer_are_loaded_in_any_order(early, master):
    choice = {"moments": "8bit", "master": master}
    first = trained(choice)
    params = first.param_groups[0]["params"]
    second = small(parameters(*SHAPES, dtype=torch.bfloat16, seed=9), **choice)
    run(second, range(2))
    others = second.param_groups[0]["params"]

    def load_model():
        with torch.no_grad():
            for param, other in zip(params, others, strict=True):
                other.copy_(param)

    if early == "model":
        load_model()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    if early == "optimizer":
        load_model()
    run(first, range(4, 8))
    run(second, range(4, 8))
    check_equal(first, second)


def test_another_process_goes_on_to_the_bit(tmp_path):
    choice = {"moments": "8bit", "master": "split"}
    first = trained(choice)
    torch.save({"params": first.param_groups[0]["params"], "state": first.state_dict()}, tmp_path / "before.pt")
    program = (
        "import sys, torch, fastadam.torch\n"
        "from test_torch_small_states import run\n"
        "folder = sys.argv[1]\n"
        "saved = torch.load(folder + '/before.pt', weights_only=True)\n"
        "second = fastadam.torch.Adam(saved['params'], moments='8bit', master='split', float32_for=0)\n"
        "second.load_state_dict(saved['state'])\n"
        "run(second, range(4, 8))\n"
        "torch.save([param.detach() for param in second.param_groups[0]['params']], folder + '/after.pt')\n"
    )
    paths = [Path(__file__).parent, Path(fastadam.__file__).parents[1]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "FASTADAM_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=environment)
    run(first, range(4, 8))
    found = torch.load(tmp_path / "after.pt", weights_only=True)
    assert all(map(torch.equal, found, first.param_groups[0]["params"]))


def test_a_parameter_keeps_its_number_and_seed_when_groups_are_added():
    params = parameters((300,), (200,), dtype=torch.float32)
    both = small(copy.deepcopy(params), moments="8bit")
    grown = small(params[:1], moments="8bit")
    grown.add_param_group({"params": params[1:]})
    assert grown.param_groups[1]["seed"] == SEED
    for k in range(3):
        give_gradients(params, k)
        give_gradients(both.param_groups[0]["params"], k)
        grown.step()
        both.step()
    check_equal(grown, both)


def test_states_that_are_float32_by_choice_stay_so():
    """Which the file does not say of a table: it had a sparse gradient first."""
    words = torch.nn.Embedding(1000, 8, sparse=True)
    dense = torch.nn.Parameter(torch.ones(1000, 8))
    first = fastadam.torch.Adam([words.weight, dense], moments="8bit")
    twin = copy.deepcopy(words)
    second = fastadam.torch.Adam([twin.weight, torch.nn.Parameter(torch.ones(1000, 8))], moments="8bit")

    def step(optimizer, module):
        optimizer.zero_grad()
        other = optimizer.param_groups[0]["params"][1]
        (module(torch.tensor([3, 5])).square().sum() + other.square().sum()).backward()
        optimizer.step()

    step(first, words)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for a, b in zip(second.param_groups[0]["params"], first.param_groups[0]["params"], strict=True):
            a.copy_(b)
    assert [state["exp_avg"].dtype for state in second.state.values()] == [torch.float32, torch.uint8]
    for _ in range(2):
        step(first, words)
        step(second, twin)
    check_equal(first, second)


def test_groups_without_the_options_have_torchs_keys():
    plain = fastadam.torch.AdamW(parameters((4,)))
    assert plain.param_groups[0].keys() == torch.optim.AdamW(parameters((4,))).param_groups[0].keys()
    given = fastadam.torch.AdamW([{"params": parameters((4,)), "moments": "8bit"}], seed=7)
    assert {name: given.param_groups[0].get(name) for name in ("moments", "master", "seed")} == {
        "moments": "8bit",
        "master": None,
        "seed": 7,
    }


@pytest.mark.parametrize("saved", CHOICES, ids=str)
def test_loading_keeps_how_the_optimizer_stores_states(saved):
    first = trained(saved)
    second = fastadam.torch.Adam([torch.nn.Parameter(p.detach().clone()) for p in first.param_groups[0]["params"]])
    second.load_state_dict(first.state_dict())
    group = second.param_groups[0]
    assert [group.get(name) for name in ("moments", "master", "stochastic_rounding")] == [None] * 3
    run(second, range(2))


# ---- conversions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", [torch.optim.Adam, fastadam.torch.Adam])
@pytest.mark.parametrize("moments", ["8bit", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float32_states_become_small(dtype, moments, theirs):
    first = theirs(parameters(*SHAPES, dtype=torch.float32), lr=0.01)
    run(first, range(4))
    params = [torch.nn.Parameter(param.detach().to(dtype)) for param in first.param_groups[0]["params"]]
    second = small(params, moments=moments)
    second.load_state_dict(first.state_dict())
    for number, (param, state) in enumerate(zip(params, first.state.values(), strict=True)):
        mine = second.state[param]
        words = codes.words(codes.key(SEED, 4, number), np.arange(param.numel()))
        for key, code in CODES.items():
            if moments == "8bit":
                stored, scales = codes.store(code, floats(state[key]), 128, words)
                np.testing.assert_array_equal(in_order(mine[key]).numpy(), stored)
                np.testing.assert_array_equal(mine[f"{key}_scale"].numpy(), scales)
            else:
                np.testing.assert_array_equal(
                    bits_of_bfloat16(mine[key]), codes.bfloat16(floats(state[key]), words >> 16)
                )
        assert mine["step"] == 4
    run(second, range(4, 6))


@pytest.mark.parametrize("name", ["Adam", "SparseAdam"])
def test_other_states_of_torch_become_small(name):
    first = getattr(torch.optim, name)(parameters((300,), dtype=torch.float32), lr=0.01)
    (param,) = first.param_groups[0]["params"]
    param.grad = torch.ones(300).to_sparse() if name == "SparseAdam" else torch.ones(300)
    first.step()
    second = small([torch.nn.Parameter(param.detach().clone())], moments="8bit")
    second.load_state_dict(first.state_dict())
    (state,) = second.state.values()
    assert list(state) == ["step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"]
    torch.testing.assert_close(moment_of(state, "exp_avg"), torch.full((300,), 0.1), rtol=0.07, atol=0)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_small_states_become_float32(choice):
    first = trained(choice)
    dtype = dtype_of(choice)
    other = {"master": "float32"} if "master" in choice else {}
    second = another(first, {}, moments="float32", float32_for=None, **other)
    second.load_state_dict(first.state_dict())
    for param, mine in zip(first.state, second.state, strict=True):
        state, found = first.state[param], second.state[mine]
        assert list(found) == ["step", "exp_avg", "exp_avg_sq", *other]
        for key in CODES:
            assert found[key].dtype == torch.float32
            assert torch.equal(found[key], moment_of(state, key))
        if "master" in choice:
            assert torch.equal(found["master"], value_of(param, state))
    params = second.param_groups[0]["params"]
    before = [param.detach().clone() for param in params]
    run(second, range(4, 5))
    assert not torch.equal(before[0], params[0])
    if "master" not in choice and dtype == torch.float32:
        plain = torch.optim.Adam([torch.nn.Parameter(param) for param in before], lr=0.01)
        again = fastadam.torch.Adam(parameters(*SHAPES, dtype=torch.float32))
        again.load_state_dict(first.state_dict())
        plain.load_state_dict(again.state_dict())
        run(plain, range(4, 5))
        for a, b in zip(plain.param_groups[0]["params"], params, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("to", ["8bit", "bfloat16"])
def test_small_states_become_others_by_way_of_float32(to):
    first = trained({"moments": "8bit" if to == "bfloat16" else "bfloat16"})
    second = another(first, {"moments": to})
    second.load_state_dict(first.state_dict())
    for param, mine in zip(first.state, second.state, strict=True):
        for key in CODES:
            expected = moment_of(first.state[param], key)
            found = moment_of(second.state[mine], key)
            spacing = 2**-3 * expected.abs() + 2**-7 * expected.abs().max()
            assert ((found - expected).abs() <= spacing).all()
    run(second, range(4, 6))


def test_16_bit_moments_of_a_half_model_become_small_and_wide():
    first = torch.optim.Adam(parameters((300,), dtype=torch.bfloat16), lr=0.01)
    run(first, range(2))
    same, coded = (small(parameters((300,), dtype=torch.bfloat16), moments=m) for m in ("bfloat16", "8bit"))
    for each in (same, coded):
        each.load_state_dict(first.state_dict())
    assert torch.equal(*(next(iter(each.values()))["exp_avg"] for each in (same.state, first.state)))
    assert next(iter(coded.state.values()))["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("to", ["split", "float32"])
def test_masters_change_their_format(to, tie):
    """The exact value, but for the last bit of values halfway between two parameters, of which both formats choose one."""
    choice = {"master": "float32" if to == "split" else "split", "float32_for": None}
    first = trained(choice)
    if tie:
        make_ties(first)
    second = another(first, {"master": to, "float32_for": None})
    second.load_state_dict(first.state_dict())
    for param, mine in zip(first.state, second.state, strict=True):
        before, after = value_of(param, first.state[param]), value_of(mine, second.state[mine])
        difference = (before.contiguous().view(torch.int32) - after.contiguous().view(torch.int32)).abs()
        assert difference.max() <= (1 if tie else 0)
        assert torch.equal(param, mine)
    expected = [param.detach().clone() for param in first.state]
    for optimizer in (first, second):
        optimizer.param_groups[0]["lr"] = 0.0
        run(optimizer, range(4, 5))
        assert all(map(torch.equal, expected, optimizer.state))


def make_ties(optimizer):
    """Give masters values halfway between even and odd parameters."""
    for param, state in optimizer.state.items():
        with torch.no_grad():
            if "master" in state:
                bits = state["master"].view(torch.int32)
                bits.copy_((bits & ~0xFFFF) | 0x8000)
                param.copy_(state["master"])
            else:
                state["master_low"].fill_(-0x8000)


def test_a_state_without_masters_gets_split_ones():
    first = torch.optim.AdamW(parameters((300,), dtype=torch.bfloat16), lr=0.01)
    run(first, range(2))
    second = fastadam.torch.AdamW([torch.nn.Parameter(p.detach().clone()) for p in first.state], master="split")
    second.load_state_dict(first.state_dict())
    run(second, range(2, 4))
    (state,) = second.state.values()
    assert state["exp_avg"].dtype == torch.float32
    assert state["master_low"].any()


def test_low_halves_that_nobody_needs_are_not_loaded():
    first = trained({"moments": "8bit", "master": "split"})
    second = another(first, {"moments": "8bit"})
    second.load_state_dict(first.state_dict())
    assert all("master_low" not in state and "master" not in state for state in second.state.values())


def test_codes_are_brought_into_the_order_of_the_parameter():
    first = small([torch.nn.Parameter(torch.randn(40, 30))], moments="8bit")
    run(first, range(3))
    (param,) = first.param_groups[0]["params"]
    second = small([torch.nn.Parameter(param.detach().t().contiguous().t())], moments="8bit")
    second.load_state_dict(first.state_dict())
    (mine,) = second.param_groups[0]["params"]
    for key in CODES:
        expected, found = moment_of(first.state[param], key), moment_of(second.state[mine], key)
        assert found.stride() == mine.stride() == (1, 40)
        assert ((found - expected).abs() <= 2**-3 * expected.abs() + 2**-8 * expected.abs().max()).all()
    run(second, range(3, 5))


def test_the_rule_for_float32_counts_when_a_state_is_loaded():
    first = trained({"moments": "8bit"})
    second = another(first, {"moments": "8bit", "float32_for": 500})
    second.load_state_dict(first.state_dict())
    assert [state["exp_avg"].dtype for state in second.state.values()] == [torch.float32, torch.uint8, torch.float32]


# ---- refusals --------------------------------------------------------------------------------------------------------


def without(*names):
    def change(saved):
        for name in names:
            del saved["state"][0][name]

    return change


def put(name, make):
    def change(saved):
        state = saved["state"][0]
        state[name] = make(state[name])

    return change


def put_scale(value):
    def make(scales):
        scales = scales.clone()
        scales[1] = value
        return scales

    return put("exp_avg_scale", make)


UNUSABLE = {
    "no scales": (
        without("exp_avg_scale", "exp_avg_sq_scale"),
        "without 'exp_avg_scale', 'exp_avg_sq_scale', expected .*, as 8-bit moments of fastadam have them",
    ),
    "no v scale": (without("exp_avg_sq_scale"), "without 'exp_avg_sq_scale', expected"),
    "no v": (without("exp_avg_sq"), "without 'exp_avg_sq', expected step, exp_avg and exp_avg_sq"),
    "no step": (without("step"), "without 'step', expected step, exp_avg and exp_avg_sq"),
    "a short scale": (put("exp_avg_scale", lambda s: s[:-1]), r"exp_avg_scale: shape \(2,\), expected \(3,\)"),
    "another block": (put("exp_avg_scale", lambda s: s.repeat(2)), r"exp_avg_scale: shape \(6,\), expected \(3,\)"),
    "float scales": (put("exp_avg_sq_scale", lambda s: s.float()), "exp_avg_sq_scale: torch.float32, expected torch.uint8"),
    "scales that are a list": (put("exp_avg_sq_scale", lambda s: s.tolist()), "exp_avg_sq_scale: list, expected a tensor"),
    "scale 1": (put_scale(1), "exp_avg_scale: 1 at 1, expected 0, 35 to 253 or 255"),
    "scale 34": (put_scale(34), "exp_avg_scale: 34 at 1, expected 0, 35 to 253 or 255"),
    "scale 254": (put_scale(254), "exp_avg_scale: 254 at 1, expected 0, 35 to 253 or 255"),
    "codes of int8": (put("exp_avg", lambda c: c.to(torch.int8)), "exp_avg: torch.int8, expected torch.uint8"),
    "codes of another shape": (put("exp_avg_sq", lambda c: c[1:]), r"exp_avg_sq: shape \(39, 7\), expected \(40, 7\)"),
    "codes without data": (put("exp_avg_sq", lambda c: c.to("meta")), "exp_avg_sq: on meta, without data, expected"),
    "sparse codes": (put("exp_avg_sq", lambda c: c.to_sparse()), "exp_avg_sq: torch.sparse_coo, expected a dense tensor"),
    "a low half of int32": (put("master_low", lambda c: c.int()), "master_low: torch.int32, expected torch.int16"),
    "a flat low half": (put("master_low", lambda c: c.flatten()), r"master_low: shape \(280,\), expected \(40, 7\)"),
    "a low half in words": (put("master_low", lambda _: "none"), "master_low: str, expected a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("same", [True, False], ids=["same choice", "float32"])
def test_a_state_that_cannot_be_used_is_refused_and_changes_nothing(kind, same):
    change, message = UNUSABLE[kind]
    choice = {"moments": "8bit", "master": "split"}
    first = trained(choice)
    saved = copy.deepcopy(first.state_dict())
    change(saved)
    ours = trained(choice if same else {"master": "float32", "float32_for": None}, steps=2)
    before = copy.deepcopy(ours)
    with pytest.raises((TypeError, ValueError), match=f"state of param_groups.*{message}"):
        ours.load_state_dict(saved)
    check_equal(ours, before)
    run(ours, range(2, 4))
    run(before, range(2, 4))
    check_equal(ours, before)


FOREIGN = {
    "bitsandbytes": (
        {"state1": torch.zeros(300, dtype=torch.uint8), "step": 3},
        "'state2', 'qmap1', 'qmap2', 'absmax1', 'absmax2', expected step, state1, state2, qmap1",
    ),
    "half of ours": ({"step": 3, "exp_avg": torch.zeros(300)}, "'exp_avg_sq', expected step, exp_avg and exp_avg_sq"),
    "SGD": ({"momentum_buffer": torch.zeros(300)}, "'step', 'exp_avg', 'exp_avg_sq', expected step, exp_avg and exp_"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_states_of_others_are_refused_with_the_missing_keys(kind):
    state, missing = FOREIGN[kind]
    ours = small(parameters((300,), dtype=torch.float32), moments="8bit")
    run(ours, range(2))
    before = copy.deepcopy(ours)
    saved = {**ours.state_dict(), "state": {0: state}}
    with pytest.raises(ValueError, match=f"without {missing}"):
        ours.load_state_dict(saved)
    check_equal(ours, before)


def test_amsgrad_is_refused_at_load():
    first = torch.optim.Adam(parameters((300,), dtype=torch.float32), amsgrad=True)
    run(first, range(2))
    ours = small(parameters((300,), dtype=torch.float32), moments="8bit")
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]: amsgrad: True, expected False as the optimizer has moments"
    ):
        ours.load_state_dict(first.state_dict())
    assert ours.param_groups[0]["amsgrad"] is False
    assert not ours.state
    rounded = small(parameters((300,), dtype=torch.float32), moments="bfloat16")
    rounded.load_state_dict(first.state_dict())
    assert next(iter(rounded.state.values()))["max_exp_avg_sq"].dtype == torch.bfloat16
    run(rounded, range(2, 4))


@pytest.mark.parametrize("seed", [-1, 2**64, "x"])
def test_a_saved_seed_is_checked(seed):
    ours = trained({"moments": "8bit"})
    saved = ours.state_dict()
    saved["param_groups"][0]["seed"] = seed
    with pytest.raises((TypeError, ValueError), match=r"state_dict: param_groups\[0\]: seed: "):
        ours.load_state_dict(saved)
    assert ours.param_groups[0]["seed"] == SEED


def test_an_optimizer_that_an_older_version_pickled_keeps_its_moments_and_masters():
    opt = fastadam.torch.Adam(parameters((2,), dtype=torch.bfloat16))
    state = opt.__getstate__()
    options = object.__new__(type(opt._options))
    older = {k: v for k, v in vars(opt._options).items() if k != "float32_rule"}
    options.__setstate__({**older, "moments_dtype": torch.float32, "master_weights": True})
    fresh = object.__new__(fastadam.torch.Adam)
    fresh.__setstate__({**state, "_options": options})
    assert fresh.master_weights
    assert [fresh.param_groups[0][name] for name in ("moments", "master")] == ["float32", "float32"]
    run(fresh, range(2))
    assert next(iter(fresh.state.values()))["master"].dtype == torch.float32
