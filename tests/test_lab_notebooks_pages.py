import json
import re
from pathlib import Path

import notebook_maker
import pytest
from bs4 import BeautifulSoup

from binvit.lab.notebooks import pages
from binvit.lab.notebooks.report import write_report
from binvit.lab.notebooks.run import Outcome

WIDE = "| a | b |\n|---|---|\n| $x$ | 2 |\n\nBetween $$\\sum_i a_i$$ and\n\n$$\nb\n$$\n\n    code\n"


@pytest.mark.parametrize(
    ("markdown", "formulas"),
    [
        ("a $x_1 * y_2$ b", 1),
        ("$$\\sum_i a_i$$ and $b$", 2),
        ("costs $5 and $6", 0),
        ("costs $5 and\n$6, or $7 in all", 0),
        ("a $x +\n\\alpha\\,y$ b", 1),
        ("a $x\n\nb$", 0),
        ("`a$b` and `c$`", 0),
        ("```\n$x$\n```", 0),
        ("price \\$5 $x$", 1),
        ("$\\hat{W} = \\begin{cases} 1 & x \\ge 0 \\\\ -1 & \\text{otherwise} \\end{cases}$", 1),
        ("no formula", 0),
    ],
)
def test_formulas_become_mathml_and_nothing_else_does(markdown, formulas):
    assert pages.markdown(markdown).count("<math") == formulas


def test_every_formula_of_the_notebooks_is_shown_as_one():
    notebooks = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"]
        page = BeautifulSoup("".join(pages.markdown("".join(cell["source"])) for cell in cells), "html.parser")
        assert not [code.text for code in page.find_all("code") if "\\" in code.text]  # left as its source
        for code in page.find_all("code"):
            code.decompose()
        assert not re.findall(r".{0,20}[$\\].{0,20}", page.text), path.name


def test_unknown_commands_of_formulas_are_shown_as_written():
    assert pages.markdown("$\\begin{nothing} < $").count("&lt;") == 1


def test_text_is_escaped_and_templates_need_all_their_values():
    outcome = Outcome("<n>", Path("n"), 75.0)
    page = pages.render("notebook.html.j2", title="<T>", outcome=outcome, cells="<p>", smoke=False)
    assert "<title>&lt;T&gt;</title>" in page
    assert "&lt;n&gt;, size archive, 1 min 15 s" in page
    assert "<p>" in page
    with pytest.raises(Exception, match="'cells' is undefined"):
        pages.render("notebook.html.j2", title="T", outcome=outcome, smoke=False)


def test_whatever_may_be_wide_scrolls_by_itself(tmp_path):
    made = notebook_maker.notebook()
    made["cells"][0]["source"] += f"\n\n{WIDE}"
    table = {"output_type": "display_data", "metadata": {}, "data": {"text/html": "<table><tr><td>1</td></tr></table>"}}
    made["cells"][3]["outputs"] = [table, table | {"data": {"text/markdown": WIDE}}]
    made["cells"][4]["outputs"] = [table]
    made["cells"][3]["metadata"]["tags"] = ["figure"]
    made["cells"][3]["outputs"].append(table | {"data": {"image/png": "iVBORw0KGgo="}})
    path = tmp_path / "01_made.ipynb"
    path.write_text(json.dumps(made))
    write_report([Outcome("01_made", path, 1.0)], tmp_path)
    for name, tables, formulas in (("01_made.html", 4, 4), ("index.html", 1, 0)):
        page = BeautifulSoup((tmp_path / name).read_text(), "html.parser")
        rules = dict(re.findall(r"(?m)^([^{}\n]+?) \{([^}]*)\}", page.style.text))
        assert "overflow: auto hidden" in rules[".scroll"]
        assert "overflow-x: auto" in rules["pre"]
        assert "max-width: 100%" in rules["img, svg"]
        assert "overflow: auto hidden" in rules[".formula"]
        wide = page.find_all("table") + page.find_all("math", display="block")
        assert len(page.find_all("table")) == tables
        assert len(page.find_all("math", display="block")) == formulas
        assert all(element.find_parent(class_="scroll") for element in wide)
        figures = page.find_all("img", src=re.compile("^data:image/png;base64,iVBOR"))
        assert figures
        assert all({"scroll", "figure"} <= set(figure.parent["class"]) for figure in figures)
        narrow = re.search(r"@media \(max-width: 45rem\) \{(.*?\n)\}", page.style.text, re.DOTALL)[1]
        for what in (".figure img", ".scroll table"):  # wider than a phone
            assert re.search(rf"{re.escape(what)} {{ [^}}]*max-width: 44rem", narrow)
        inline = page.find_all("math", display="inline")
        assert inline
        assert all(element.find_parent(class_="formula") for element in inline)
        assert page.find("meta", attrs={"name": "viewport"})["content"] == "width=device-width, initial-scale=1"
