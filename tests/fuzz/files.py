"""Mutated files of `save` and `save_delta`: refused by a ValueError that names the file, or loaded with the same bits.

    python tests/fuzz/files.py --seed 1 --count 5000

Files of optimizers with different options, and chains of a base and three deltas of which one is mutated, are loaded in
a child with little address space (--gigabytes, default 2). Mutations of bytes, of the safetensors header and of its
metadata without a new checksum must be refused, or change nothing that is loaded. "forged" files have new checksums
after a change of fastadam's metadata: whoever can write those can also write a good file of other contents, so they
may load; then a step with the loaded optimizer must work or raise a ValueError. In no case may a refused call change a
variable, or an error be of another type. In the closing line: refused, same (loaded with the same bits), forged.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
import sys
import warnings
import zlib
from pathlib import Path

import children
import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

F32 = np.float32
OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1},
    "average": {"use_ema": True, "gradient_accumulation_steps": 2},
    "8bit": {"moments": "8bit", "float32_for": 4},
    "lazy": {"sparse_update": "lazy", "gradient_accumulation_steps": 3},
    "deferred": {"sparse_update": "deferred", "use_ema": True},
}
NUMBERS = [0, 1, -1, 2, 7, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63), 0.5, 1e308, -0.0]
VALUES = [
    *NUMBERS,
    None,
    True,
    False,
    "",
    "x",
    "F32",
    "I64",
    "F64",
    "BF16",
    "0/m",
    "\0",
    "\ud800",
    [],
    {},
    [[]],
    [1, 2],
    {"x": 1},
]


class Files:
    """The good files and what they load to."""

    def __init__(self, folder):
        import fastadam

        self.fastadam, self.folder = fastadam, Path(folder)
        self.made = []  # the names of a base and its deltas, what is loaded, and whether values come from the file
        for name, options in OPTIONS.items():
            for values in (False, True):
                optimizer, variables = self.trained(options)
                self.keep([f"{name}-{values}"], optimizer, variables, values=values)
        for name in ("plain", "lazy", "deferred"):
            optimizer, variables = self.trained(OPTIONS[name])
            self.keep([f"chain-{name}", *(f"{name}-{n}" for n in "123")], optimizer, variables, values=True)
        optimizer, variables = self.trained({})
        optimizer.save(self.folder / "other", values=True)
        self.others = [(self.folder / names[-1]).read_bytes() for names, *_ in self.made]

    def trained(self, options):
        rng = np.random.default_rng(0)
        variables = [rng.standard_normal((6, 2)).astype(F32), rng.standard_normal(5).astype(F32)]
        optimizer = self.fastadam.Adam(0.1, **options)
        optimizer.build(variables)
        self.steps(optimizer, variables)
        return optimizer, variables

    def steps(self, optimizer, variables, count=4):
        for _ in range(count):
            table = np.full((6, 2), 0.5, F32)
            if optimizer.sparse_update != "dense":
                table = self.fastadam.IndexedSlices(table[:2], np.array([1, 4]))
            optimizer.apply_gradients([(table, variables[0]), (np.full(5, 0.25, F32), variables[1])])

    def keep(self, names, optimizer, variables, values):
        base, *deltas = [self.folder / name for name in names]
        optimizer.save(base, values=values)
        for delta in deltas:
            self.steps(optimizer, variables)
            optimizer.save_delta(delta)
        start = [np.full_like(w, 7) if values else w.copy() for w in variables]
        expected = self.loaded([base, *deltas], [w.copy() for w in start])
        self.made.append((names, start, expected, [(self.folder / name).read_bytes() for name in names]))

    def loaded(self, paths, variables):
        """Everything that a file decides."""
        optimizer = self.fastadam.Adam.load(paths[0], variables, deltas=paths[1:])
        optimizer.sync()
        return self.contents(optimizer, variables), optimizer

    def contents(self, optimizer, variables):
        arrays = [*variables, *map(np.asarray, optimizer.get_weights())]
        return [(a.dtype, a.shape, a.tobytes()) for a in arrays], optimizer.get_config()

    def case(self, rng, tell, number):
        names, start, (expected, _), contents = self.made[rng.integers(len(self.made))]
        at = int(rng.integers(len(names)))
        text, data = mutated(rng, contents[at], self.others)
        tell(f"{names}, [{at}] {text}")
        paths = [self.folder / name for name in names]
        paths[at] = self.folder / "mutated"
        paths[at].write_bytes(data)
        variables = [w.copy() for w in start]
        try:
            found, optimizer = self.loaded(paths, variables)
        except ValueError as error:
            self.judge(error, paths, at, variables, start)
            return "refused"
        except BaseException as error:
            raise children.Finding(f"{text.partition(' ')[0]}: {type(error).__name__}: {str(error)[:300]}") from error
        if found == expected:
            return "same"
        if not text.startswith("forged"):
            raise children.Finding(f"loaded with other contents: {text.partition(' ')[0]}")
        with contextlib.suppress(ValueError):
            self.steps(optimizer, variables)
        return "forged"

    def judge(self, error, paths, at, variables, start):
        names = "|".join(re.escape(str(path)) for path in paths)  # a good file is blamed if it does not fit the other
        if not re.match(
            rf"(deltas\[\d\]: )?({names}): .*, expected|(deltas\[\d\]: )?({names}): \w+ refuses", str(error), re.DOTALL
        ):
            raise children.Finding(f"the message names no file, or not what was expected: {error}")
        if any(a.tobytes() != b.tobytes() for a, b in zip(variables, start, strict=True)):
            raise children.Finding(f"a variable was changed by a refused file: {error}")


# ---- mutations -------------------------------------------------------------------------------------------------------


def mutated(rng, data, others):
    """A description that begins with the kind, and the bytes."""
    kinds = [
        flip,
        flip,
        tensor,
        tensor,
        cut,
        fill,
        move,
        splice,
        length_field,
        header,
        header,
        text_of_header,
        metadata,
        forged,
        forged,
    ]
    kind = kinds[rng.integers(len(kinds))]
    told, data = kind(rng, data, others) if kind is splice else kind(rng, data)
    return f"{kind.__name__} {told}", data


def flip(rng, data):
    return flipped(data, rng.integers(len(data) * 8, size=rng.integers(1, 5)))


def tensor(rng, data):
    """The header stays good: only checksums can tell."""
    begin = 8 * (8 + struct.unpack("<Q", data[:8])[0])
    return flipped(data, rng.integers(begin, len(data) * 8, size=rng.integers(1, 5)))


def flipped(data, bits):
    data = bytearray(data)
    for bit in bits:
        data[bit // 8] ^= 1 << (bit % 8)
    return f"bits {bits.tolist()}", bytes(data)


def cut(rng, data):
    size = int(rng.integers(len(data)))
    return (f"at {size}", data[:size]) if rng.random() < 0.7 else (f"adds {size}", data + bytes(size + 1))


def ends(rng, size):
    return sorted(int(n) for n in rng.integers(size, size=2))


def fill(rng, data):
    low, high = ends(rng, len(data))
    middle = bytes(high - low) if rng.random() < 0.5 else rng.bytes(high - low)
    return f"{low} to {high}", data[:low] + middle + data[high:]


def move(rng, data):
    low, high = ends(rng, len(data))
    return f"{low} to {high}", data[:low] + data[high:] + data[low:high]


def splice(rng, data, others):
    other = others[rng.integers(len(others))]
    low, high = ends(rng, len(data))
    return f"{low} to {high}", data[:low] + other[low:high] + data[high:]


def length_field(rng, data):
    size = struct.unpack("<Q", data[:8])[0]
    choices = [
        0,
        1,
        2**31,
        2**32,
        2**62,
        2**63 - 1,
        2**63,
        2**64 - 1,
        len(data),
        len(data) - 8,
        10**8 + 1,
        size + 1,
        size - 1,
        size + 8,
    ]
    new = choices[rng.integers(len(choices))]
    return str(new), struct.pack("<Q", new % 2**64) + data[8:]


def parts_of(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(head, body):
    text = head if isinstance(head, bytes) else json.dumps(head, ensure_ascii=True).encode()
    return struct.pack("<Q", len(text)) + text + body


def any_value(rng):
    roll = rng.integers(12)
    if roll == 0:
        return json.loads("[" * 100 + "]" * 100)
    if roll == 1:
        return "x" * 10_000
    return VALUES[rng.integers(len(VALUES))]


def edited(rng, value, level=0):
    """A copy with one change somewhere inside, and where."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        items, keys = dict(value), list(value)
        key, how = keys[rng.integers(len(keys))], rng.integers(10)
        if how == 0:
            del items[key]
            return f"without {key!r}", items
        if how == 1:
            items[str(any_value(rng))[:50]] = items[key]
            return f"{key!r} once more", items
        where, items[key] = edited(rng, items[key], level + 1)
        return f"[{key!r}]{where}", items
    if isinstance(value, list) and value and rng.random() < 0.9:
        items, at, how = list(value), int(rng.integers(len(value))), rng.integers(8)
        if how == 0:
            del items[at]
            return f"without [{at}]", items
        if how == 1:
            items.insert(at, items[at])
            return f"[{at}] twice", items
        where, items[at] = edited(rng, items[at], level + 1)
        return f"[{at}]{where}", items
    if isinstance(value, int) and rng.random() < 0.5:
        new = value + int(rng.choice([-8, -4, -1, 1, 4, 8, 2**31]))
    else:
        new = any_value(rng)
    return f"={str(new)[:60]!r}", new


def header(rng, data):
    """Of the safetensors format: dtypes, shapes, offsets, names."""
    head, body = parts_of(data)
    changed = {key: value for key, value in head.items() if key != "__metadata__"}
    where, changed = edited(rng, changed)
    if isinstance(changed, dict):
        changed = {**changed, "__metadata__": head["__metadata__"]}
    return where, joined(changed, body)


def text_of_header(rng, data):
    head, body = parts_of(data)
    text = json.dumps(head).encode()
    how = rng.integers(6)
    if how == 0:  # a duplicate key, first or last
        key = list(head)[rng.integers(len(head))]
        extra = json.dumps({key: edited(rng, head[key])[1]}).encode()
        pair = extra[1:-1]
        text = b"{" + pair + b"," + text[1:] if rng.random() < 0.5 else text[:-1] + b"," + pair + b"}"
        return f"{key!r} twice", joined(text, body)
    if how == 1:
        depth = int(rng.choice([50, 200, 10_000]))
        return f"{depth} deep", joined(b'{"x":' + b"[" * depth + b"]" * depth + b"," + text[1:], body)
    if how == 2:
        spaces = int(rng.choice([1, 8, 10**6]))
        return f"{spaces} spaces", joined(text + b" " * spaces, body)
    if how == 3:
        return "giant", joined(b'{"' + b"x" * 10**6 + b'":0,' + text[1:], body)
    if how == 4:
        return "not UTF-8", joined(text.replace(b"fastadam", b"fast\xffadam", 1), body)
    return "a number of many digits", joined(text.replace(b"[0,", b"[" + b"9" * 500 + b",", 1), body)


def metadata(rng, data):
    """Without a new checksum."""
    head, body = parts_of(data)
    where, head["__metadata__"] = edited(rng, head["__metadata__"])
    return where, joined(head, body)


def forged(rng, data):
    """With a new checksum of fastadam's metadata."""
    head, body = parts_of(data)
    own, where = json.loads(head["__metadata__"]["fastadam"]), []
    for _ in range(int(rng.integers(1, 3))):
        told, own = edited(rng, own)
        where.append(told)
    text = json.dumps(own)
    if rng.random() < 0.05:
        text = "[" * 50_000
    head["__metadata__"] = {"fastadam": text, "fastadam_crc32": str(zlib.crc32(text.encode()))}
    return ", ".join(where), joined(head, body)


def start(folder):
    warnings.simplefilter("ignore")
    return Files(folder).case


if __name__ == "__main__":
    children.run("files", start, children.arguments(__doc__, 1000, gigabytes=2))
