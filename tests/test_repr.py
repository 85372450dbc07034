"""How objects show themselves: settings as code, values as NumPy does, tables in notebooks; nothing fails or waits."""

from __future__ import annotations

import functools
import html.parser
import re
import tracemalloc

import fastadam
import numpy as np
import pytest
from fastadam import schedules
from fastadam._core.common import display
from helpers import Halving, Pair

F32 = np.float32


def warm_up():
    raise AssertionError("called")


def small_rate():
    return 0.25


class Own(fastadam.Adam):
    def __init__(self, rate, warm=5, quiet=None, **kwargs):
        super().__init__(rate, **kwargs)
        self.max_warm = 3  # no argument
        vars(self)["warm"] = warm
        vars(self)["_quiet"] = quiet


class Silent(schedules.LearningRateSchedule):
    """Without get_config."""

    def __init__(self, first, second=2.0, third=3.0):
        self.first, self._second, self.unknown = first, second, third

    def __call__(self, step):
        raise AssertionError("called")


class Failing(Silent):
    def get_config(self):
        raise RuntimeError("no")


CODE = {
    "fastadam.Adam(learning_rate=0.001)": fastadam.Adam,
    "fastadam.AdamW(learning_rate=0.001, weight_decay=0.004)": fastadam.AdamW,
    "fastadam.AdamW(learning_rate=0.5, weight_decay=0.1)": lambda: fastadam.AdamW(0.5, 0.1, beta_1=0.9),
    "fastadam.Adam(learning_rate=0.5, beta_1=0.8, beta_2=0.99, epsilon=1e-08, amsgrad=True, name='mine')": lambda: (
        fastadam.Adam(F32(0.5), np.array(0.8), 0.99, 1e-8, True, "mine")
    ),
    "fastadam.Adam(learning_rate=1.0, clipnorm=1.0, clipvalue=2.0, decay=0.1)": lambda: fastadam.Adam(
        1, decay=0.1, clipnorm=1, clipvalue=2
    ),
    "fastadam.Adam(learning_rate=1.0, sparse_update='deferred', max_staleness=9)": lambda: fastadam.Adam(
        1.0, sparse_update="deferred", max_staleness=9
    ),
    "fastadam.Adam(learning_rate=1.0, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=7)": lambda: (
        fastadam.Adam(1.0, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=7)
    ),
    "fastadam.Adam(learning_rate=1.0, gradient_accumulation_steps=4, clip_after_dedupe=True)": lambda: fastadam.Adam(
        1.0, gradient_accumulation_steps=4, clip_after_dedupe=True
    ),
    "fastadam.Adam(learning_rate=fastadam.schedules.CosineDecay(initial_learning_rate=0.1, decay_steps=9))": lambda: (
        fastadam.Adam(schedules.CosineDecay(0.1, 9))
    ),
    "fastadam.LossScaleOptimizer(fastadam.Adam(learning_rate=0.1), initial_scale=1024.0)": lambda: (
        fastadam.LossScaleOptimizer(fastadam.Adam(0.1), 1024)
    ),
    "fastadam.schedules.CosineDecay(initial_learning_rate=0.1, decay_steps=9, warmup_target=1.0, warmup_steps=2)": (
        lambda: schedules.CosineDecay(0.1, 9, warmup_target=1.0, warmup_steps=2)
    ),
    "fastadam.schedules.ExponentialDecay(initial_learning_rate=0.1, decay_steps=9, decay_rate=0.5, staircase=True)": (
        lambda: schedules.ExponentialDecay(np.float64(0.1), 9, 0.5, staircase=True)
    ),
    "fastadam.schedules.PiecewiseConstantDecay(boundaries=[1, 2], values=[0.5, 0.25, 0.125])": lambda: (
        schedules.PiecewiseConstantDecay(np.array([1, 2]), [0.5, 0.25, 0.125])
    ),
}


@pytest.mark.parametrize("code", CODE)
def test_repr_is_the_code_that_makes_the_same(code):
    made = CODE[code]()
    assert repr(made) == code
    again = eval(code)
    assert again.get_config() == made.get_config()
    assert repr(again) == code


def test_every_option_that_is_not_at_its_default_is_shown():
    changed = {"decay": 0.5, "clipnorm": 1.0, "loss_scale_factor": 2.0, "weight_decay": 0.1, "clipvalue": 3.0}
    for name, value in changed.items():
        assert repr(fastadam.Adam(**{name: value})) == f"fastadam.Adam(learning_rate=0.001, {name}={value})"
    optimizer = fastadam.Adam()
    optimizer.learning_rate, optimizer.beta_1 = 0.5, 0.0
    assert repr(optimizer) == "fastadam.Adam(learning_rate=0.5, beta_1=0.0)"


@pytest.mark.parametrize(
    ("rate", "shown"),
    [
        (warm_up, "warm_up"),
        (lambda: warm_up(), "<lambda>"),
        (functools.partial(warm_up), "functools.partial(<function warm_up at "),
        (Halving(0.8), "Halving(start=0.8)"),
        (Silent(1), "Silent(first=1)"),
        (Silent(np.arange(1000), second=7.0), "Silent(first=array([  0,   1,   2, ..., 997, 998, 999], shape=(1000,)"),
        (Failing(1, 4.0), "Failing(first=1, second=4.0)"),
    ],
    ids=["function", "lambda", "partial", "config", "no config", "array", "failing config"],
)
def test_what_a_user_gave_as_rate_is_shown_and_not_called(rate, shown):
    assert repr(fastadam.Adam(rate)).startswith(f"fastadam.Adam(learning_rate={shown}")
    assert f"beta_1={shown}" in repr(fastadam.Adam(beta_1=warm_up)) or rate is not warm_up


def test_a_subclass_shows_its_own_arguments_by_the_attributes_that_keep_them():
    assert repr(Own(0.5)) == "Own(learning_rate=0.5)"
    assert repr(Own(0.5, 7, beta_2=0.9)) == "Own(learning_rate=0.5, beta_2=0.9, warm=7)"
    assert repr(Own(0.5, quiet="yes")) == "Own(learning_rate=0.5, quiet='yes')"


@pytest.mark.parametrize(
    "cls",
    [
        fastadam.Adam,
        fastadam.AdamW,
        Own,
        fastadam.LossScaleOptimizer,
        fastadam.Variable,
        fastadam.IndexedSlices,
        schedules.LearningRateSchedule,
        schedules.CosineDecay,
        Silent,
    ],
)
def test_an_object_that_is_not_whole_has_a_repr(cls):
    half = cls.__new__(cls)
    assert cls.__name__ in repr(half)
    assert half._repr_html_() is None or cls.__name__ in half._repr_html_()


def test_repr_survives_what_fails_in_a_value():
    class Broken:
        def __call__(self):
            return 0.1

        def __repr__(self):
            raise RuntimeError("no")

    class Long:
        def __call__(self):
            return 0.1

        def __repr__(self):
            return "x" * 10_000

    assert "Adam" in repr(fastadam.Adam(Broken()))
    assert fastadam.Adam(Broken())._repr_html_() is None
    assert len(repr(fastadam.Adam(Long()))) < 500


def test_arrays_are_shown_as_numpy_shows_them():
    w = fastadam.Variable([1.0, 2.5], name="w")
    assert repr(w) == "fastadam.Variable(array([1. , 2.5], dtype=float32), name='w')"
    again = eval(repr(w), {"fastadam": fastadam, "array": np.array, "float32": F32})
    assert (again.value == w.value).all()
    assert again.name == "w"
    assert repr(fastadam.Variable(np.float64(3))) == "fastadam.Variable(array(3., dtype=float32))"
    assert repr(fastadam.Variable(np.eye(2))).splitlines() == [
        "fastadam.Variable(array([[1., 0.],",
        "                         [0., 1.]], dtype=float64))",
    ]
    assert repr(fastadam.Variable(np.zeros((0, 4)))) == "fastadam.Variable(array([], shape=(0, 4), dtype=float64))"
    half = fastadam.Variable(np.ones(2, np.float16))
    assert repr(half) == "fastadam.Variable(array([1., 1.], dtype=float16))"


def test_slices_show_both_arrays():
    slices = fastadam.IndexedSlices(np.ones((2, 2), F32), [3, 0], dense_shape=(4, 2))
    text = repr(slices)
    assert text.splitlines() == [
        "fastadam.IndexedSlices(",
        "    values=array([[1., 1.],",
        "                  [1., 1.]], dtype=float32),",
        "    indices=array([3, 0], dtype=int64), dense_shape=(4, 2))",
    ]
    again = eval(text, {"fastadam": fastadam, "array": np.array, "float32": F32, "int64": np.int64})
    assert (again.values == slices.values).all()
    assert again.indices.tolist() == [3, 0]
    assert repr(fastadam.IndexedSlices([1.0], [2])) == (
        "fastadam.IndexedSlices(values=[1.0], indices=array([2], dtype=int64))"
    )
    assert len(repr(fastadam.IndexedSlices([1.0] * 10_000, np.arange(10_000)))) < 300


def test_of_a_large_table_only_corners_are_read(tmp_path):
    table = np.memmap(tmp_path / "table", np.float32, "w+", shape=(2**24, 64))  # 4 GiB, of which nothing is on disk
    table[0, 0], table[-1, -1] = 1.5, 2.5
    held = fastadam.Variable(table, name="table")
    tracemalloc.start()
    text, page = repr(held), held._repr_html_()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert text.startswith("fastadam.Variable(array([[1.5, 0. , 0. , ..., 0. , 0. , 0. ],")
    assert "2.5]]" in text
    assert text.endswith("shape=(16777216, 64), dtype=float32), name='table')")
    assert "shape=(16777216, 64)" in page
    assert len(text) < 1000
    assert peak < 2**20


def test_a_repr_moves_no_row_that_waits(rows_wait):
    pair = Pair()
    pair.step([1, 2])
    pair.rest(3)
    assert pair.lags()
    before = pair.tables[1].copy()
    held = fastadam.Variable(pair.tables[1])
    for shown in (*pair.optimizers, held):
        assert repr(shown)
        assert shown._repr_html_()
    assert pair.lags()
    np.testing.assert_array_equal(pair.tables[1], before)


class Parsed(html.parser.HTMLParser):
    """Which tags were opened and not closed, and the text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.tags = [], [], set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize(
    ("shown", "texts"),
    [
        (fastadam.Adam(0.5), ["fastadam.Adam", "learning_rate", "0.5", "iterations", "0"]),
        (fastadam.LossScaleOptimizer(fastadam.Adam(0.5)), ["dynamic_scale", "32768.0", "fastadam.Adam", "0.5"]),
        (fastadam.Variable([1.0], name="<b>w</b>"), ["<b>w</b>", "(1,)", "float32", "array([1.], dtype=float32)"]),
        (fastadam.IndexedSlices([1.0], [2], (4,)), ["values=[1.0]", "indices=array([2], dtype=int64)", "(4,)"]),
        (schedules.CosineDecay(0.1, 10), ["fastadam.schedules.CosineDecay", "decay_steps", "10"]),
        (Halving(0.8), ["Halving", "start", "0.8"]),
        (Own(0.5, warm="<script>"), ["Own", "warm", "<script>"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_html_is_a_whole_table_with_escaped_text(shown, texts):
    parsed = Parsed(shown._repr_html_())
    assert parsed.open == []
    assert set(texts) <= set(parsed.text)
    assert parsed.tags <= {"div", "strong", "table", "tr", "th", "td", "pre", "svg", "polyline"}


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.ExponentialDecay(0.1, 10, 0.5),
        schedules.InverseTimeDecay(0.1, 10, 0.5),
        schedules.PolynomialDecay(0.1, 10),
        schedules.CosineDecay(0.1, 10, warmup_target=0.2, warmup_steps=5),
        schedules.CosineDecayRestarts(0.1, 10),
        schedules.LinearCosineDecay(0.1, 10),
        schedules.PiecewiseConstantDecay([3, 5], [0.1, 0.2, 0.3]),
        schedules.PiecewiseConstantDecay([], [0.1]),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_html_of_a_schedule_has_its_curve(schedule):
    points = re.search(r'<polyline points="(.*?)"', schedule._repr_html_())[1].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert 1 <= min(heights) <= max(heights) <= 39
    assert len(set(heights)) > 1 or schedule.boundaries == []


def test_no_curve_of_rates_that_are_not_finite():
    assert display.polyline([1.0, np.inf]) == display.polyline([1.0]) == ""


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (0.5, 0.5),
        (F32(0.5), 0.5),
        (np.array(0.5), 0.5),
        (1, 1.0),
        (small_rate, 0.25),
        (schedules.ExponentialDecay(0.5, 1, 0.5), 0.125),
        (Halving(0.5), 0.125),
        (type("Array", (schedules.LearningRateSchedule,), {"__call__": lambda self, step: F32(step)})(), 2.0),
    ],
    ids=["float", "numpy", "0-d", "int", "callable", "schedule", "user's", "returns numpy"],
)
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("scaled", [False, True])
def test_current_learning_rate_is_that_of_the_next_step(rate, expected, decay, scaled):
    optimizer = fastadam.Adam(rate, beta_1=0.0, beta_2=0.0, epsilon=1e-30, decay=decay)
    optimizer = fastadam.LossScaleOptimizer(optimizer, 1.0) if scaled else optimizer
    optimizer.iterations = 2
    found = optimizer.current_learning_rate
    assert type(found) is float
    assert found == expected / (1 + 2 * decay)
    w = np.zeros(1)
    optimizer.apply_gradients([(np.ones(1), w)])  # without moments a step is as long as its rate
    np.testing.assert_allclose(-w[0], found, rtol=1e-12)
    with pytest.raises(AttributeError):
        optimizer.current_learning_rate = 1.0


def test_with_accumulation_a_schedule_sees_the_calls():
    optimizer = fastadam.Adam(Halving(0.5), decay=1.0, gradient_accumulation_steps=2)
    w = np.zeros(1)
    seen = []
    for _ in range(4):
        seen.append(optimizer.current_learning_rate)
        optimizer.apply_gradients([(np.ones(1), w)])
    assert seen == [0.5, 0.25, 0.125 / 2, 0.0625 / 2]


@pytest.mark.parametrize(
    ("rate", "error", "message"),
    [
        (lambda: np.nan, ValueError, "learning_rate: nan, expected a finite number"),
        (lambda: "fast", TypeError, "learning_rate: 'fast', expected a number"),
        (type("Bad", (Silent,), {"__call__": lambda self, step: None})(1), TypeError, "learning_rate: None, expected"),
    ],
)
def test_current_learning_rate_refuses_what_the_step_refuses(rate, error, message):
    with pytest.raises(error, match=message):
        _ = fastadam.Adam(rate).current_learning_rate


def named_bias(name, _shape):
    return name == "bias"


@pytest.mark.parametrize("options", [{}, {"moments": "8bit"}], ids=str)
def test_an_optimizer_of_pytorch_shows_groups_as_torch_does(options):
    torch = pytest.importorskip("torch")
    import fastadam.torch

    text = repr(fastadam.torch.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.1, **options))
    assert text.startswith("AdamW (\nParameter Group 0\n    amsgrad: False\n")
    assert text.endswith("    weight_decay: 0.01\n)")
    assert all(f"    {name}: {value}\n" in text for name, value in options.items())


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({"clipnorm": 1.0, "skip_nonfinite": True}, ["clipnorm: 1.0", "skip_nonfinite: True"]),
        ({"clipvalue": 2.0, "telemetry": True}, ["clipvalue: 2.0", "telemetry: True"]),
        ({"sparse_update": "lazy", "global_clipnorm": 3.0}, ["sparse_update: lazy", "global_clipnorm: 3.0"]),
        ({"moments": "8bit", "float32_for": 100}, ["float32_for: 100"]),
        ({"moments": "8bit", "float32_for": ["bias"]}, ["float32_for: ['bias']"]),
        ({"moments": "8bit", "float32_for": named_bias}, ["float32_for: named_bias"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_optimizer_of_pytorch_shows_options_that_belong_to_no_group(options, lines):
    torch = pytest.importorskip("torch")
    import fastadam.torch

    text = repr(fastadam.torch.AdamW([("bias", torch.nn.Parameter(torch.ones(2)))], **options))
    assert text.partition("All groups\n")[2].splitlines() == [*[f"    {line}" for line in lines], ")"]
