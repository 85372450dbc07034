"""8-bit and bfloat16 moments, simulated: which number format keeps Adam's updates nearest to float32's.

    python bench/codes.py [--only CASE ...]   # one core, about 15 minutes; all cases are written to results/codes.json

Every run makes the same steps with float32 moments and with quantised ones. A code is a list of levels; the moment is
divided by the scale of its block, its root is taken if the code is companded, and it is rounded to one of the two
levels around it. A v above 0 takes level 1 at least, unless the code is marked "no floor": level 0 reads as 0.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
ELEMENTS = 2085  # not a multiple of any block: each case has a short block at its end
EPSILON = 1e-8
SAMPLES = 40  # steps at the end of a run over which updates are compared
F = np.float32


def float_levels(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Levels 2**k (1 + j / 2**mantissa_bits) - b, up to 2, where b is the least power of two: the first is 0."""
    octaves, steps = 2**exponent_bits, 2**mantissa_bits
    grid = 2.0 ** (np.arange(octaves)[:, None] - octaves + 1) * (1 + np.arange(steps) / steps)
    return (grid.ravel() - 2.0 ** (1 - octaves)).astype(F)


def dynamic_levels(signed: bool) -> np.ndarray:
    """The dynamic map of bitsandbytes, from its description: 7 decades of means of equal intervals, 0 and 1."""
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        levels += list(10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2)
    return np.sort(np.array(levels)).astype(F)


CODES = {  # levels, and the root that is taken before rounding
    "m e4m3": (float_levels(4, 3), 1),
    "m e3m4": (float_levels(3, 4), 1),
    "m e5m2": (float_levels(5, 2), 1),
    "m linear": (np.linspace(0, 1, 128, dtype=F), 1),
    "m square": (np.linspace(0, 1, 128, dtype=F), 2),
    "m cube": (np.linspace(0, 1, 128, dtype=F), 3),
    "m dynamic": (dynamic_levels(True), 1),
    "v u5m3": (float_levels(5, 3), 1),
    "v u4m4": (float_levels(4, 4), 1),
    "v u6m2": (float_levels(6, 2), 1),
    "v sqrt u4m4": (float_levels(4, 4), 2),
    "v sqrt u5m3": (float_levels(5, 3), 2),
    "v sqrt linear": (np.linspace(0, 1, 256, dtype=F), 2),
    "v fourth root": (np.linspace(0, 1, 256, dtype=F), 4),
    "v linear": (np.linspace(0, 1, 256, dtype=F), 1),
    "v dynamic": (dynamic_levels(False), 1),
}


@dataclass(frozen=True)
class Choice:
    """How both moments are kept; code "float32" or "bf16" needs no block."""

    m: str
    v: str
    block: int = 128
    scale: str = "pow2"  # or "absmax", or "previous": the power of two that would have done for the step before
    rounding: str = "stochastic"  # or "nearest"
    floor: bool = True
    ratio: float = 0.0  # above 0: the code of m is that of m / sqrt(v), whose fixed scale this is

    def __str__(self) -> str:
        if self.m == "bf16":
            return f"bfloat16, {self.rounding}"
        kept = f"m / sqrt(v) {self.m}" if self.ratio else f"m {self.m}"
        return f"{kept}, v {self.v}, {self.block}, {self.scale}, {self.rounding}" + ("" if self.floor else ", no floor")


def between(x: np.ndarray, levels: np.ndarray, rounding: str, rng: np.random.Generator) -> np.ndarray:
    """The level below or above x."""
    below = np.clip(np.searchsorted(levels, x, "right") - 1, 0, len(levels) - 2)
    low, high = levels[below], levels[below + 1]
    share = (x - low) / (high - low)
    return np.where(share > (rng.random(x.shape, dtype=F) if rounding == "stochastic" else 0.5), high, low)


def quantised(
    x: np.ndarray, name: str, choice: Choice, rng: np.random.Generator, before: dict, fixed: np.float32 | None = None
) -> np.ndarray:
    """What x reads as after it was stored; before: the scales of the step before."""
    levels, root = CODES[name]
    blocks = np.zeros((-(-x.size // choice.block), choice.block), F)
    blocks.reshape(-1)[: x.size] = np.abs(x)
    top = blocks.max(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        if fixed is not None:
            scale = np.full_like(top, fixed)
        elif choice.scale == "absmax":
            scale = top / levels[-1] ** root
        else:
            scale = np.exp2(np.ceil(np.log2(top / levels[-1] ** root)))
        if choice.scale == "previous":  # a block without a scale takes its own
            last, before[name] = before.get(name, scale), scale
            scale = np.where(last > 0, last, scale)
        scaled = np.where(scale > 0, blocks / scale, 0).astype(F)
    if root > 1:
        scaled = scaled ** F(1 / root)
    found = between(scaled, levels, choice.rounding, rng)
    if name[0] == "v" and choice.floor:
        found = np.where((blocks > 0) & (found == 0), levels[1], found)
    return np.copysign((found**root * scale).reshape(-1)[: x.size], x).astype(F)


def bfloat16(x: np.ndarray, rounding: str, rng: np.random.Generator) -> np.ndarray:
    bits = x.view(np.uint32)
    added = rng.integers(0, 1 << 16, x.shape, np.uint32) if rounding == "stochastic" else 0x7FFF + (bits >> 16 & 1)
    return ((bits + added.astype(np.uint32)) & np.uint32(0xFFFF0000)).view(F)


class Adam:
    """Updates m / (sqrt(v) + eps), corrected for the first steps, with moments stored as chosen."""

    def __init__(self, size: int, choice: Choice | None, betas: tuple[float, float], seed: int) -> None:
        self.m, self.v, self.steps = np.zeros(size, F), np.zeros(size, F), 0
        self.choice, self.betas, self.rng, self.scales = choice, betas, np.random.default_rng(seed), {}

    def update(self, g: np.ndarray) -> np.ndarray:
        self.steps += 1
        b1, b2 = self.betas
        m, v = F(b1) * self.m + F(1 - b1) * g, F(b2) * self.v + F(1 - b2) * g * g
        root = np.sqrt(v)
        correct = np.sqrt(1 - b2**self.steps) / (1 - b1**self.steps)
        self.keep(m, v, root)
        return F(correct) * m / (root + F(EPSILON))

    def keep(self, m: np.ndarray, v: np.ndarray, root: np.ndarray) -> None:
        choice, rng = self.choice, self.rng
        self.m, self.v = m, v
        if choice is None:
            return
        if choice.m == "bf16":
            self.m, self.v = bfloat16(m, choice.rounding, rng), bfloat16(v, choice.rounding, rng)
        elif choice.v != "float32":
            self.v = quantised(v, "v " + choice.v, choice, rng, self.scales)
        if choice.ratio:
            r = np.divide(m, root, out=np.zeros_like(m), where=root > 0)
            one = F(choice.ratio / CODES["m " + choice.m][0][-1])
            self.m = quantised(r, "m " + choice.m, choice, rng, {}, one) * np.sqrt(self.v)
        elif choice.m not in ("float32", "bf16"):
            self.m = quantised(m, "m " + choice.m, choice, rng, self.scales)


def gradients(case: str, rng: np.random.Generator):
    """Yields the gradient of each step."""
    spread = np.exp(2 * rng.standard_normal(ELEMENTS)).astype(F)
    rows = np.repeat(np.exp(2 * rng.standard_normal(ELEMENTS // 16 + 1)), 16)[:ELEMENTS].astype(F)
    for step in range(10**9):
        g = rng.standard_normal(ELEMENTS, F)
        if case.startswith("shrink"):
            g /= F(case[6:]) if step >= 1000 else F(1)
        elif case == "grow 100":
            g *= F(100) if step >= 2000 else F(1)
        elif case == "lognormal":
            g *= spread
        elif case == "sparse":
            g *= rng.random(ELEMENTS) < 0.01
        elif case == "rows":
            g *= rows * np.repeat(rng.random(ELEMENTS // 16 + 1) < 0.01, 16)[:ELEMENTS]
        elif case == "signal":
            g = F(0.3) * (g + spread)
        yield g


CASES = {  # steps, beta_2
    "noise": (3000, 0.999),
    "noise .95": (1000, 0.95),
    "signal": (3000, 0.999),
    "shrink 10": (10000, 0.999),
    "shrink 1000": (16000, 0.999),
    "grow 100": (2020, 0.999),
    "lognormal": (3000, 0.999),
    "sparse": (4000, 0.999),
    "rows": (4000, 0.999),
}


def compare(case: str, choices: list[Choice]) -> dict[str, dict[str, float]]:
    """Figures of each choice after the same gradients."""
    steps, beta_2 = CASES[case]
    exact = Adam(ELEMENTS, None, (0.9, beta_2), 0)
    tested = [Adam(ELEMENTS, choice, (0.9, beta_2), 1) for choice in choices]
    sums = np.zeros((len(choices), 5))
    for step, g in zip(range(steps), gradients(case, np.random.default_rng(7)), strict=False):
        right = exact.update(g).astype(float)
        for total, adam in zip(sums, tested, strict=True):
            found = adam.update(g).astype(float)
            if step >= steps - SAMPLES:
                total[:3] += found @ right, found @ found, right @ right
                total[3:] = np.maximum(total[3:], [np.abs(found).max(), np.abs(right).max()])
    figures, seen = {}, exact.v > 0
    for choice, adam, (fr, ff, rr, top, right_top) in zip(choices, tested, sums, strict=True):
        ratio = adam.v[seen].astype(float) / exact.v[seen]
        figures[str(choice)] = {
            "v": ratio.mean(),
            "v of sums": adam.v.sum(dtype=float) / exact.v.sum(dtype=float),
            "v geometric": float(np.exp(np.log(ratio[ratio > 0]).mean())) if (ratio > 0).any() else 0.0,
            "v zero": float((ratio == 0).mean()),
            "cosine": fr / np.sqrt(ff * rr) if ff else 0.0,
            "rms": np.sqrt(ff / rr),
            "max": top / right_top,
        }
    return {name: {key: round(float(x), 4) for key, x in row.items()} for name, row in figures.items()}


def train_embedding(choice: Choice | None, seed: int, steps: int = 2000) -> float:
    """Loss, above the least, of classes predicted from embeddings of Zipf-distributed ids."""
    rng = np.random.default_rng(seed)
    ids, width, classes, batch = 512, 16, 24, 64
    chance = 1 / np.arange(1, ids + 1) / (1 / np.arange(1, ids + 1)).sum()
    truth = np.exp(0.75 * rng.standard_normal((ids, 6)) @ rng.standard_normal((6, classes)))
    truth /= truth.sum(axis=1, keepdims=True)
    table, weight = (0.1 * rng.standard_normal(shape).astype(F) for shape in ((ids, width), (width, classes)))
    optimizers = [Adam(x.size, choice, (0.9, 0.999), seed) for x in (table, weight)]

    def probabilities(x: np.ndarray) -> np.ndarray:
        p = np.exp(np.clip(x @ weight, -60, 60).astype(float))
        return p / p.sum(axis=1, keepdims=True)

    for step in range(steps):
        drawn = rng.choice(ids, batch, p=chance)
        labels = (truth[drawn].cumsum(axis=1) < rng.random((batch, 1))).sum(axis=1).clip(max=classes - 1)
        x = table[drawn]
        error = probabilities(x).astype(F)
        error[np.arange(batch), labels] -= 1
        error /= batch
        of_table = np.zeros_like(table)
        np.add.at(of_table, drawn, error @ weight.T)
        rate = F(0.01 * (1 - step / steps))
        for value, adam, g in zip((table, weight), optimizers, (of_table, x.T @ error), strict=True):
            value -= rate * adam.update(g.reshape(-1)).reshape(value.shape)
    return float((chance[:, None] * truth * np.log(truth / probabilities(table))).sum())


def train_parameters(rounding: str, steps: int = 500) -> dict[str, float]:
    """How far bfloat16 parameters go from 1 at a rate of 1e-3, over what float32 ones do, and how far they scatter."""
    rng = np.random.default_rng(0)
    adam, exact = Adam(ELEMENTS, None, (0.9, 0.999), 0), np.ones(ELEMENTS, F)
    stored = exact.copy()
    for _ in range(steps):
        update = F(1e-3) * adam.update(F(0.5) * rng.standard_normal(ELEMENTS, F) + F(0.5))
        exact -= update
        stored = bfloat16(stored - update, rounding, rng)
    return {"moved": float((stored - 1).mean() / (exact - 1).mean()), "scatter": float((stored - exact).std())}


def chosen() -> list[Choice]:
    """Each question varies one thing from e4m3 and u5m3 in blocks of 128."""
    base = ("e4m3", "u5m3")
    return [
        Choice("bf16", "bf16"),
        Choice("bf16", "bf16", rounding="nearest"),
        *(Choice(*base, block=block) for block in (64, 128, 256)),
        Choice(*base, rounding="nearest"),
        Choice(*base, scale="absmax"),
        Choice(*base, scale="absmax", rounding="nearest"),
        Choice(*base, scale="previous"),
        *(Choice(name[2:], "float32") for name in CODES if name[0] == "m"),
        *(Choice("float32", name[2:]) for name in CODES if name[0] == "v"),
        *(Choice("dynamic", "dynamic", 256, "absmax", "nearest", floor) for floor in (False, True)),
        Choice("dynamic", "dynamic", 256, "absmax"),
        Choice("e3m4", "u5m3"),
        *(Choice(m, "u5m3", ratio=8.0) for m in ("e3m4", "e4m3", "square")),
        Choice("e3m4", "sqrt u4m4", ratio=8.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", help='these cases, "parameters" or "embedding"; writes nothing')
    options = parser.parse_args()
    results: dict[str, dict] = {}
    for case in options.only or [*CASES, "parameters", "embedding"]:
        if case == "embedding":
            rows = {str(c or "float32"): [round(train_embedding(c, i), 5) for i in range(3)] for c in [None, *chosen()]}
        elif case == "parameters":
            rows = {f"bfloat16, {rounding}": train_parameters(rounding) for rounding in ("stochastic", "nearest")}
        else:
            rows = compare(case, chosen())
        results[case] = rows
        print(f"\n{case}", flush=True)
        for name, row in rows.items():
            print(f"  {name:58}", row if isinstance(row, list) else " ".join(f"{k} {x:9.4g}" for k, x in row.items()))
    if not options.only:
        RESULTS.joinpath("codes.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
