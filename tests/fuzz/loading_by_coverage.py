"""Searches files for `fastadam.Adam.load` by the coverage of the reader: `pip install atheris`, then

    python tests/fuzz/loading_by_coverage.py --seed 1 --count 100000

It starts with the good files and the mutations of `files.py`, which also says what is a finding; a new checksum is made
for half of the files, so that the search reaches what lies behind the checks of damage. Ends with the number of files,
or with the traceback of a finding and the name of the file that atheris keeps. Without atheris it says so and exits 0.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import children
import files
import numpy as np


def resealed(data):
    """The same file, with checksums that fit its metadata if that can be read."""
    with contextlib.suppress(Exception):
        head, body = files.parts_of(data)
        text = head["__metadata__"]["fastadam"]
        head["__metadata__"]["fastadam_crc32"] = str(zlib.crc32(text.encode()))
        own = json.loads(text)
        places = {key: record["data_offsets"] for key, record in head.items() if key != "__metadata__"}
        for pair in own["weights"]:
            low, high = places[pair[0]]
            pair[1] = zlib.crc32(body[low:high])
        text = json.dumps(own)
        head["__metadata__"] |= {"fastadam": text, "fastadam_crc32": str(zlib.crc32(text.encode()))}
        return files.joined(head, body)
    return data


def main(given):
    if importlib.util.find_spec("atheris") is None:
        print("skipped: atheris is not installed")
        return
    import atheris

    with atheris.instrument_imports(include=["fastadam._core"]):
        import fastadam  # noqa: F401
    warnings.simplefilter("ignore")
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        world = files.Files(folder)
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        rng = np.random.default_rng(given.seed)
        bases = [made for made in world.made if len(made[0]) == 1]
        for i, (*_, contents) in enumerate(bases):
            (corpus / str(i)).write_bytes(bytes([i]) + contents[0])
            for n in range(20):
                (corpus / f"{i}-{n}").write_bytes(bytes([i]) + files.mutated(rng, contents[0], world.others)[1])

        def one(data):
            nonlocal done
            done += 1
            if data:
                load(world, bases[data[0] % len(bases)], resealed(data[1:]) if data[0] & 128 else data[1:])
            if done == given.count:
                print(f"loading_by_coverage: seed {given.seed}: {done} files, 0 findings", flush=True)

        limits = [f"-seed={given.seed}", f"-runs={given.count}", "-max_len=16384", "-rss_limit_mb=4096", "-verbosity=0"]
        atheris.Setup([sys.argv[0], str(corpus), *limits], one)
        atheris.Fuzz()


def load(world, made, data):
    _, start, _, _ = made
    path = world.folder / "mutated"
    path.write_bytes(data)
    variables = [w.copy() for w in start]
    try:
        world.loaded([path], variables)
    except ValueError as error:
        world.judge(error, [path], 0, variables, start)


if __name__ == "__main__":
    main(children.arguments(__doc__, 100_000))
