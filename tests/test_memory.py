"""`fastadam.memory` and the command: exact bytes, held and moved, of each choice and of optimizers as they are."""

from __future__ import annotations

import copy
import pickle

import fastadam
import numpy as np
import pytest
from fastadam.__main__ import main
from helpers import run_python

F32 = np.float32
LARGE = 2**20

# Per parameter, of one large tensor with gradients like the parameters: held, moved.
SCALES = 2 / 128  # two bytes for 128 elements
HELD_AND_MOVED = {
    "float32": (16, 28),
    "float32 master, bfloat16 copy": (16, 28),
    "bfloat16 moments": (12, 20),
    "split master, bfloat16 moments": (10, 18),
    "8-bit moments": (10 + SCALES, 16 + 2 * SCALES),
    "split master, 8-bit moments": (8 + SCALES, 14 + 2 * SCALES),
    "bfloat16, bfloat16 moments": (8, 14),
    "bfloat16, 8-bit moments": (6 + SCALES, 10 + 2 * SCALES),
}


def each(row):
    return row.held / row.size, row.moved / row.size


def test_bytes_per_parameter_of_every_choice():
    assert {row.name: each(row) for row in fastadam.memory(LARGE)} == HELD_AND_MOVED


def test_a_gradient_counts_in_its_own_dtype():
    for dtype, item in (("float32", 4), ("bfloat16", 2)):
        rows = fastadam.memory(LARGE, gradients=dtype)
        assert {row.gradients for row in rows} == {item * LARGE}
        for row, (held, moved) in zip(rows, HELD_AND_MOVED.values(), strict=True):
            natural = row.parameters / LARGE
            assert each(row) == (held - natural + item, moved - natural + item)
    by_name = {row.name: row for row in fastadam.memory(LARGE, gradients="float32")}
    assert each(by_name["float32 master, bfloat16 copy"]) == (18, 30)
    state = by_name["split master, 8-bit moments"]
    assert (state.held - state.gradients) / LARGE == 6.015625


def test_every_row_is_the_sum_of_its_parts():
    for amsgrad in (False, True):
        for use_ema in (False, True):
            for row in fastadam.memory([(5000,), (3,), (128, 40)], amsgrad=amsgrad, use_ema=use_ema):
                parts = row.parameters, row.master, row.moments, row.scales, row.average, row.gradients
                assert row.held == sum(parts)
                assert row.seconds == row.moved / 50e9


def test_amsgrad_and_averages_add_their_bytes_and_leave_out_what_does_not_exist():
    plain = {row.name: each(row) for row in fastadam.memory(LARGE)}
    ams = {row.name: each(row) for row in fastadam.memory(LARGE, amsgrad=True)}
    assert ams.keys() == {name for name in plain if "8-bit" not in name}
    assert ams["float32"] == (20, 36)
    assert ams["split master, bfloat16 moments"] == (12, 22)
    ema = {row.name: each(row) for row in fastadam.memory(LARGE, use_ema=True)}
    assert ema.keys() == {name for name in plain if "split" not in name}
    assert all(ema[name] == (plain[name][0] + 4, plain[name][1] + 8) for name in ema)
    assert "average" in repr(fastadam.memory(LARGE, use_ema=True))


def test_small_tensors_keep_float32_moments_and_a_part_of_a_block_has_a_scale():
    rows = {row.name: row for row in fastadam.memory([4095, (4096,), np.zeros((50, 100), F32)])}
    eight = rows["8-bit moments"]
    assert eight.size == 4095 + 4096 + 5000
    assert eight.moments == 2 * (4 * 4095 + 4096 + 5000)
    assert eight.scales == 2 * (32 + 40)
    assert rows["bfloat16 moments"].moments == 2 * (4 * 4095 + 2 * 4096 + 2 * 5000)


def test_time_follows_the_bandwidth():
    slow, fast = (fastadam.memory(LARGE, bandwidth=b) for b in (1e9, 100e9))
    assert [row.seconds for row in slow] == [row.moved / 1e9 for row in slow]
    assert fast[0].seconds == 28 * LARGE / 100e9
    assert "that at 100 GB/s" in repr(fast)


def test_a_table_prints_well_and_survives_a_copy():
    table = fastadam.memory(7 * 10**9)
    lines = str(table).splitlines()
    assert lines[0].split() == [
        "parameter",
        "master",
        "moments",
        "scales",
        "gradient",
        "held",
        "in",
        "all",
        "moved",
        "step",
    ]
    assert lines[1].split() == ["float32", "4", "0", "8", "0", "4", "16", "104.3", "GiB", "28", "3.92", "s"]
    assert lines[6].endswith("2         2         2    0.0156         2    8.0156  52.3 GiB   14.0312    1.96 s")
    assert lines[-1].startswith("7,000,000,000 parameters")
    assert {len(line) for line in lines[1:-1]} == {len(lines[1])}
    for again in (pickle.loads(pickle.dumps(table)), copy.deepcopy(table)):
        assert (again, again.bandwidth, str(again)) == (table, table.bandwidth, str(table))


# ---- optimizers as they are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "moments", "average"), [({}, 8, 0), ({"amsgrad": True}, 12, 0), ({"use_ema": True}, 8, 4)]
)
def test_an_optimizer_of_the_core_counts_what_it_holds(options, moments, average):
    variables = [np.zeros((100, 50), F32), np.zeros(7, F32)]
    optimizer = fastadam.Adam(**options)
    optimizer.apply_gradients([(np.ones_like(w), w) for w in variables])
    row = fastadam.memory(optimizer)[0]
    assert (row.name, row.options, row.size) == ("Adam", "as it is", 5007)
    assert (row.parameters, row.moments, row.average) == (4 * 5007, moments * 5007, average * 5007)
    assert row.moments + row.average == sum(array.nbytes for array in optimizer.weights[1:])
    assert (row.gradients, row.moved) == (4 * 5007, (2 * (4 + moments + average) + 4) * 5007)
    assert fastadam.memory(optimizer, gradients="bfloat16")[0].gradients == 2 * 5007


def test_the_other_rows_are_for_the_parameters_of_the_optimizer():
    variables = [np.zeros(5000, F32), np.zeros(7, F32)]
    optimizer = fastadam.AdamW()
    optimizer.build(variables)
    assert fastadam.memory(optimizer)[1:] == tuple(fastadam.memory(variables))


def test_half_and_double_variables_and_accumulators_count():
    import ml_dtypes

    optimizer = fastadam.Adam(gradient_accumulation_steps=2)
    variables = [np.zeros(10, ml_dtypes.bfloat16), np.zeros(3, np.float64), np.zeros(5, np.float16)]
    optimizer.apply_gradients([(np.ones_like(w), w) for w in variables])
    row, slots = fastadam.memory(optimizer)[0], optimizer.weights[1:]
    accumulators = [slot for slot in slots if slot.nbytes][-len(variables) :]
    assert row.parameters == 20 + 24 + 10
    assert row.moments + sum(a.nbytes for a in accumulators) == sum(array.nbytes for array in slots)
    assert row.gradients == row.parameters + sum(a.nbytes for a in accumulators)


def test_a_wrapper_is_counted_as_what_it_wraps():
    inner = fastadam.Adam()
    inner.build([np.zeros(10, F32)])
    assert fastadam.memory(fastadam.LossScaleOptimizer(inner)) == fastadam.memory(inner)


def test_an_optimizer_of_pytorch_counts_what_it_holds():
    torch = pytest.importorskip("torch")
    import fastadam.torch

    params = [torch.nn.Parameter(torch.zeros(100, 50)), torch.nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))]
    for cls in (fastadam.torch.AdamW, torch.optim.AdamW):
        optimizer = cls(params)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        row = fastadam.memory(optimizer)[0]
        assert (row.name, row.size, row.parameters) == ("AdamW", 5007, 20014)
        assert (row.moments, row.master, row.gradients) == (40028, 0, 20014)
        optimizer.zero_grad()
        assert fastadam.memory(optimizer)[0].gradients == 20014  # of a step, if there are none


def test_masters_copies_and_8_bit_states_of_pytorch_count():
    torch = pytest.importorskip("torch")
    import fastadam.torch

    param = torch.nn.Parameter(torch.zeros(5000, dtype=torch.bfloat16))
    optimizer = fastadam.torch.AdamW([param], master_weights=True)
    param.grad = torch.ones_like(param)
    optimizer.step()
    row = fastadam.memory(optimizer)[0]
    assert (row.parameters, row.master, row.moments, row.moved) == (10000, 20000, 40000, 28 * 5000)
    master, computed = torch.nn.Parameter(torch.zeros(5000)), torch.zeros(5000, dtype=torch.bfloat16)
    optimizer = fastadam.torch.AdamW([{"params": [master], "compute_params": [computed]}])
    master.grad = torch.ones(5000)
    optimizer.step()
    row = fastadam.memory(optimizer)[0]
    assert (row.parameters, row.master, row.moments, row.moved) == (10000, 20000, 40000, 30 * 5000)
    state = optimizer.state[master]
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros(5000, dtype=torch.uint8)
        state[f"{name}_scale"] = torch.zeros(40, dtype=torch.uint8)
    state["master_low"] = torch.zeros(5000, dtype=torch.int16)
    row = fastadam.memory(optimizer)[0]
    assert (row.moments, row.scales, row.master) == (10000, 80, 30000)


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "optimizer_or_shapes: NoneType, expected an optimizer, a list of shapes or arrays, or a number"),
        ("adam", "optimizer_or_shapes: str, expected"),
        (7.5, "optimizer_or_shapes: float, expected"),
        (np.zeros(3, F32), "optimizer_or_shapes: ndarray, expected an optimizer, a list"),
        ({"w": (3,)}, "optimizer_or_shapes: dict, expected"),
        ([(3,), "w"], r"optimizer_or_shapes\[1\]: str, expected a shape, an array or a number"),
        ([(3, -1)], r"optimizer_or_shapes\[0\]: \(3, -1\), expected whole numbers >= 0"),
        ([(3, 1.5)], r"optimizer_or_shapes\[0\]: 1.5, expected a shape, an array or a number"),
        ([(3, True)], r"optimizer_or_shapes\[0\]: True, expected a shape, an array or a number"),
        ([True], r"optimizer_or_shapes\[0\]: True, expected a shape, an array or a number"),
        ([("kernel", "x")], r"optimizer_or_shapes\[0\]: tuple, expected a shape, an array or a number"),
        (10**30, "optimizer_or_shapes: 10{30}, expected an integer below 2"),
        ([], "optimizer_or_shapes: no elements, expected at least one"),
        ([(0, 4)], "optimizer_or_shapes: no elements"),
        (0, "optimizer_or_shapes: 0, expected an integer of at least 1"),
        (fastadam.Adam(), r"optimizer: without variables, expected it after build\(\) or its first step"),
    ],
)
def test_what_has_no_size_is_refused(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fastadam.memory(given)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"gradients": "float16"}, "gradients: 'float16', expected 'float32', 'bfloat16' or None"),
        ({"gradients": 4}, "gradients: 4, expected 'float32'"),
        ({"gradients": np.ones(2)}, "gradients: array.*, expected 'float32'"),
        ({"amsgrad": 1}, "amsgrad: "),
        ({"use_ema": "yes"}, "use_ema: "),
        ({"bandwidth": 0}, "bandwidth: 0.0, expected a positive number of bytes"),
        ({"bandwidth": -1.0}, "bandwidth: -1.0, expected a positive"),
        ({"bandwidth": float("nan")}, "bandwidth: nan, expected"),
        ({"bandwidth": "fast"}, "bandwidth: "),
        ({"ema": True}, "Unexpected keyword argument passed to memory: ema"),
    ],
)
def test_wrong_options_are_refused_by_name(option, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fastadam.memory(100, **option)


def test_names_may_come_with_the_arrays():
    named = [("kernel", np.zeros((70, 80), F32)), ("bias", (80,)), ("scale", 80)]
    assert fastadam.memory(named) == fastadam.memory([5600, 80, 80])


def test_a_model_is_refused_with_a_hint():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"optimizer_or_shapes: Linear, .*; of a model pass model.parameters\(\)"):
        fastadam.memory(torch.nn.Linear(2, 2))


def test_an_optimizer_of_pytorch_without_state_is_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="optimizer: without state, expected it after its first step"):
        fastadam.memory(torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))]))


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_the_table(capsys):
    main(["memory", "--parameters", "7e9"])
    assert capsys.readouterr().out == f"{fastadam.memory(7 * 10**9)}\n"
    main(["memory", "--parameters", "1e6", "--gradients", "float32", "--amsgrad", "--ema", "--bandwidth", "1e9"])
    expected = fastadam.memory(10**6, gradients="float32", amsgrad=True, use_ema=True, bandwidth=1e9)
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --parameters"),
        (["--parameters", "x"], "argument --parameters: invalid float value: 'x'"),
        (["--parameters", "0"], "--parameters 0: expected a whole number of at least 1"),
        (["--parameters", "1.5"], "--parameters 1.5: expected a whole number"),
        (["--parameters", "nan"], "--parameters nan: expected a whole number"),
        (["--parameters", "1e30"], "--parameters 1e+30: expected a whole number of at least 1 and below 2**62"),
        (["--parameters", "inf"], "--parameters inf: expected a whole number"),
        (["--parameters", "1e6", "--bandwidth", "0"], "--bandwidth 0: expected a positive number"),
        (["--parameters", "1e6", "--gradients", "int8"], "argument --gradients: invalid choice: 'int8'"),
        (["--parameters", "1e6", "more"], "unrecognized arguments: more"),
    ],
)
def test_wrong_arguments_of_the_command_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["memory", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_import_loads_no_framework_for_it():
    code = "import sys, fastadam; fastadam.memory(10); assert not {'torch', 'rich', 'jax'} & set(sys.modules)"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
