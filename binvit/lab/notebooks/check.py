"""What is wrong with a committed notebook: whatever nbval, papermill or the report could stumble over."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from binvit.lab.notebooks.clean import METADATA, WIDGET, joined
from binvit.lab.notebooks.parameters import convert, declared_types

TAGS = (
    "parameters",
    "nbval-check-output",
    "nbval-ignore-output",
    "figure",
    "claims",
    "hide-input",
    "measures-time",
    "measures-trained",
)
MAX_BYTES = 600_000
MAX_LINES = 25  # of a code cell
_MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|usr|opt|private|var|mnt|srv|data)/[\w.~-]+")


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
    if set(notebook["metadata"]) - set(METADATA):
        found.append(f"its metadata holds {sorted(set(notebook['metadata']) - set(METADATA))}")
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
    lines = joined(cell["source"]).count("\n") + 1
    if cell["cell_type"] == "code" and lines > MAX_LINES:
        found.append(f"{lines} lines of code, allowed are {MAX_LINES}: logic belongs in the library")
    if machine := _MACHINE_PATH.search(joined(cell["source"])):
        found.append(f"a machine's path in its source: {machine.group()}")
    for output in cell.get("outputs", []):
        if output["output_type"] == "error":
            found.append(f"an error in its output: {output['ename']}")
            continue
        texts = (
            [output["text"]] if "text" in output else [v for k, v in output["data"].items() if k.startswith("text/")]
        )
        for text in map(joined, texts):
            if match := _MACHINE_PATH.search(text):
                found.append(f"a machine's path in its output: {match.group()}")
            if re.search(r" at 0x[0-9a-f]{6,}", text):
                found.append("an object's address in its output, end the cell with a semicolon")
            if match := re.search(r"\d+ rows (?:×|x) \d+ columns", text):
                found.append(f"a table that is cut in its output ({match.group()}): lay it out side by side")
        if WIDGET in output.get("data", {}):
            found.append("a widget in its output")
    return found


def _parameter_problems(path: Path, code: list[dict[str, Any]]) -> list[str]:
    from binvit.lab.notebooks.plan import read_values

    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        return []
    source = joined(tagged[0]["source"])
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
