import base64
import copy
import io
import json
import sys
import tempfile
from pathlib import Path

import notebook_maker
import numpy as np
import pytest
from PIL import Image

from binvit.lab.notebooks import check, clean, refresh


def change(tmp_path: Path, edit) -> list[str]:
    """Return the problems of a good notebook after an edit."""
    made = notebook_maker.notebook()
    edit(made)
    path = tmp_path / "01_made.ipynb"
    path.write_text(json.dumps(made))
    return check.problems(path)


def stream(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": text}


def shown(**data: str) -> dict:
    return {
        "output_type": "display_data",
        "metadata": {},
        "data": {kind.replace("_", "/"): v for kind, v in data.items()},
    }


def code(made: dict, number: int) -> dict:
    return [cell for cell in made["cells"] if cell["cell_type"] == "code"][number]


def test_good_notebook_has_no_problems(tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "01.cpu.yaml").write_text("count: 3\nnames: [a, b]\nrate: 1.0e-4\n")
    assert change(tmp_path, lambda made: None) == []


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda made: code(made, 1).update(execution_count=None), "not executed once from top to bottom"),
        (lambda made: code(made, 1).update(execution_count=5), "not executed once from top to bottom"),
        (lambda made: code(made, 0)["metadata"].update(tags=[]), "0 cells carry the tag parameters"),
        (lambda made: code(made, 1)["metadata"].update(tags=["parameters"]), "2 cells carry the tag parameters"),
        (lambda made: code(made, 2)["metadata"].update(tags=[]), "0 cells carry the tag figure"),
        (lambda made: code(made, 3)["metadata"].update(tags=["claims"]), "no cell carries the tag nbval-check-output"),
        (lambda made: code(made, 2)["metadata"]["tags"].append("nbval-skip"), "tag 'nbval-skip' is not allowed"),
        (lambda made: code(made, 2)["metadata"].update(papermill={}), "metadata other than tags: ['papermill']"),
        (lambda made: made["metadata"].update(papermill={}), "its metadata holds ['papermill']"),
        (lambda made: made["cells"][0].pop("id"), "ids are missing or used twice"),
        (lambda made: made["cells"][0].update(id="cell-1"), "ids are missing or used twice"),
        (
            lambda made: code(made, 1)["outputs"].append(
                {"output_type": "error", "ename": "ValueError", "evalue": "x", "traceback": []}
            ),
            "an error in its output: ValueError",
        ),
        (lambda made: code(made, 1)["outputs"].append(stream("in /ho" + "me/me/x")), "a machine's path in its output"),
        (lambda made: code(made, 1)["outputs"].append(shown(text_html="<i>/tm" + "p/x</i>")), "a machine's path"),
        (lambda made: code(made, 1)["outputs"].append(shown(text_plain="<A at 0x7f01aa00>")), "an object's address"),
        (
            lambda made: code(made, 1)["outputs"].append(shown(text_html="<p>99 rows × 5 columns</p>")),
            "a table that is cut in its output (99 rows × 5 columns)",
        ),
        (lambda made: code(made, 1)["outputs"].append(stream("x" * 700_000)), "allowed are fewer than 600000"),
        (lambda made: code(made, 1).update(source="1\n" * 25 + "1"), "cell 2: 26 lines of code, allowed are 25"),
        (lambda made: code(made, 0).update(source="count = 2"), "not a parameters cell of annotated literals"),
        (lambda made: code(made, 0).update(source="count: int = 2  # a=b"), "a second '='"),
    ],
)
def test_each_problem_is_named(tmp_path, edit, sentence):
    found = change(tmp_path, edit)
    assert any(sentence in problem for problem in found), found
    assert all(problem.startswith("01_made.ipynb: ") and problem.endswith(".") for problem in found)


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        ("coutn: 3", "01.cpu.yaml sets coutn, which is no parameter"),
        ("rate: 1e-4", "write 1.0e-4"),
        ("count: [1]", "count must be a whole number, got [1]"),
        ("- count", "has to map parameter names"),
        ("count: [", "is no readable YAML"),
    ],
)
def test_parameter_files_are_checked(tmp_path, yaml, sentence):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "01.cpu.yaml").write_text(yaml)
    (problem,) = change(tmp_path, lambda made: None)
    assert sentence in problem


def test_what_is_no_notebook(tmp_path):
    path = tmp_path / "01_made.ipynb"
    path.write_text("not JSON")
    assert check.problems(path) == ["01_made.ipynb is not a notebook."]


def test_a_place_in_another_has_its_own_name(tmp_path, monkeypatch):
    """A home in the folder of temporary files, an environment in the project, a project in the home."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "project" / ".venv"))
    made, expected = notebook_maker.notebook(), notebook_maker.notebook()
    places = (tmp_path, tmp_path / "project", tmp_path / "project" / ".venv", tempfile.gettempdir())
    code(made, 1)["outputs"] = [stream(" ".join(f"{place}/a" for place in places))]
    code(expected, 1)["outputs"] = [stream("~/a a a TMP/a")]
    assert clean.clean(made, tmp_path / "project") == expected


def test_clean_removes_what_differs_between_runs(tmp_path):
    made = notebook_maker.notebook()
    expected = copy.deepcopy(made)
    made["metadata"] |= {"papermill": {"start_time": "now"}, "widgets": {}, "language_info": {"version": "3.11.7"}}
    for cell in made["cells"]:
        cell["metadata"] |= {"papermill": {"duration": 1.5}, "execution": {}}
    marker = notebook_maker.cell("markdown", "An exception", 9, ("papermill-error-cell-tag",))
    made["cells"].insert(1, marker)
    code(made, 1)["outputs"] = [
        shown(text_plain="0%", **{"application_vnd.jupyter.widget-view+json": "{}"}),
        stream("\r 10%|#    | 1/10\r100%|#####| 10/10\n", "stderr"),
        stream(f"read {tmp_path}/results/x.json\n"),
        stream(f"from {sys.prefix}/lib/y.py and {Path.home()}/z and {tempfile.gettempdir()}/ipykernel_1\n"),
        stream("loss 3\rloss 2\n"),
    ]
    code(expected, 1)["outputs"] = [stream("read results/x.json\nfrom lib/y.py and ~/z and TMP/ipykernel_1\nloss 2\n")]
    cleaned = clean.clean(made, tmp_path)
    assert cleaned == expected
    assert clean.clean(cleaned, tmp_path) == cleaned


def test_clean_keeps_figures_and_their_sizes():
    made = notebook_maker.notebook()
    figure = shown(image_png="AAAA", text_plain="<Figure>") | {
        "metadata": {"image/png": {"width": 300}, "isolated": True}
    }
    code(made, 2)["outputs"] = [figure]
    assert code(clean.clean(made), 2)["outputs"] == [figure | {"metadata": {"image/png": {"width": 300}}}]


def png_of(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def cleaned_figure(png: str) -> str:
    made = notebook_maker.notebook()
    code(made, 2)["outputs"] = [shown(image_png=png)]
    return code(clean.clean(made), 2)["outputs"][0]["data"]["image/png"]


def test_clean_writes_figures_in_few_colors():
    rgba = np.full((90, 120, 4), 255, np.uint8)
    rgba[..., 0] = np.arange(120)  # 10,800 colours
    rgba[..., 1] = 2 * np.arange(90)[:, None]
    found = cleaned_figure(png_of(rgba))
    image = Image.open(io.BytesIO(base64.b64decode(found)))
    assert (image.mode, image.size) == ("P", (120, 90))
    assert np.abs(np.asarray(image.convert("RGB"), int) - rgba[..., :3]).max() < 16
    assert cleaned_figure(found) == found
    few = np.zeros((9, 9, 3), np.uint8)
    few[::2] = 200
    image = Image.open(io.BytesIO(base64.b64decode(cleaned_figure(png_of(few)))))
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), few)


def test_clean_leaves_transparent_figures_as_they_are():
    clear = png_of(np.zeros((4, 4, 4), np.uint8))
    assert cleaned_figure(clear) == clear


def test_main_executes_in_place(tmp_path, capsys):
    good = notebook_maker.write(tmp_path / "01_good.ipynb")
    bad = notebook_maker.write(tmp_path / "02_bad.ipynb", claims="1 / 0")
    before = bad.read_text()
    assert refresh.main([str(good), str(bad)]) == 1
    assert "02_bad.ipynb: ZeroDivisionError: division by zero" in capsys.readouterr().out
    assert "It holds: yes. count is 2." in good.read_text()
    assert check.problems(good) == []
    assert bad.read_text() == before
    executed = good.read_text()
    assert refresh.main([str(good)]) == 0
    assert good.read_text() == executed
