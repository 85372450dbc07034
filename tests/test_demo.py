"""The main job, as a user starts it."""

from __future__ import annotations

import functools
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import fastadam
import numpy as np
import pytest
from fastadam.__main__ import main
from fastadam._demo import digits as demo
from fastadam._demo import embedding, show

PNG = b"\x89PNG"


def test_the_digits_are_whole():
    images, labels = demo.load_digits()
    assert images.shape == (1797, 64)
    assert images.dtype == np.float32
    assert images.min() == 0
    assert images.max() == 1
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.slow
def test_the_demo_learns_and_ends_where_a_plain_adam_ends():
    report = demo.train(epochs=3)
    assert report.accuracy == report.accuracies[2] > 0.94
    assert report.losses[-1] < 0.4 < report.losses[0]
    assert report.largest_difference < 1e-4 * report.typical_weight
    assert abs(report.accuracy - report.plain_accuracy) < 0.005


def test_the_gradients_of_the_demo_are_right():
    rng = np.random.default_rng(0)
    network = demo.Network(rng)
    network.parameters = [p.astype(np.float64) for p in network.parameters]
    images, labels = rng.random((6, 64)), np.arange(6)
    _, gradients = network.gradients(images, labels)
    for parameter, gradient in zip(network.parameters, gradients, strict=True):
        place = tuple(rng.integers(0, n) for n in parameter.shape)
        values = []
        for sign in (1, -1):
            parameter[place] += sign * 1e-6
            values.append(network.gradients(images, labels)[0])
            parameter[place] -= sign * 1e-6
        np.testing.assert_allclose(gradient[place], (values[0] - values[1]) / 2e-6, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_the_command_line_trains_and_reports(tmp_path):
    command = [sys.executable, "-m", "fastadam", "demo"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = {line[:18].strip(): line[19:] for line in result.stdout.splitlines()}
    assert list(lines) == ["test accuracy", "optimizer step", "same result", "picture"]
    assert float(lines["test accuracy"].split("%")[0]) > 95
    assert float(re.search(r"([\d.]+) times as long", lines["optimizer step"])[1]) > 1
    assert Path(lines["picture"]) == tmp_path / "loss.png"
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert "training: 100%" in result.stderr
    assert "font" not in result.stderr


@pytest.fixture
def one_epoch(monkeypatch):
    monkeypatch.setattr(demo, "train", functools.partial(demo.train, epochs=1))


@pytest.mark.slow
def test_the_picture_goes_where_it_is_asked_for(tmp_path, one_epoch, capsys):
    for name in ("curve.png", "curve.SVG"):
        main(["demo", "--curve", str(tmp_path / name)])
        assert capsys.readouterr().out.splitlines()[-1] == f"picture            {tmp_path / name}"
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)
    assert b"<svg" in (tmp_path / "curve.SVG").read_bytes()


def test_without_matplotlib_and_tqdm_the_demo_says_what_is_missing(tmp_path, monkeypatch, one_epoch, capsys):
    for module in ("matplotlib", "matplotlib.figure", "tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    main(["demo"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training: 1 epochs (pip install tqdm for a progress bar)"
    assert lines[-1] == "picture            none: matplotlib is not installed (pip install matplotlib)"
    assert list(tmp_path.iterdir()) == []
    assert "matplotlib is not installed" in refused(["demo", "--curve", "x.png"], capsys)


def refused(arguments, capsys):
    """The message of a command line that is refused before anything is trained."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (demo, embedding):
            patch.setattr(module, "train", lambda *_, **__: pytest.fail("trained"))
        with pytest.raises(SystemExit) as caught:
            main(arguments)
    assert caught.value.code == 2
    usage, *_, message = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: python -m fastadam demo " if "demo" in arguments else "usage: python -m fastadam ")
    return message


@pytest.mark.parametrize("others", [[], ["--embedding"]])
@pytest.mark.parametrize(
    ("curve", "message"),
    [
        ("missing/x.png", "missing/x.png: cannot be written (No such file or directory)"),
        ("there.png", "there.png: a directory, expected a file such as there.png/loss.png"),
        ("text", "text: suffix '', expected one of .avif, .eps, "),
        ("x.abc", "x.abc: suffix '.abc', expected one of "),
        ("file.txt/x.png", "file.txt/x.png: cannot be written (Not a directory)"),
        ("/proc/x.png", "/proc/x.png: cannot be written ("),
    ],
)
def test_a_place_that_no_picture_can_be_written_to_is_refused_before_training(
    curve, message, others, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").mkdir()
    (tmp_path / "file.txt").write_text("kept")
    if not Path("/proc").is_dir():
        curve = curve.replace("/proc", "/missing")
    message = message.replace(".avif, .eps, ", "")
    found = refused(["demo", *others, "--curve", curve], capsys)
    assert found.startswith(f"python -m fastadam demo: error: --curve {message}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "there.png"]


def test_the_check_of_a_place_changes_no_file(tmp_path):
    old = tmp_path / "old.png"
    old.write_bytes(b"kept")
    assert show.check_picture(old) == old
    assert old.read_bytes() == b"kept"
    assert show.check_picture(tmp_path / "new.png") == tmp_path / "new.png"
    assert not (tmp_path / "new.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--bogus"], "demo: error: unrecognized arguments: --bogus"),
        (["demo", "more"], "demo: error: unrecognized arguments: more"),
        (["--bogus"], "fastadam: error: unrecognized arguments: --bogus"),
        (["dmeo"], "fastadam: error: argument command: invalid choice: 'dmeo'"),
        (["demo", "--steps", "5"], "demo: error: --steps 5: expected a positive number, with --embedding"),
        (["demo", "--embedding", "--steps", "0"], "demo: error: --steps 0: expected a positive number, with --embedd"),
    ],
)
def test_wrong_arguments_are_answered_by_the_usage_of_their_command(arguments, message, capsys):
    assert message in refused(arguments, capsys)


def test_the_console_script_is_this_program_under_its_own_name(monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    module, function = re.search(r'^\[project.scripts\]\nfastadam = "(.*):(.*)"$', text, re.MULTILINE).groups()
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/fastadam", "demo", "--bogus"])
    with pytest.raises(SystemExit):
        getattr(import_module(module), function)()
    usage, message = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: fastadam demo ")
    assert message == "fastadam demo: error: unrecognized arguments: --bogus"


def test_control_c_ends_the_demo_with_one_line(tmp_path):
    listens = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # which background jobs ignore
    code = f"{listens}; from fastadam.__main__ import main; main()"
    command = [sys.executable, "-c", code, "demo", "--curve", str(tmp_path / "x.png")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        read = ""
        while "training:" not in read:
            read += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "stopped"
    assert "Traceback" not in rest
    assert not (tmp_path / "x.png").exists()


def test_smoothing_keeps_a_constant_and_takes_the_mean_of_the_neighbours():
    assert show.smooth([3.0] * 7, 5).tolist() == [3.0] * 7
    assert show.smooth([0.0, 3.0, 6.0, 0.0], 3).tolist() == [1.5, 3.0, 3.0, 3.0]


def test_without_arguments_it_prints_what_a_bug_report_needs(capsys):
    main([])
    lines = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if not line.startswith("isa in")
    )
    assert lines["fastadam"] == fastadam.__version__
    assert set(lines) == {"fastadam", "python", "numpy", "compiler", "isas", "threads", "cuda"}
    assert all(name in lines["isas"] for name in fastadam.isas())
