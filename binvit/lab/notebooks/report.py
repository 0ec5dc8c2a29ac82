"""The report of a batch: one HTML page per executed notebook and an index with each one's question, figure and claims.

The pages need no network: styles and figures are inside, formulas become MathML.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from binvit.files import atomic_write
from binvit.lab.notebooks.run import Outcome

__all__ = ["Summary", "summarize", "write_report"]

_STYLE = """
:root { --ink: #222; --quiet: #667; --line: #dde; --paper: #fff; --code: #f6f7f9; --yes: #0a7d55; --no: #b3402a }
body { color: var(--ink); background: var(--paper); font: 16px/1.55 system-ui, sans-serif; margin: 0 auto;
  max-width: 60rem; padding: 2rem 1.2rem 4rem }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .6rem } h2 { font-size: 1.25rem; margin: 2rem 0 .5rem }
h3 { font-size: 1.05rem } a { color: #05639e } img, svg { max-width: 100%; height: auto }
pre, code { font: .85rem/1.45 ui-monospace, Menlo, Consolas, monospace } p code, li code { background: var(--code) }
pre { background: var(--code); margin: .4rem 0; overflow-x: auto; padding: .6rem .8rem }
table { border: 0; border-collapse: collapse; font-size: .9rem; margin: .8rem 0; display: block; overflow-x: auto }
th, td { border: 0; border-bottom: 1px solid var(--line); padding: .25rem .9rem .25rem 0; vertical-align: top }
th { font-weight: 600 } th, td { text-align: left !important; white-space: normal }
math { font-size: 1.08em } math[display=block] { margin: .9rem 0 }
details.code { margin: .5rem 0 } details.code > summary { color: var(--quiet); cursor: pointer; font-size: .8rem }
.quiet { color: var(--quiet); font-size: .9rem } .failed { color: var(--no); font-weight: 600 }
.error pre { border-left: 3px solid var(--no) }
article { border-top: 1px solid var(--line); padding-top: .6rem; margin-top: 1.8rem }
article h2 { margin-top: .3rem } article img { display: block; margin: .8rem 0 }
nav { font-size: .9rem; margin-bottom: 1.5rem }
"""

_RECORDS = "outcomes.json"

# nbconvert's own pages load scripts from other hosts; this template keeps the content alone.
_TEMPLATE = """{%- extends 'display_priority.j2' -%}
{%- block input_group -%}
{%- if cell.source.strip() %}
<details class="code"{% if 'parameters' in cell.metadata.tags or 'injected-parameters' in cell.metadata.tags %} open
{%- endif %}><summary>code</summary>{{ cell.source | highlight_code(metadata=cell.metadata) }}</details>
{%- endif -%}
{%- endblock input_group -%}
{%- block markdowncell scoped %}<section>{{ cell.source | markdown2html }}</section>{% endblock markdowncell -%}
{%- block stream %}<pre>{{ output.text | ansi2html }}</pre>{% endblock stream -%}
{%- block data_text scoped %}<pre>{{ output.data['text/plain'] | ansi2html }}</pre>{% endblock data_text -%}
{%- block data_html scoped %}<div>{{ output.data['text/html'] }}</div>{% endblock data_html -%}
{%- block data_markdown scoped %}{{ output.data['text/markdown'] | markdown2html }}{% endblock data_markdown -%}
{%- block data_svg scoped %}{{ output.data['image/svg+xml'] }}{% endblock data_svg -%}
{%- block data_png scoped %}<img alt="figure" src="data:image/png;base64,{{ output.data['image/png'] }}">
{%- endblock data_png -%}
{%- block data_jpg scoped %}<img alt="figure" src="data:image/jpeg;base64,{{ output.data['image/jpeg'] }}">
{%- endblock data_jpg -%}
{%- block error %}<div class="error"><pre>{{ super() }}</pre></div>{% endblock error -%}
{%- block traceback_line %}{{ line | ansi2html }}
{% endblock traceback_line -%}
"""

# Code first, so that a dollar sign in code is no formula.
_MATH = re.compile(
    r"(?P<code>```.*?```|`[^`\n]*`)|\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$\\])?)\$(?!\d)",
    re.S,
)


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


# ---------------------------------------------------------------------------------------------------------------- pages


class _Formulas:
    """Formulas set aside while Markdown is rendered, since its rules for * and _ would break them."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def hide(self, markdown: str) -> str:
        return _MATH.sub(self._hide, markdown)

    def _hide(self, match: re.Match) -> str:
        if match["code"]:
            return match["code"]
        self.found.append(_mathml(match["block"] or match["inline"], "block" if match["block"] else "inline"))
        return f"FORMULA{len(self.found) - 1}END"

    def show(self, page: str) -> str:
        return re.sub(r"FORMULA(\d+)END", lambda match: self.found[int(match[1])], page)


def _mathml(latex: str, display: str) -> str:
    from latex2mathml.converter import convert

    try:
        return convert(latex.strip(), display=display)
    except Exception:  # a command it does not know: the reader gets the source
        return f"<code>{html.escape(latex)}</code>"


def _document(title: str, body: str, style: str = "") -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}{style}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _markdown(text: str, formulas: _Formulas) -> str:
    from nbconvert.filters import markdown2html

    return markdown2html(formulas.hide(text))


def _page(notebook: dict[str, Any], title: str, note: str) -> str:
    import nbformat
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    formulas = _Formulas()
    node = nbformat.reads(json.dumps(notebook), as_version=4)
    for cell in node.cells:
        if cell.cell_type == "markdown":
            cell.source = formulas.hide(cell.source)
        elif "hide-input" in cell.metadata.get("tags", []):
            cell.source = ""
        cell.metadata.setdefault("tags", [])
        for output in cell.get("outputs", []):
            if output.output_type == "execute_result":  # the page makes no difference
                output.output_type = "display_data"
    loader = DictLoader({"binvit.html.j2": _TEMPLATE})
    exporter = HTMLExporter(
        template_file="binvit.html.j2", template_name="basic", extra_loaders=[loader], exclude_anchor_links=True
    )
    body, _ = exporter.from_notebook_node(node)
    nav = f'<nav><a href="index.html">All notebooks</a> <span class="quiet">{note}</span></nav>'
    return _document(title, nav + formulas.show(body), HtmlFormatter(style="friendly").get_style_defs(".highlight"))


def _seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _entry(outcome: Outcome) -> str:
    formulas = _Formulas()
    summary = None
    if outcome.executed.is_file():
        summary = summarize(json.loads(outcome.executed.read_text(encoding="utf-8")))
    title = html.escape(summary.title) if summary else outcome.name
    if summary:
        title = f'<a href="{outcome.name}.html">{title}</a>'
    parts = [f'<article id="{outcome.name}"><h2>{title}</h2>']
    if summary and summary.question:
        parts.append(_markdown(summary.question, formulas))
    if outcome.error:
        parts.append(f'<p class="failed">Failed: {html.escape(outcome.error)}</p>')
    if summary and summary.figure:
        parts.append(f'<img alt="figure of {outcome.name}" src="data:image/png;base64,{summary.figure.strip()}">')
    if summary and summary.claims:
        parts.append(summary.claims)
    copy = f', <a href="notebooks/{outcome.executed.name}">executed notebook</a>' if summary else ""
    parts.append(f'<p class="quiet">size {outcome.size}, {_seconds(outcome.seconds)}{copy}</p></article>')
    return formulas.show("\n".join(parts))


def _earlier(out: Path) -> dict[str, Outcome]:
    """Return the outcomes that earlier batches have left in this folder, as far as their notebooks are still there."""
    try:
        records = json.loads((out / _RECORDS).read_text(encoding="utf-8"))
        found = [Outcome(**record | {"executed": out / "notebooks" / record["executed"]}) for record in records]
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or not ours: the report starts afresh
        return {}
    return {outcome.name: outcome for outcome in found if outcome.executed.is_file()}


def write_report(outcomes: Sequence[Outcome], out: Path) -> Path:
    """Write one page per notebook and the index of all of them, those of earlier batches in the same folder included.

    Args:
        outcomes: what `batch.run` returned; executed copies lie in `out/notebooks`.
        out: the folder of the report.

    Returns:
        The path of the index.
    """
    for outcome in outcomes:
        page = out / f"{outcome.name}.html"
        page.unlink(missing_ok=True)
        if outcome.executed.is_file():
            notebook = json.loads(outcome.executed.read_text(encoding="utf-8"))
            note = f"{outcome.name}, size {outcome.size}, {_seconds(outcome.seconds)}"
            atomic_write(page, _page(notebook, summarize(notebook).title, note))
    shown = sorted((_earlier(out) | {outcome.name: outcome for outcome in outcomes}).values(), key=lambda o: o.name)
    records = [dataclasses.asdict(outcome) | {"executed": outcome.executed.name} for outcome in shown]
    atomic_write(out / _RECORDS, json.dumps(records, indent=1) + "\n")
    failed = sum(outcome.error is not None for outcome in shown)
    total = _seconds(sum(outcome.seconds for outcome in shown))
    state = f'<span class="failed">{failed} failed</span>' if failed else "all finished"
    versions = ", ".join(f"{name} {version(name)}" for name in ("binvit", "torch", "timm", "numpy", "numba"))
    head = (
        "<h1>1-bit vision transformers: the experiments</h1>\n"
        f'<p class="quiet">{len(shown)} notebook{"s" * (len(shown) != 1)}, {state}, {total} in all. {versions}.</p>'
    )
    index = out / "index.html"
    atomic_write(index, _document("binvit: the experiments", "\n".join([head, *map(_entry, shown)])))
    return index
