"""Histograms deepen beyond thresholds."""

import os

os.environ.setdefault("MPLBACKEND", "agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from binvit.lab.figures import histogram


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_histograms_deepen_beyond_each_threshold():
    values = np.linspace(-1, 1, 2001)
    fig = histogram.value_histogram(values, {"0.7 max": 0.7, "0.9 max": 0.9, "0.7 min": -0.7, "0": 0.0})
    shades = {}
    for bar in fig.axes[0].patches:
        shades.setdefault(bar.get_facecolor(), []).append(bar.get_x() + bar.get_width() / 2)
    middle, second, third = sorted(shades.values(), key=lambda xs: np.mean(np.abs(xs)))
    assert max(map(abs, middle)) < 0.7
    assert min(map(abs, second)) > 0.7
    assert min(third) > 0.9
    assert sum(bar.get_height() * bar.get_width() for bar in fig.axes[0].patches) == pytest.approx(1)


@pytest.mark.parametrize("values", [[], [np.nan, 1.0]])
def test_histograms_need_finite_values(values):
    with pytest.raises(ValueError, match="at least one value and only finite"):
        histogram.value_histogram(values, {})


def test_histogram_of_a_constant_on_a_log_scale():
    assert histogram.value_histogram(np.zeros(10), {"0": 0.0}, log=True).axes
