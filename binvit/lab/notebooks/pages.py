"""The HTML of a report: notebooks by nbconvert, Markdown with its formulas as MathML, pages from the templates beside.

What cannot be narrower than its content, a table or a display formula, sits in an element that scrolls by itself.
"""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import nbformat
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from latex2mathml.converter import convert
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath, MathInlineParser
from pygments.formatters import HtmlFormatter

__all__ = ["markdown", "notebook_cells", "render"]

_TEMPLATES = FileSystemLoader(Path(__file__).parent / "templates")


class _InlineParser(MathInlineParser):
    """Takes the dollars of a formula only, not those of prices: no space at its ends, no digit after.

    Lines may break in a formula, as in JupyterLab.
    """

    SPECIFICATION: ClassVar[dict[str, str]] = MathInlineParser.SPECIFICATION | {
        "inline_math_tex": r"(?<![\\$\w])\$(?P<math_inline_tex>[^\s$](?:[^$]*[^\s$\\])?)\$(?!\d)"
    }


class _Renderer(IPythonRenderer):
    def block_math(self, body: str) -> str:
        return f'<span class="scroll">{_mathml(body, "block")}</span>'

    def inline_math(self, body: str) -> str:
        return f'<span class="formula">{_mathml(body, "inline")}</span>'

    def table(self, text: str) -> str:
        return f'<div class="scroll"><table>\n{text}</table></div>\n'


def _mathml(latex: str, display: str) -> str:
    try:
        return convert(latex.strip(), display=display)
    except Exception:  # a command it does not know: the reader gets the source
        return f"<code>{html.escape(latex)}</code>"


def markdown(text: str, attachments: dict[str, Any] | None = None) -> Markup:
    """Turn Markdown into HTML.

    Args:
        text: Markdown with formulas between dollars.
        attachments: pictures that a notebook's cell keeps for its text.

    Returns:
        HTML that needs no script: formulas are MathML.
    """
    renderer = _Renderer(escape=False, exclude_anchor_links=True, attachments=attachments)
    return Markup(MarkdownWithMath(renderer, inline=_InlineParser(hard_wrap=False)).render(text))


def notebook_cells(notebook: Mapping[str, Any]) -> str:
    """Return the HTML of an executed notebook's cells.

    Args:
        notebook: in the notebook format; the inputs of cells tagged `hide-input` are left out.
    """
    node = nbformat.reads(json.dumps(notebook), as_version=4)
    for cell in node.cells:
        cell.metadata.setdefault("tags", [])
        for output in cell.get("outputs", []):
            if output.output_type == "execute_result":  # the page makes no difference
                output.output_type = "display_data"
    exporter = HTMLExporter(
        template_file="cells.html.j2", template_name="basic", extra_loaders=[_TEMPLATES], filters={"markdown": markdown}
    )
    return exporter.from_notebook_node(node)[0]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@functools.cache
def _environment() -> Environment:
    made = Environment(
        loader=_TEMPLATES, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    made.filters |= {"markdown": markdown, "duration": _duration}
    made.globals["code_style"] = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    return made


def render(template: str, **values: Any) -> str:
    """Fill one of the report's templates; text is escaped unless a template says that it is HTML.

    Args:
        template: a name in `templates/`.
        **values: what the template asks for.

    Returns:
        The page.
    """
    return _environment().get_template(template).render(**values)
