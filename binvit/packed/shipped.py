"""Trained models that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

MODELS = Path(__file__).with_name("models")
"""Folder of the packed files; each has its model card in its header."""


def list_models() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(path.stem for path in MODELS.glob("*.safetensors"))


def find_model(path: str | Path) -> Path:
    """Return the file of a model.

    Args:
        path: the file itself, or the name of a model that comes with the package; a file of that name goes first.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(path)
    if path.is_file():
        return path
    if str(path) in list_models():
        return MODELS / f"{path}.safetensors"
    raise FileNotFoundError(f"There is no model {path}; the package brings {', '.join(list_models())}.")
