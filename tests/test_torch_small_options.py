"""Smaller states in fastadam.torch: which parameters get them, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from test_torch_small import check_equal, give_gradients, small  # noqa: E402
from torch_twins import parameters  # noqa: E402

# ---- which parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (None, [True, False, False]),
        (0, [False, False, False]),
        (5000, [True, True, False]),
        (lambda name, shape: len(shape) == 1, [True, False, False]),
        (lambda name, shape: name == "big", [False, False, True]),
        (["^med", "bias"], [True, True, False]),
        ([], [False, False, False]),
    ],
    ids=["default", "0", "5000", "shape", "name", "patterns", "no patterns"],
)
@pytest.mark.parametrize("moments", ["8bit", "bfloat16"])
def test_float32_for_says_which_parameters_keep_float32(rule, expected, moments):
    params = dict(
        zip(("bias", "medium", "big"), parameters((4095,), (64, 64), (100, 100), dtype=torch.float32), strict=True)
    )
    tested = fastadam.torch.AdamW(params.items(), moments=moments, float32_for=rule)
    give_gradients(params.values(), 0)
    tested.step()
    assert [tested.state[param]["exp_avg"].dtype == torch.float32 for param in params.values()] == expected


def test_parameters_that_cannot_be_small_keep_moments_of_their_dtype():
    params = [
        torch.nn.Parameter(torch.ones(5000, dtype=dtype)) for dtype in (torch.float64, torch.complex64, torch.float32)
    ]
    tested = fastadam.torch.Adam(params, moments="8bit")
    for param in params:
        param.grad = torch.ones_like(param)
    tested.step()
    assert [tested.state[param]["exp_avg"].dtype for param in params] == [torch.float64, torch.complex64, torch.uint8]


def table(sparse_update="dense", **options):
    torch.manual_seed(0)
    words = torch.nn.Embedding(1000, 8, sparse=True).to(options.pop("dtype", torch.float32))
    optimizer = fastadam.torch.Adam(words.parameters(), sparse_update=sparse_update, **options)
    return words, optimizer


def look_up(words, optimizer, ids=(1, 5, 5)):
    optimizer.zero_grad()
    words(torch.tensor(ids)).float().square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
@pytest.mark.parametrize("moments", ["8bit", "bfloat16"])
def test_a_table_keeps_float32_moments(mode, moments):
    words, optimizer = table(mode, moments=moments)
    plain_words, plain = table(mode)
    for _ in range(3):
        look_up(words, optimizer)
        look_up(plain_words, plain)
    for each in (optimizer, plain):
        each.sync()
    assert optimizer.state[words.weight]["exp_avg"].dtype == torch.float32
    assert torch.equal(words.weight, plain_words.weight)


@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_a_table_of_a_model_with_split_masters_has_a_float32_master(mode):
    words, optimizer = table(mode, master="split", dtype=torch.bfloat16)
    look_up(words, optimizer)
    state = optimizer.state[words.weight]
    assert state["master"].dtype == torch.float32
    assert "master_low" not in state
    resumed_words, resumed = table(mode, master="split", dtype=torch.bfloat16)
    resumed_words.load_state_dict(words.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        look_up(words, optimizer)
        look_up(resumed_words, resumed)
    check_equal(optimizer, resumed)


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"moments": "8bit"}, "sparse with moments='8bit', expected dense gradients, or float32_for= that names"),
        ({"moments": "bfloat16"}, "sparse with moments='bfloat16', expected dense gradients, or float32_for="),
        ({"master": "split"}, "sparse with master='split', expected dense gradients, or master='float32'"),
    ],
    ids=str,
)
def test_a_sparse_gradient_after_dense_ones_is_refused(mode, options, text):
    if mode == "deferred" and "master" in options:
        return
    words, optimizer = table(mode, dtype=torch.bfloat16 if "master" in options else torch.float32, **options)
    words.weight.grad = torch.ones_like(words.weight)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()), words.weight.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"grad of param_groups.*: {text}"):
            look_up(words, optimizer)
    assert torch.equal(words.weight, before[1])
    for key, value in before[0]["state"][0].items():
        assert torch.equal(optimizer.state[words.weight][key], value)


def test_stochastic_rounding_takes_sparse_gradients_where_every_row_moves():
    words, optimizer = table(stochastic_rounding=True, dtype=torch.bfloat16)
    look_up(words, optimizer)
    look_up(words, optimizer)
    words, optimizer = table("lazy", stochastic_rounding=True, moments="float32", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="sparse with sparse_update='lazy' and with stochastic_rounding=True"):
        look_up(words, optimizer)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"moments": "int8"}, ValueError, "moments: 'int8', expected 'float32', 'bfloat16', '8bit' or None"),
        ({"moments": 8}, TypeError, "moments: 8, expected"),
        ({"master": "float16"}, ValueError, "master: 'float16', expected 'float32', 'split' or None"),
        ({"master": True}, TypeError, "master: True, expected"),
        ({"master": "split", "master_weights": True}, ValueError, "master_weights: True with master='split', expected"),
        ({"stochastic_rounding": 1}, TypeError, "stochastic_rounding: 1, expected True or False"),
        ({"stochastic_rounding": True, "master": "split"}, ValueError, "stochastic_rounding: True with master='split'"),
        ({"stochastic_rounding": True, "master_weights": True}, ValueError, "stochastic_rounding: True with master='float"),
        ({"amsgrad": True, "moments": "8bit"}, ValueError, "amsgrad: True with moments='8bit', .*; expected moments='b"),
        ({"master": "split", "sparse_update": "deferred"}, ValueError, "master: 'split' with sparse_update='deferred'"),
        ({"seed": -1, "moments": "8bit"}, ValueError, r"seed: -1, expected an integer from 0 to 2\*\*64 - 1"),
        ({"seed": 2**64, "moments": "8bit"}, ValueError, "seed: 18446744073709551616, expected an integer from 0"),
        ({"seed": 1.0, "moments": "8bit"}, TypeError, "seed: 1.0, expected an integer"),
        ({"float32_for": 0}, ValueError, "float32_for: given with moments=None, expected moments='bfloat16' or '8bit'"),
        ({"float32_for": -1, "moments": "8bit"}, ValueError, "float32_for: -1, expected a number of elements, a function"),
        ({"float32_for": 1.5, "moments": "8bit"}, TypeError, "float32_for: 1.5, expected a number of elements"),
        ({"float32_for": True, "moments": "8bit"}, TypeError, "float32_for: True, expected a number of elements"),
        ({"float32_for": "bias", "moments": "8bit"}, TypeError, "float32_for: str, expected a number of elements"),
        ({"float32_for": [3], "moments": "8bit"}, ValueError, r"float32_for\[0\]: 3, expected a pattern"),
        ({"float32_for": ["("], "moments": "8bit"}, ValueError, r"float32_for\[0\]: '\(', expected a pattern"),
        ({"float32_for": ["bias"], "moments": "8bit"}, ValueError, "float32_for: patterns of names with parameters without"),
        ({"moments_dtype": torch.float32}, TypeError, "moments_dtype; did you mean moments?"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cls", [fastadam.torch.Adam, fastadam.torch.AdamW])
def test_options_that_are_refused(cls, options, error, text):
    with pytest.raises(error, match=text):
        cls([torch.nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"moments": "4bit"}, ValueError, "moments: '4bit', expected"),
        ({"master": "both"}, ValueError, "master: 'both', expected"),
        ({"amsgrad": True}, ValueError, "amsgrad: True with moments='8bit'"),
        ({"seed": -3}, ValueError, "seed: -3, expected"),
        ({"stochastic_rounding": "yes"}, TypeError, "stochastic_rounding: 'yes', expected"),
    ],
)
def test_options_of_a_group_that_are_refused(options, error, text):
    first, second = parameters((4,), (4,), dtype=torch.float32)
    with pytest.raises(error, match=text):
        fastadam.torch.Adam([{"params": [first], **options}], moments="8bit")
    tested = small([first], moments="8bit")
    with pytest.raises(error, match=text):
        tested.add_param_group({"params": [second], **options})
    assert len(tested.param_groups) == 1
    give_gradients([first], 0)
    tested.step()
    before = first.detach().clone()
    tested.param_groups[0].update(options)
    with pytest.raises(error, match=text):
        tested.step()
    assert torch.equal(first, before)


@pytest.mark.parametrize("value", [3, True, b"8bit", torch.uint8, ["8bit"], torch.ones(2), len], ids=str)
@pytest.mark.parametrize("name", ["moments", "master", "stochastic_rounding"])
@pytest.mark.parametrize("of", ["optimizer", "group", "changed group"])
def test_options_of_the_wrong_type_are_refused_by_their_names(of, name, value):
    if name == "stochastic_rounding" and value is True:
        value = "yes"
    (param,) = parameters((4,), dtype=torch.bfloat16)
    tested = fastadam.torch.Adam([param], moments="bfloat16", float32_for=0)
    give_gradients([param], 0)
    tested.step()
    before = param.detach().clone()

    def give():
        if of == "optimizer":
            fastadam.torch.Adam([param], **{name: value})
        elif of == "group":
            fastadam.torch.Adam([{"params": [param], name: value}])
        else:
            tested.param_groups[0][name] = value
            tested.step()

    with pytest.raises(TypeError, match=f"^{name}: "):
        give()
    assert torch.equal(param, before)


@pytest.mark.parametrize("begun", [{}, {"moments": "8bit"}, {"moments": "float32"}, {"master": "split"}], ids=str)
@pytest.mark.parametrize("change", [{"moments": "bfloat16"}, {"master": "float32"}], ids=str)
def test_a_format_that_is_changed_after_the_first_step_is_refused(begun, change):
    """States stay in their format, so that the option would be ignored."""
    (param,) = parameters((5000,), dtype=torch.bfloat16)
    tested = fastadam.torch.Adam([param], lr=0.1, **begun)
    tested.param_groups[0].update(change)  # before the first step it is taken
    give_gradients([param], 0)
    tested.step()
    tested.step()
    assert ("master" in tested.state[param]) == (change == {"master": "float32"})
    kept, before = {**tested.param_groups[0]}, param.detach().clone()
    ((name, value),) = change.items()
    tested.param_groups[0][name] = begun.get(name)
    with pytest.raises(
        ValueError, match=rf"param_groups\[0\]: {name}: {begun.get(name)!r}, expected '{value}' as when"
    ):
        tested.step()
    assert torch.equal(param, before)
    tested.param_groups[0].update(kept)
    tested.step()
    assert not torch.equal(param, before)


def test_stochastic_rounding_may_be_switched_on_and_off():
    params = parameters((500,), dtype=torch.bfloat16)
    twins = copy.deepcopy(params)
    tested, plain = fastadam.torch.Adam(params, lr=1e-3, seed=3), fastadam.torch.Adam(twins, lr=1e-3)
    for k, rounds in enumerate([False, False, True, True, False]):
        tested.param_groups[0]["stochastic_rounding"] = rounds
        for optimizer, group in ((tested, params), (plain, twins)):
            give_gradients(group, k)
            optimizer.step()
        assert torch.equal(params[0], twins[0]) == (k < 2)


def test_options_of_numpy_are_saved_as_plain_values(tmp_path):
    (param,) = parameters((4,), dtype=torch.bfloat16)
    options = {"moments": np.str_("8bit"), "stochastic_rounding": np.bool_(True), "seed": np.uint64(2**64 - 1)}
    for group in ({"params": [param], **options}, {"params": [param]}):
        tested = fastadam.torch.Adam([group], **(options if len(group) == 1 else {}), float32_for=None)
        torch.save(tested.state_dict(), tmp_path / "saved.pt")
        saved = torch.load(tmp_path / "saved.pt", weights_only=True)["param_groups"][0]
        assert {name: saved[name] for name in options} == options


@pytest.mark.parametrize("name", ["float32_for", "global_clipnorm", "telemetry", "sparse_update"])
def test_an_option_of_the_optimizer_is_refused_in_a_group(name):
    first, second = parameters((4,), (4,), dtype=torch.float32)
    with pytest.raises(ValueError, match=f"^{name}: in a parameter group, expected it as an argument of the optimizer"):
        fastadam.torch.Adam([{"params": [first], name: 1}])
    tested = fastadam.torch.Adam([first])
    with pytest.raises(ValueError, match=f"^{name}: in a parameter group"):
        tested.add_param_group({"params": [second], name: 1})
    assert len(tested.param_groups) == 1


def test_float32_for_must_answer_true_or_false():
    (param,) = parameters((5000,), dtype=torch.float32)
    tested = fastadam.torch.Adam([param], moments="8bit", float32_for=lambda name, shape: None)
    give_gradients([param], 0)
    with pytest.raises(TypeError, match="float32_for: None, expected True or False"):
        tested.step()
    assert not tested.state


def test_a_float16_parameter_cannot_be_split():
    (param,) = parameters((4,), dtype=torch.float16)
    tested = fastadam.torch.Adam([param], master="split")
    param.grad = torch.ones_like(param)
    with pytest.raises(
        TypeError, match=r"master: 'split' with .*\[0\] of torch.float16, expected bfloat16 parameters, or"
    ):
        tested.step()
    assert not tested.state


def test_a_split_parameter_that_becomes_float16_is_refused():
    (param,) = parameters((4,), dtype=torch.bfloat16)
    tested = fastadam.torch.Adam([param], master="split")
    give_gradients([param], 0)
    tested.step()
    param.data = param.data.half()  # as model.half() does
    give_gradients([param], 1)
    with pytest.raises(TypeError, match=r"master: 'split' with .*\[0\] of torch.float16, expected bfloat16 parameters"):
        tested.step()


def test_patterns_that_name_nothing_are_warned_of_once():
    named = [("weight", torch.nn.Parameter(torch.ones(2)))]
    with pytest.warns(
        UserWarning, match="float32_for: 'embd' names none of the parameters; compare model.named_param"
    ) as found:
        fastadam.torch.Adam(named, moments="8bit", float32_for=["weight", "embd"])
    assert [each.filename for each in found] == [__file__]


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "master_low"])
@pytest.mark.parametrize("wrong", ["shape", "dtype", "kind", "shared"])
def test_a_state_that_was_spoilt_is_refused(key, wrong):
    params = parameters((300,), (300,), dtype=torch.bfloat16)
    tested = small(params, moments="8bit", master="split")
    give_gradients(params, 0)
    tested.step()
    first, second = (tested.state[param] for param in params)
    good = first[key]
    first[key] = {"shape": good[:-1], "dtype": good.to(torch.float64), "kind": "text", "shared": second[key]}[wrong]
    before = [param.detach().clone() for param in params]
    give_gradients(params, 1)
    with pytest.raises((TypeError, ValueError), match=key if wrong != "shared" else "share|overlap"):
        tested.step()
    assert all(map(torch.equal, params, before))
    first[key] = good
    tested.step()


def test_codes_in_another_order_than_their_parameter_are_refused():
    params = [torch.nn.Parameter(torch.ones(40, 30))]
    tested = small(params, moments="8bit")
    give_gradients(params, 0)
    tested.step()
    params[0].data = params[0].data.t().contiguous().t()
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(
        ValueError, match=r"exp_avg: strides \(30, 1\) with a parameter of strides \(1, 40\), expected codes"
    ):
        tested.step()
    tested.load_state_dict(tested.state_dict())
    tested.step()


def test_attributes_belong_to_the_groups():
    tested = small(parameters((4,)), moments="8bit")
    for name in ("moments", "master", "stochastic_rounding", "seed"):
        with pytest.raises(AttributeError, match=rf"expected group\['{name}'\]"):
            getattr(tested, name)


def test_parameters_without_memory_get_states_without_memory():
    param = torch.nn.Parameter(torch.empty(5000, dtype=torch.bfloat16, device="meta"))
    tested = fastadam.torch.Adam([param], moments="8bit", master="split")
    param.grad = torch.empty_like(param)
    tested.step()
    state = tested.state[param]
    assert {key: (value.dtype, len(value), value.is_meta) for key, value in state.items() if key != "step"} == {
        "exp_avg": (torch.uint8, 5000, True),
        "exp_avg_sq": (torch.uint8, 5000, True),
        "exp_avg_scale": (torch.uint8, 40, True),
        "exp_avg_sq_scale": (torch.uint8, 40, True),
        "master_low": (torch.int16, 5000, True),
    }
