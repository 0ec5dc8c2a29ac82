"""The roofline shows what was measured below what limits it."""

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from binvit.lab.benchmark import machine, roofline

KERNELS = Path(__file__).parents[1] / "paper_figures" / "measurements" / "08_kernels.csv"


def test_roofline_draws_points_and_limits():
    points = pd.DataFrame({"name": ["kernel", "torch"], "intensity": [100.0, 20.0], "rate": [2000.0, 130.0]})
    fig = roofline.roofline(points, {"popcount": 2600.0}, bandwidth=40.0)
    assert {"kernel", "torch", "popcount"} <= {text.get_text() for text in fig.axes[0].texts}
    plt.close(fig)


def test_names_overlap_neither_each_other_nor_a_point(monkeypatch):
    monkeypatch.setattr(roofline, "memory_bandwidth", lambda: 14e9)
    monkeypatch.setattr(roofline.bits, "popcount_limit", lambda threads: 4.6e12)
    for cpu, kernels in pd.read_csv(KERNELS).groupby("cpu"):
        fig = roofline.draw_roofline(kernels[kernels["model"] == "DeiT-S"])
        (ax,) = fig.axes
        assert ax.get_title(loc="left").removesuffix(machine.OUTDATED) == cpu
        fig.draw_without_rendering()
        boxes = [plt.Text.get_window_extent(text) for text in ax.texts]
        assert len(boxes) >= 20
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        points = [line.get_xydata()[0] for line in ax.lines if line.get_marker() == "o"]
        assert not any(box.contains(*ax.transData.transform(point)) for box in boxes for point in points)
        plt.close(fig)
