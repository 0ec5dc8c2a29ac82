"""Small notebooks for tests of everything that handles notebooks."""

import copy
from pathlib import Path

from binvit.lab.notebooks import clean

PARAMETERS = "count: int = 2  # how many\nnames: list[str] = ['a']  # of what\nrate: float = 0.1  # how fast"
CHECK = "from binvit.lab.notebooks import parameters\n\np = parameters.check_parameters(globals())"
FIGURE = (
    "import base64\n\nfrom IPython.display import Image, display\n\n"
    "PIXEL = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=='\n"
    "display(Image(base64.b64decode(PIXEL)))"
)
CLAIMS = "print(f'It holds: yes. count is {p.count}.')"
OPENING = "# What is counted?\n\nDoes $x_i * y_i$ hold?\n\nMore words."


def cell(kind: str, source: str, number: int, tags: tuple[str, ...] = ()) -> dict:
    """Return one cell; code cells count as executed."""
    made = {
        "cell_type": kind,
        "id": f"cell-{number}",
        "metadata": {"tags": list(tags)} if tags else {},
        "source": source,
    }
    return made | ({"execution_count": number, "outputs": []} if kind == "code" else {})


def notebook(claims: str = CLAIMS) -> dict:
    """Return a notebook that has everything the project asks for."""
    cells = [
        cell("markdown", OPENING, 0),
        cell("code", PARAMETERS, 1, ("parameters",)),
        cell("code", CHECK, 2),
        cell("code", FIGURE, 3, ("figure",)),
        cell("code", claims, 4, ("claims", "nbval-check-output")),
    ]
    return {"cells": cells, "metadata": copy.deepcopy(clean.METADATA), "nbformat": 4, "nbformat_minor": 5}


def write(path: Path, **options: str) -> Path:
    """Write such a notebook."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clean.write(notebook(**options), path)
    return path
