"""The report of a batch: one HTML page per executed notebook and an index with each one's question, figure and claims.

The pages need no network: styles and figures are inside, formulas become MathML.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from binvit.config import read_json
from binvit.files import atomic_write, remove_leftovers
from binvit.lab.notebooks import pages
from binvit.lab.notebooks.run import Outcome

__all__ = ["Summary", "join_reports", "summarize", "write_report"]

RETRAINED = "retrained.csv"  # of a report: archived trials that were trained again
_RECORDS = "outcomes.json"


@dataclass(frozen=True)
class Summary:
    """What the index shows of a notebook: its title, the question, the figure as base64 PNG and the claims as HTML."""

    title: str
    question: str
    figure: str | None
    claims: str | None


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def _tagged(notebook: dict[str, Any], tag: str, kind: str) -> str | None:
    """Return the last output of a kind in the cells that carry a tag."""
    found = [
        _text(output["data"][kind])
        for cell in notebook["cells"]
        if tag in cell["metadata"].get("tags", [])
        for output in cell.get("outputs", [])
        if kind in output.get("data", {})
    ]
    return found[-1] if found else None


def _tagged_text(notebook: dict[str, Any], tag: str) -> str | None:
    texts = [
        _text(output["text"])
        for cell in notebook["cells"]
        if tag in cell["metadata"].get("tags", [])
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream"
    ]
    return f"<pre>{html.escape(''.join(texts))}</pre>" if texts else None


def summarize(notebook: dict[str, Any]) -> Summary:
    """Read from a notebook what the index shows.

    Args:
        notebook: an executed notebook as a dictionary. Its first cell holds the title and, as the next paragraph, the
            question; the cells tagged `figure` and `claims` hold what these words say.
    """
    opening = next((_text(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"), "")
    title, _, rest = opening.strip().partition("\n")
    question = next((part.strip() for part in re.split(r"\n\s*\n", rest) if part.strip()), "")
    return Summary(
        title=title.lstrip("# ").strip() or "Untitled",
        question=question,
        figure=_tagged(notebook, "figure", "image/png"),
        claims=_tagged(notebook, "claims", "text/html") or _tagged_text(notebook, "claims"),
    )


def _entry(outcome: Outcome) -> tuple[dict[str, Any], str]:
    """Return what the index shows of an outcome, and the cells of its page; none without a readable executed copy."""
    if not outcome.executed.is_file():
        return {"outcome": outcome, "summary": None}, ""
    try:
        notebook = read_json(outcome.executed.read_bytes(), "it")
        return {"outcome": outcome, "summary": summarize(notebook)}, pages.notebook_cells(notebook)
    except Exception as error:  # cut off by a full disk, or not written by us: the other notebooks are shown
        why = outcome.error or f"Its executed copy cannot be read ({type(error).__name__})."
        return {"outcome": dataclasses.replace(outcome, error=why), "summary": None}, ""


def _recorded(out: Path) -> list[Outcome]:
    """Return the outcomes that a report has recorded.

    Raises:
        FileNotFoundError: there are no records.
        OSError: they cannot be read, which says nothing of what they hold.
        ValueError: they are damaged, or not ours.
    """
    content = (out / _RECORDS).read_bytes()
    try:
        records = read_json(content, _RECORDS)
        return [Outcome.from_dict(record | {"executed": out / "notebooks" / record["executed"]}) for record in records]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"The records {out / _RECORDS} are damaged: {error}") from None


def _earlier(out: Path) -> dict[str, Outcome]:
    """Return the outcomes that earlier batches have left in this folder, as far as their notebooks are still there."""
    try:
        found = _recorded(out)
    except (FileNotFoundError, ValueError):  # none yet, or not ours: the report starts afresh
        return {}
    return {outcome.name: outcome for outcome in found if outcome.executed.is_file()}


def write_report(outcomes: Sequence[Outcome], out: Path) -> Path:
    """Write one page per notebook and the index of all of them, those of earlier batches in the same folder included.

    A notebook whose page cannot be written counts as failed and stops no other. What killed writers have left
    in the folder is removed.

    Args:
        outcomes: what `run` returned; executed copies lie in `out/notebooks`.
        out: the folder of the report.

    Returns:
        The path of the index.

    Raises:
        OSError: something cannot be written, which is told after all else is there; or the records of earlier batches
            cannot be read, and stay as they are.
        ValueError: the index or the records have the place of something that is no file, likewise.
    """
    failures: list[Exception] = []
    for folder in (out, out / "notebooks"):
        with contextlib.suppress(OSError):  # a folder that cannot be listed can still be written to
            remove_leftovers(folder)
    entries = {outcome.name: _write_page(outcome, out, failures) for outcome in outcomes}
    known = _earlier(out) | {outcome.name: outcome for outcome in outcomes}
    entries |= {name: _entry(outcome)[0] for name, outcome in known.items() if name not in entries}
    shown = [entries[name] | {"page": (out / f"{name}.html").is_file()} for name in sorted(known)]
    records = [known[name].to_dict() | {"executed": known[name].executed.name} for name in sorted(known)]
    retrained, index = "", out / "index.html"
    with _noted(failures):
        retrained = _retrained(out)
    with _noted(failures):
        atomic_write(out / _RECORDS, json.dumps(records, indent=1) + "\n")
    versions = ", ".join(f"{name} {version(name)}" for name in ("binvit", "torch", "timm", "numpy", "numba"))
    about = {"title": "binvit: the experiments", "versions": versions, "retrained": retrained}
    smoke = any(outcome.size == "smoke" for outcome in known.values())
    with _noted(failures):
        atomic_write(index, pages.render("index.html.j2", entries=shown, smoke=smoke, **about))
    if failures:
        raise failures[0]
    return index


@contextlib.contextmanager
def _noted(failures: list[Exception]) -> Iterator[None]:
    """Go on after something that cannot be read or written, and note why."""
    try:
        yield
    except (OSError, ValueError) as error:
        failures.append(error)


def _write_page(outcome: Outcome, out: Path, failures: list[Exception]) -> dict[str, Any]:
    """Write the page of a notebook, if there is something to show, and return what the index shows of it."""
    entry, cells = _entry(outcome)
    page = out / f"{outcome.name}.html"
    try:
        page.unlink(missing_ok=True)
        if entry["summary"]:
            about = {"title": entry["summary"].title, "outcome": outcome, "smoke": outcome.size == "smoke"}
            atomic_write(page, pages.render("notebook.html.j2", cells=cells, **about))
    except (OSError, ValueError) as error:
        failures.append(error)
        why = outcome.error or f"Its page could not be written ({getattr(error, 'strerror', None) or error})."
        return entry | {"outcome": dataclasses.replace(outcome, error=why)}
    return entry


def _retrained(out: Path) -> str:
    """Return the table of the archived trials that were trained again as HTML, "" if there is none that is sound."""
    try:
        table = pd.read_csv(out / RETRAINED, dtype={"notebook": str})
    except (FileNotFoundError, ValueError):
        return ""
    return table.to_html(index=False, border=0, float_format="{:.2f}".format, na_rep="")


def join_reports(folders: Sequence[Path], out: Path) -> Path:
    """Write one report of notebooks that ran in folders of their own, as jobs of a cluster.

    Args:
        folders: what `write_report` has written; where the records are absent or damaged, or a copy is gone, the
            notebook counts as failed.
        out: the folder of the new report.

    Returns:
        The path of the index.
    """
    outcomes = []
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    for folder in folders:
        for outcome in _all_of(folder):
            copy = out / "notebooks" / outcome.executed.name
            error = outcome.error
            if outcome.executed.is_file():
                shutil.copy(outcome.executed, copy)
            else:
                copy.unlink(missing_ok=True)  # one of an earlier report must not pass for this one's
                error = error or "Its executed copy is gone."
            outcomes.append(dataclasses.replace(outcome, executed=copy, error=error))
    return write_report(outcomes, out)


def _all_of(folder: Path) -> list[Outcome]:
    """Return the outcomes of a folder; without sound records those of the copies there, which then count as failed."""
    try:
        return _recorded(folder)
    except (FileNotFoundError, ValueError) as error:
        state = "gone" if isinstance(error, FileNotFoundError) else "damaged"
        why = f"The records in {folder.name} are {state}, so that it may not have finished."
        copies = sorted((folder / "notebooks").glob("[!.]*.ipynb")) or [folder / "notebooks" / f"{folder.name}.ipynb"]
        return [Outcome(copy.stem, copy, 0.0, why, "unknown") for copy in copies]
