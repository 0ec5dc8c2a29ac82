"""binvit: reproduce, question and deploy 1-bit vision transformers."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it. Resolved on first use, so that `import binvit` loads neither torch nor kernels.
_PUBLIC = {
    "PackedViT": "binvit.packed",
    "Scheme": "binvit.nn",
    "binarize": "binvit.nn",
    "calibrate": "binvit.nn",
    "list_schemes": "binvit.nn",
    "load": "binvit.packed",
    "load_official_gsb": "binvit.nn",
    "pack": "binvit.packed",
    "round_vectors": "binvit.nn",
    "save": "binvit.packed",
    "scheme": "binvit.nn",
}
_PACKAGES = ("bits", "lab", "nn", "packed")

__all__ = ["__version__", *sorted(_PUBLIC), *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _PACKAGES:
        value = importlib.import_module(f"binvit.{name}")
    else:
        raise AttributeError(f"module 'binvit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
