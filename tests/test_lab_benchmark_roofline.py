"""The roofline shows what was measured below what limits it."""

import matplotlib.pyplot as plt
import pandas as pd

from binvit.lab.benchmark import roofline


def test_roofline_draws_points_and_limits():
    points = pd.DataFrame({"name": ["kernel", "torch"], "intensity": [100.0, 20.0], "rate": [2000.0, 130.0]})
    fig = roofline.roofline(points, {"popcount": 2600.0}, bandwidth=40.0)
    assert {"kernel", "torch", "popcount"} <= {text.get_text() for text in fig.axes[0].texts}
    plt.close(fig)
