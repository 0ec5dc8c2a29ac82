"""Notebook files as they are kept: cleaned of what differs between machines, and checked for what nbval relies on.

`python -m binvit.lab.tidy notebooks/*.ipynb` executes notebooks in place, cleans them and names what is wrong.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from binvit.files import atomic_write
from binvit.lab.notebook import convert, declared_types

__all__ = ["TAGS", "clean", "problems", "write"]

TAGS = ("parameters", "nbval-check-output", "nbval-ignore-output", "figure", "claims", "hide-input")
MAX_BYTES = 600_000
MAX_LINES = 25  # of a code cell

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_WIDGET = "application/vnd.jupyter.widget-view+json"
_MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|usr|opt|private|var|mnt|srv|data)/[\w.~-]+")
_PROGRESS = re.compile(r"^.*\d+%\|.*(\n|$)", re.MULTILINE)


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


# ------------------------------------------------------------------------------------------------------------- cleaning


def _without_paths(text: str, project: Path | None) -> str:
    """Write paths relative to the project, the environment, the home folder and the folder of temporary files."""
    places = [(project, "")] if project else []
    places += [
        (Path(sys.prefix), ""),
        (Path(sys.base_prefix), ""),
        (Path(tempfile.gettempdir()), "TMP/"),
        (Path.home(), "~/"),
    ]
    for place, short in places:
        text = re.sub(rf"(?<![\w.-]){re.escape(str(place))}(?:/|(?![\w.-]))", short, text)
    return text


def _clean_output(output: dict[str, Any], project: Path | None) -> dict[str, Any] | None:
    if output["output_type"] == "stream":
        # What a terminal would show: a carriage return starts the line again. Progress bars are dropped.
        text = re.sub(r"^.*\r(?=[^\n])", "", _text(output["text"]), flags=re.MULTILINE)
        text = _without_paths(_PROGRESS.sub("", text), project)
        return {**output, "text": text} if text.strip() else None
    if output["output_type"] == "error":
        cleaned = {key: _without_paths(output[key], project) for key in ("ename", "evalue")}
        return {**output, **cleaned, "traceback": [_without_paths(line, project) for line in output["traceback"]]}
    if _WIDGET in output["data"]:
        return None
    data = {
        kind: _without_paths(_text(value), project) if kind.startswith("text/") else value
        for kind, value in output["data"].items()
    }
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
    return {"cells": cells, "metadata": _METADATA, "nbformat": 4, "nbformat_minor": 5}


def _join_streams(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join pieces of the same stream; where a kernel cuts them depends on timing."""
    joined: list[dict[str, Any]] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output["output_type"] == last["output_type"] == "stream" and output["name"] == last["name"]:
            last["text"] = _text(last["text"]) + _text(output["text"])
        else:
            joined.append(dict(output))
    return joined


def write(notebook: dict[str, Any], path: Path) -> None:
    """Write a notebook as Jupyter does: sources and texts as lists of lines, one space per level."""
    import nbformat

    atomic_write(path, nbformat.writes(nbformat.from_dict(notebook)) + "\n")


# ------------------------------------------------------------------------------------------------------------- checking


def problems(path: Path) -> list[str]:
    """Name everything about a committed notebook that nbval, papermill or the report could stumble over.

    Args:
        path: the notebook; values for its parameters are looked for in `params/` beside it.

    Returns:
        One sentence per problem; empty for a notebook in order.
    """
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells = notebook["cells"]
    except (ValueError, KeyError, TypeError):
        return [f"{path.name} is not a notebook."]
    found = []
    if path.stat().st_size >= MAX_BYTES:
        found.append(f"it has {path.stat().st_size} bytes, allowed are fewer than {MAX_BYTES}")
    if set(notebook["metadata"]) - set(_METADATA):
        found.append(f"its metadata holds {sorted(set(notebook['metadata']) - set(_METADATA))}")
    ids = [cell.get("id") for cell in cells]
    if None in ids or len(set(ids)) < len(ids):
        found.append("cell ids are missing or used twice")
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append("its code cells were not executed once from top to bottom")
    for number, cell in enumerate(cells):
        found += [f"cell {number}: {problem}" for problem in _cell_problems(cell)]
    for tag in ("parameters", "figure", "claims"):
        count = sum(tag in cell["metadata"].get("tags", []) for cell in cells)
        if count != 1:
            found.append(f"{count} cells carry the tag {tag}, one has to")
    if not any("nbval-check-output" in cell["metadata"].get("tags", []) for cell in code):
        found.append("no cell carries the tag nbval-check-output")
    found += _parameter_problems(path, code)
    return [f"{path.name}: {problem}." for problem in found]


def _cell_problems(cell: dict[str, Any]) -> list[str]:
    found = []
    if set(cell["metadata"]) - {"tags"}:
        found.append(f"metadata other than tags: {sorted(set(cell['metadata']) - {'tags'})}")
    found += [f"the tag {tag!r} is not allowed" for tag in cell["metadata"].get("tags", []) if tag not in TAGS]
    lines = _text(cell["source"]).count("\n") + 1
    if cell["cell_type"] == "code" and lines > MAX_LINES:
        found.append(f"{lines} lines of code, allowed are {MAX_LINES}: logic belongs in the library")
    if _MACHINE_PATH.search(_text(cell["source"])):
        found.append(f"a machine's path in its source: {_MACHINE_PATH.search(_text(cell['source'])).group()}")
    for output in cell.get("outputs", []):
        if output["output_type"] == "error":
            found.append(f"an error in its output: {output['ename']}")
            continue
        texts = (
            [output["text"]] if "text" in output else [v for k, v in output["data"].items() if k.startswith("text/")]
        )
        for text in map(_text, texts):
            if match := _MACHINE_PATH.search(text):
                found.append(f"a machine's path in its output: {match.group()}")
            if re.search(r" at 0x[0-9a-f]{6,}", text):
                found.append("an object's address in its output, end the cell with a semicolon")
        if _WIDGET in output.get("data", {}):
            found.append("a widget in its output")
    return found


def _parameter_problems(path: Path, code: list[dict[str, Any]]) -> list[str]:
    from binvit.lab.batch import read_values  # batch needs papermill only when it runs

    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        return []
    source = _text(tagged[0]["source"])
    types = declared_types(source)
    if tagged[0] is not code[0] or not types:
        return ["its first code cell is not a parameters cell of annotated literals"]
    found = [
        f"a parameter line with a second '=' is not read by papermill: {line.strip()!r}"
        for line in source.splitlines()
        if line.count("=") > 1
    ]
    for file in sorted((path.parent / "params").glob(f"{path.name[:2]}.*.yaml")):
        try:
            values = read_values(file)
            unknown = sorted(set(values) - set(types))
            found += [f"{file.name} sets {name}, which is no parameter" for name in unknown]
            for name in sorted(set(values) & set(types)):
                convert(name, values[name], types[name])
        except ValueError as error:
            found.append(f"{file.name}: {error}")
    return found


def main(paths: list[str]) -> int:
    """Execute the notebooks in place with their defaults, clean them and print what is wrong with them.

    Returns:
        0 if all is well, 1 otherwise.
    """
    from binvit.lab.batch import Job, run_job
    from binvit.lab.notebook import project_dir

    found = []
    for path in map(Path, paths):
        print(f"executing {path}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_job(Job(path, {}), Path(folder), progress=sys.stderr.isatty())
            if outcome.error:
                found.append(f"{path.name}: {outcome.error}")
                continue
            executed = json.loads(outcome.executed.read_text(encoding="utf-8"))
        write(clean(executed, project_dir()), path)
        found += problems(path)
    print("\n".join(found) or f"{len(paths)} notebooks executed, no problem found")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
