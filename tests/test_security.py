"""What .github/SECURITY.md says: loading a file runs nothing, opens nothing else, and is bounded by the file."""

from __future__ import annotations

import ast
import json
import pickle
import re
import zlib
from pathlib import Path

import fastadam
import numpy as np
import pytest
import safetensors.numpy
from fastadam import exchange
from fastadam._core.saving import tensor_file
from fastadam._core.saving.file_format import MAX_HEADER
from helpers import assert_same, refuses, rewrite, run_python, slow

F32 = np.float32
ROOT = Path(__file__).parents[1]
PACKAGE = Path(fastadam.__file__).parent
NAMES = [
    "../../etc/passwd",
    "file:///etc/passwd",
    "__import__('os').system('id')",
    "https://example.com",
    "\N{SNOWMAN}\n",
]


def test_every_statement_of_the_document_names_tests_that_exist():
    text = (ROOT / ".github" / "SECURITY.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    sources = [Path(__file__), Path(__file__).with_name("test_hostile_files.py")]
    defined = set(re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in sources), re.MULTILINE))
    assert named <= defined
    statements = re.findall(r"^- .*(?:\n  .*)*", text, re.MULTILINE)
    assert len(statements) > 8
    assert [statement for statement in statements if "`test_" not in statement] == []


# ---- nothing is run or opened ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["values", "hostile", *slow("plain", "delta", "loss scale")])
def test_loading_does_nothing_but_read_the_named_files(kind, tmp_path):
    """In a process that has loaded a file of this kind before, so that imports of the library's own are done."""
    code = f"""
import json, os, sys, warnings
import numpy as np, fastadam
sys.path.insert(0, {str(Path(__file__).parent)!r})
kind, names = {kind!r}, {NAMES!r}
schedule = fastadam.schedules.CosineDecay(0.1, 100)
variables = [fastadam.Variable(np.ones((4, 2), "f"), name) for name in names]

def save(folder):
    optimizer = fastadam.AdamW(schedule, sparse_update="lazy", name=names[0])
    wrapped = fastadam.LossScaleOptimizer(optimizer) if kind == "loss scale" else optimizer
    wrapped.apply_gradients([(np.ones((4, 2), "f"), v) for v in variables])
    base, deltas = os.path.join(folder, "base"), []
    wrapped.save(base, **({{}} if kind == "plain" else {{"values": kind != "loss scale"}}))
    if kind == "delta":
        optimizer.apply_gradients([(fastadam.IndexedSlices(np.ones((1, 2), "f"), [1]), v) for v in variables])
        deltas = [os.path.join(folder, "delta")]
        optimizer.save_delta(deltas[0])
    if kind == "hostile":
        from helpers import rewrite
        def change(header):
            header["config"]["learning_rate"].update(module="os", registered_name="os>system")
            header["excluded"]["names"] = ["/etc/passwd", "os.system"]
            header["path"] = header["file"] = "/etc/passwd"
        rewrite(base, change)
    return base, deltas

def load(base, deltas):
    cls = fastadam.LossScaleOptimizer if kind == "loss scale" else fastadam.AdamW
    return cls.load(base, variables, **({{"deltas": deltas}} if deltas else {{}}))

folders = [os.path.join({str(tmp_path)!r}, name) for name in ("first", "second")]
files = []
for folder in folders:
    os.mkdir(folder)
    files.append(save(folder))
load(*files[0])
watched = ("open", "import", "exec", "compile", "marshal", "pickle", "os.", "subprocess", "socket", "ctypes", "code.",
           "shutil", "urllib", "http", "tempfile", "pty", "signal", "mmap")
seen, watching = set(), False

def hook(event, arguments):
    if watching and event.startswith(watched):
        seen.add((event, str(arguments[0])))

sys.addaudithook(hook)
watching = True
load(*files[1])
watching = False
print(json.dumps(sorted(seen)))
print(json.dumps([files[1][0], *files[1][1]]))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    seen, named = map(json.loads, result.stdout.splitlines())
    assert {event for event, _ in seen} <= {"open"}
    assert {path for _, path in seen} == set(named)


DOORS = {
    "eval", "exec", "compile", "__import__",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "os.system", "torch.load", "np.load",
}  # fmt: skip


def test_the_package_has_no_way_to_run_data():
    """The demo reads digits that come with it, by NumPy without pickles."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in DOORS:
                found.add((path.relative_to(PACKAGE).as_posix(), name))
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            closed = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
            found |= {(path.name, module) for module in modules if module.partition(".")[0] in closed}
    assert found == {("_demo/digits.py", "np.load")}


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "Adam", "LearningRateSchedule", "deserialize", "__init__", ""]
)
def test_only_listed_classes_are_made(name, small_file):
    path, variables = small_file
    made = []

    class Mine(fastadam.schedules.LearningRateSchedule):
        def __init__(self, **config):
            made.append(config)

        def __call__(self, step):
            return 0.5

        def get_config(self):
            return {}

    rewrite(path, lambda header: header["config"]["learning_rate"].update(class_name=name, config={"x": 1}))
    refuses(path, variables, re.escape(f"Unknown decay: {name}, expected one of"))
    fastadam.Adam.load(path, variables, {name: Mine})
    assert made == [{"x": 1}]


@pytest.mark.parametrize(
    ("link", "at"),
    [
        *((link, at) for link in ("external", "soft") for at in ("optimizer", "optimizer/vars", "optimizer/vars/0")),
        ("storage", "optimizer/vars/0"),
        ("virtual", "optimizer/vars/0"),
    ],
)
def test_links_in_a_keras_file_are_not_followed(link, at, tmp_path):
    """The file that they name is not there: HDF5 would say so if it were opened."""
    h5py = pytest.importorskip("h5py")
    path, elsewhere = tmp_path / "model.weights.h5", str(tmp_path / "elsewhere.h5")
    with h5py.File(path, "w") as file:
        if link == "external":
            file[at] = h5py.ExternalLink(elsewhere, "/secret")
        elif link == "soft":
            file[at] = h5py.SoftLink("/elsewhere")
        elif link == "storage":
            file.create_dataset(at, (2,), "f", external=[(elsewhere, 0, 8)])
        else:
            layout = h5py.VirtualLayout((2,), "f")
            layout[:] = h5py.VirtualSource(elsewhere, "secret", (2,))
            file.create_virtual_dataset(at, layout)
    with pytest.raises(ValueError, match=r"expected (it in this file|one as Keras writes it)$"):
        exchange.read_keras3_file(path)


# ---- what a file may cost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [MAX_HEADER + 1, 100_000_000, 2**40])
def test_a_long_header_is_refused_before_it_is_read(size, small_file, monkeypatch):
    path, variables = small_file
    monkeypatch.setattr(safetensors, "safe_open", None)  # which would read it
    with path.open("wb") as file:
        file.write(size.to_bytes(8, "little") + b"{")
        file.truncate(8 + size)  # a hole
    refuses(path, variables, f"a header of {size} bytes, expected at most {MAX_HEADER}")


def test_a_header_that_could_not_be_loaded_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "MAX_HEADER", 2000)
    optimizer, variables = fastadam.Adam(), [np.ones(1, F32) for _ in range(20)]
    optimizer.build(variables)
    message = (
        r"variables: a header of \d+ bytes for 41 tensors, expected at most 2000 \(save some of the variables in an"
    )
    for values in (False, True):
        with pytest.raises(ValueError, match=message.replace("41", "61") if values else message):
            optimizer.save(tmp_path / "opt", values=values)
    assert list(tmp_path.iterdir()) == []
    optimizer.save(tmp_path / "opt", variables[:2])
    fastadam.Adam.load(tmp_path / "opt", variables[:2])


@pytest.mark.parametrize("depth", [200, 100_000, 5_000_000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("where", ["description", "header", "tensor"])
def test_deeply_nested_json_is_refused(where, opening, depth, small_file):
    path, variables = small_file
    closing = "]" if opening == "[" else "}"
    nested = opening * depth + "1" + closing * depth
    if where == "description":
        rewrite(path, lambda header: nested)
    else:
        header = {"__metadata__": {"fastadam": "{}", "fastadam_crc32": "0"}}
        text = json.dumps(header)[:-1] + f', "0/m": {nested if where == "header" else json.dumps(nested)}}}'
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    refuses(path, variables)


@pytest.mark.parametrize("shape", [[2**40], [2**31, 2**31], [2**62, 4], [3]])
def test_sizes_that_the_file_does_not_have_are_refused(shape, small_file):
    path, variables = small_file
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["0/m"]["shape"] = shape
    start, item_size = header["0/m"]["data_offsets"][0], 4
    for end in (header["0/m"]["data_offsets"][1], start + item_size * int(np.prod(shape, dtype=object))):
        header["0/m"]["data_offsets"] = [start, end]
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        refuses(path, variables, "not a complete safetensors file")


def test_a_refused_file_has_changed_nothing(tmp_path):
    """The last tensor of the last variable is damaged: everything else is as it should be."""
    path, variables = tmp_path / "opt", [np.ones(3, F32), np.ones(2, F32)]
    optimizer = fastadam.Adam(0.1)
    optimizer.apply_gradients([(np.ones(w.shape, F32), w) for w in variables])
    optimizer.save(path, values=True)
    before = [np.full(w.shape, 7, F32) for w in variables]
    others, slots = [w.copy() for w in before], [{"m": np.full(w.shape, 7, F32)} for w in before]
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        fastadam.Adam.load(path, others, slots=slots)
    assert_same([*others, *(slot["m"] for slot in slots)], [*before, *before])


# ---- what is not protected -------------------------------------------------------------------------------------------


def test_checksums_are_no_signature(small_file):
    path, variables = small_file
    forged = np.array([5, 6], F32)
    rewrite(
        path,
        lambda header: header["weights"].__setitem__(1, [header["weights"][1][0], zlib.crc32(forged.tobytes())]),
        {"0/m": forged},
    )
    assert_same([fastadam.Adam.load(path, variables).get_weights()[1]], [forged])


def test_a_pickle_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    optimizer = fastadam.Adam()
    data = pickle.dumps([optimizer, Evil()])
    assert not (tmp_path / "run").exists()
    pickle.loads(data)
    assert (tmp_path / "run").exists()
