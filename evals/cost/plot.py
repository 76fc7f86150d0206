"""Draws cost.svg from results.json. Needs matplotlib, which the study itself does not: requirements.txt."""

from __future__ import annotations

import json

import matplotlib as mpl

from cost.study import HERE, RESULTS, line, series

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "cost"  # the same file from the same results


def main() -> None:
    from matplotlib import pyplot as plt

    results = json.loads(RESULTS.read_text())
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, along in zip(axes, ("blocks", "tokens"), strict=True):
        points = series(results, along)
        intercept, slope, _ = line(points)
        ends = [0, points[-1][0]]
        axis.plot(ends, [intercept + slope * x for x in ends], color="tab:grey", linewidth=1)
        axis.plot(*zip(*points, strict=True), "o", color="tab:blue")
        axis.set(xlabel=f"calibration {along}" if along == "tokens" else along, xlim=(0, None), ylim=(0, None))
    axes[0].set_ylabel("CPU time of the whole run, s")
    figure.savefig(HERE / "cost.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
