"""Tables of experiments without any training."""

import pandas as pd


def table_of(values):
    """A table of conditions, data sets and seeds: (condition, data) -> accuracies by seed."""
    rows = [(*key, seed, value) for key, accuracies in values.items() for seed, value in enumerate(accuracies)]
    return pd.DataFrame(rows, columns=["condition", "data", "seed", "test_accuracy"])
