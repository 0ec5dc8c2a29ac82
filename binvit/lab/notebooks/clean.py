"""Notebook files as they are kept: without timestamps, progress bars, widgets and paths of a machine, figures small."""

from __future__ import annotations

import base64
import io
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from binvit.files import atomic_write

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET = "application/vnd.jupyter.widget-view+json"
PNG = "image/png"
_PROGRESS = re.compile(r"^.*\d+%\|.*(\n|$)", re.MULTILINE)


def joined(value: str | list[str]) -> str:
    """Return a source or text of a notebook, which the format keeps as one text or as lines, as one text."""
    return value if isinstance(value, str) else "".join(value)


def _without_paths(text: str, project: Path | None) -> str:
    """Write paths relative to the project, the environment, the home folder and the folder of temporary files."""
    places = [(project, "")] if project else []
    places += [
        (Path(sys.prefix), ""),
        (Path(sys.base_prefix), ""),
        (Path(tempfile.gettempdir()), "TMP/"),
        (Path.home(), "~/"),
    ]
    for place, short in sorted(places, key=lambda pair: -len(pair[0].parts)):  # what lies in another comes first
        text = re.sub(rf"(?<![\w.-]){re.escape(str(place))}(?:/|(?![\w.-]))", short, text)
    return text


def _in_few_colors(png: str) -> str:
    """Return a figure in 256 colours, of which drawings need no more: a third of the bytes.

    Args:
        png: a PNG file in base64; what has a palette or transparent pixels, or is none, is returned as it is.
    """
    from PIL import Image

    written = io.BytesIO()
    try:
        with Image.open(io.BytesIO(base64.b64decode(png))) as image:
            if image.mode == "P" or ("A" in image.mode and min(image.getchannel("A").tobytes()) < 255):
                return png
            few = image.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
            few.save(written, "PNG", optimize=True)
    except (OSError, ValueError):
        return png
    return base64.b64encode(written.getvalue()).decode()


def _clean_output(output: dict[str, Any], project: Path | None) -> dict[str, Any] | None:
    if output["output_type"] == "stream":
        # What a terminal would show: a carriage return starts the line again. Progress bars are dropped.
        text = re.sub(r"^.*\r(?=[^\n])", "", joined(output["text"]), flags=re.MULTILINE)
        text = _without_paths(_PROGRESS.sub("", text), project)
        return {**output, "text": text} if text.strip() else None
    if output["output_type"] == "error":
        cleaned = {key: _without_paths(output[key], project) for key in ("ename", "evalue")}
        return {**output, **cleaned, "traceback": [_without_paths(line, project) for line in output["traceback"]]}
    if WIDGET in output["data"]:
        return None
    data = {
        kind: _without_paths(joined(value), project) if kind.startswith("text/") else value
        for kind, value in output["data"].items()
    }
    if PNG in data:
        data[PNG] = _in_few_colors(joined(data[PNG]))
    sizes = {kind: value for kind, value in output["metadata"].items() if kind.startswith("image/")}
    return {**output, "data": data, "metadata": sizes}


def clean(notebook: dict[str, Any], project: Path | None = None) -> dict[str, Any]:
    """Remove timestamps, papermill's metadata, progress bars and machine paths from an executed notebook.

    Args:
        notebook: a notebook as a dictionary of format 4.5.
        project: the folder that paths are written relative to.

    Returns:
        A new notebook that is the same for every run with the same results.
    """
    cells = []
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        if "papermill-error-cell-tag" in tags:  # a marker with a link that other pages do not have
            continue
        cell = {**cell, "metadata": {"tags": tags} if tags else {}}
        if "injected-parameters" in tags:
            cell["id"] = "injected-parameters"
        if cell["cell_type"] == "code":
            outputs = [_clean_output(output, project) for output in cell["outputs"]]
            cell["outputs"] = _join_streams([output for output in outputs if output])
        cells.append(cell)
    return {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def _join_streams(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join pieces of the same stream; where a kernel cuts them depends on timing."""
    merged: list[dict[str, Any]] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last and output["output_type"] == last["output_type"] == "stream" and output["name"] == last["name"]:
            last["text"] = joined(last["text"]) + joined(output["text"])
        else:
            merged.append(dict(output))
    return merged


def write(notebook: dict[str, Any], path: Path) -> None:
    """Write a notebook as Jupyter does: sources and texts as lists of lines, one space per level."""
    import nbformat

    atomic_write(path, nbformat.writes(nbformat.from_dict(notebook)) + "\n")
