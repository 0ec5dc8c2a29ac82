"""Names of data sets: "digits", "cifar100", ..., and "folder:PATH" or "parquet:FILE"."""

from __future__ import annotations

from typing import Any

from binvit.config import show

KINDS = ("digits", "cifar10", "cifar100", "flowers102", "pets", "fashion_mnist", "chaoyang", "folder", "parquet")
_WITH_PATH = ("folder", "parquet")


def split_name(name: Any) -> tuple[str, str]:
    """Return the kind of a data set and the path behind the colon, which may be empty.

    Args:
        name: what `load_data` takes.

    Raises:
        ValueError: it is no such name.
    """
    kind, colon, path = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind not in KINDS or (colon and (not path or kind == "digits")):
        valid = ", ".join(f"{known}:PATH" if known in _WITH_PATH else known for known in KINDS)
        raise ValueError(f"Unknown data set {show(name)}; valid names are {valid}.")
    return kind, path
