"""Which notebooks run with which parameters, all of it checked before anything runs."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from binvit.config import read_yaml, show
from binvit.lab.notebooks.parameters import convert, declared_types
from binvit.lab.project import project_dir

SIZES = ("archive", "smoke", "cpu", "paper")


@dataclass(frozen=True)
class Job:
    """A notebook and the parameters that differ from its defaults."""

    notebook: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    size: str = "archive"

    def measures_time(self) -> bool:
        """Say whether a cell measures time, as its tag tells, so that nothing else may run beside the notebook.

        "measures-time" is one that always does, "measures-trained" one that measures models trained here, and where an
        archive is read reads what was measured.
        """
        tags = {tag for cell in _cells(self.notebook) for tag in cell["metadata"].get("tags", [])}
        return "measures-time" in tags or ("measures-trained" in tags and self.values.get("archive") == "")


def read_values(path: Path) -> dict[str, Any]:
    """Read a YAML file of parameters.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no mapping of names to values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no parameter file {path}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"The parameter file {path} is no readable YAML ({error}).") from None
    values = read_yaml(text, f"The parameter file {path}")
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"The parameter file {path} has to map parameter names to values.")
    return values


def parse(name: str, text: str, annotation: str) -> Any:
    """Read the text of a parameter from a command line as its declared type; lists are written as in YAML."""
    if annotation == "str":
        return text
    with contextlib.suppress(ValueError):
        if "float" in annotation and "list" not in annotation:
            return convert(name, float(text), annotation)
    try:
        value = read_yaml(text, name)
    except ValueError:
        value = text
    return convert(name, value, annotation)


def _declared(notebook: Path) -> dict[str, str]:
    """Return the notebook's parameters and their types, in the order of its parameters cell."""
    try:
        cells = _cells(notebook)
        sources = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        raise ValueError(f"{notebook} cannot be read as a notebook ({why}).") from None
    types = declared_types(sources[0]) if sources else {}
    if not types:
        raise ValueError(f"{notebook} has no parameters cell of lines such as `epochs: int = 24`.")
    return types


def _cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def _select(folder: Path, only: Sequence[str]) -> list[Path]:
    notebooks = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        raise FileNotFoundError(
            f"There are no notebooks in {folder}; run in a clone of the project or name their folder."
        )
    numbers = [notebook.name[:2] for notebook in notebooks]
    for number in only:
        if number.zfill(2) not in numbers:
            raise ValueError(f"There is no notebook {show(number)}; there are {', '.join(numbers)}.")
    wanted = {number.zfill(2) for number in only}
    return [notebook for notebook in notebooks if not wanted or notebook.name[:2] in wanted]


def plan(
    folder: Path,
    size: str = "archive",
    only: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> list[Job]:
    """Decide what runs, and check every parameter's name and type; `check` looks at the values.

    Args:
        folder: where the notebooks lie.
        size: archive runs the defaults, the others read `params/NN.SIZE.yaml`.
        only: numbers of the notebooks to run, such as "01"; none means all.
        values: parameters that replace those of the size, for every selected notebook.
        texts: the same as texts from a command line; they are read as the declared types.

    Returns:
        One job per notebook, in order.

    Raises:
        ValueError: a size, notebook, parameter name or type is wrong.
        FileNotFoundError: a notebook or parameter file is missing.
    """
    if size not in SIZES:
        raise ValueError(f"There is no size {show(size)}; the sizes are {', '.join(SIZES)}.")
    jobs = []
    for notebook in _select(folder, only):
        types = _declared(notebook)
        own = {} if size == "archive" else read_values(folder / "params" / f"{notebook.name[:2]}.{size}.yaml")
        given = {**own, **(values or {})}
        for name in (*given, *(texts or {})):
            if name not in types:
                hint = " Choose the notebooks that have it with --only." if name not in own else ""
                valid = ", ".join(types)
                raise ValueError(f"{notebook.name} has no parameter {show(name)}; its parameters are {valid}.{hint}")
        given = {name: convert(name, value, types[name]) for name, value in given.items()}
        given |= {name: parse(name, text, types[name]) for name, text in (texts or {}).items()}
        jobs.append(Job(notebook, given, size))
    return jobs


def check(jobs: Sequence[Job], files: bool = True) -> None:
    """Check every value as the notebooks' second cells do, and look for the files of the images, before anything runs.

    Args:
        jobs: what `plan` returned.
        files: whether data sets that are files or folders have to be there.

    Raises:
        ValueError: a notebook refuses a value.
        FileNotFoundError: a data set or an archive is missing.
    """
    from binvit.lab.data.sources import require_files
    from binvit.lab.experiments.design.parse import parse_images
    from binvit.lab.experiments.design.plan import archive_dir

    for job in jobs:
        try:
            checked = checked_values(job)
            archive = archive_dir(checked) if hasattr(checked, "archive") else None
            needed = files and not archive  # archived trials are read without their images
            for images in parse_images(getattr(checked, "dataset", "digits")) if needed else ():
                folder = getattr(checked, "data_dir", "")
                require_files(images.dataset, project_dir() / folder if folder else None)
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{job.notebook.name}: {error}") from None


def checked_values(job: Job) -> Any:
    """Run the notebook's parameters cell and its call of `check_parameters`, and return what this returns.

    Raises:
        ValueError: a value is refused, or a cell cannot be run, as after a slip of the pen.
        FileNotFoundError: a file that a value names is missing.
    """
    try:
        return _checked_values(job)
    except (ValueError, FileNotFoundError):
        raise
    except Exception as error:  # whatever the code of a cell raises
        why = f"{type(error).__name__}: {error}".rstrip(".")
        raise ValueError(f"The first two cells cannot be run ({why}).") from None


def _checked_values(job: Job) -> Any:
    namespace = {"__name__": "__main__"}
    for cell in _cells(job.notebook):
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", []):
            exec(source, namespace)
            namespace.update(job.values)
        elif cell["cell_type"] == "code" and "check_parameters(" in source:
            for statement in ast.parse(source).body:
                exec(compile(ast.Module([statement], []), job.notebook.name, "exec"), namespace)
                if isinstance(statement, ast.Assign) and "check_parameters(" in ast.unparse(statement):
                    return namespace[ast.unparse(statement.targets[0])]
    return None  # a notebook without checks
