"""What does `fastadam.schedules.plot` draw? The picture of the guide: `results/schedules.png`."""

from __future__ import annotations

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from common import RESULTS
from fastadam import schedules

STEPS = 1000


def main() -> None:
    plt.figure(figsize=(7, 3.4), layout="constrained")
    for schedule in (
        schedules.ExponentialDecay(0.1, decay_steps=300, decay_rate=0.5),
        schedules.PolynomialDecay(0.1, decay_steps=800, end_learning_rate=0.005),
        schedules.CosineDecay(0.0, decay_steps=850, warmup_target=0.1, warmup_steps=100),
        schedules.CosineDecayRestarts(0.1, first_decay_steps=150, m_mul=0.7),
        schedules.PiecewiseConstantDecay([400, 700], [0.08, 0.04, 0.01]),
    ):
        axes = schedules.plot(schedule, STEPS)
    axes.spines[["top", "right"]].set_visible(False)
    plt.savefig(RESULTS / "schedules.png", dpi=90, pil_kwargs={"optimize": True}, metadata={"Software": None})


if __name__ == "__main__":
    main()
