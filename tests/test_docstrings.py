"""Names in docstrings lead somewhere."""

import ast
import contextlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOTTED = re.compile(r"(?<!`)`+([A-Za-z_]\w*(?:\.\w+)+)(?:\(\))?`+")
FILES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "binvit").rglob("*.py"))}
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
MODULES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES}


def texts(tree: ast.Module) -> Iterator[tuple[str, set[str]]]:
    """Yield the docstrings of a module, its classes, functions and fields, each with the arguments it may speak of."""
    for node in ast.walk(tree):
        arguments = set()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        for item in node.body if isinstance(node, DOCUMENTED) else ():
            match item:
                case ast.Expr(ast.Constant(str(text))):
                    yield text, arguments


def has(owner: Any, names: list[str]) -> bool:
    """Say whether an object has an attribute, or a class a field, and that the next one, and so on."""
    for place, name in enumerate(names):
        if not hasattr(owner, name):
            fields = [*getattr(owner, "__dataclass_fields__", ()), *getattr(owner, "__annotations__", ())]
            return name in fields and place + 1 == len(names)
        owner = getattr(owner, name)
    return True


def leads(name: str) -> bool:
    """Say whether a full name is one of a module, or of something in it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            return has(importlib.import_module(".".join(parts[:end])), parts[end:])
    return False


def resolves(name: str, module: str, arguments: set[str]) -> bool:
    """Say whether a name means something in a module: its own, a module's or a class's of the package, or a library's.

    Modules of the same room and classes may be named without the packages around them.
    """
    first, *others = name.split(".")
    if first in arguments or leads(name) or has(importlib.import_module(module), [first, *others]):
        return True
    room = ".".join(module.split(".")[:2]) + "."
    modules = [known for known in MODULES.values() if known.startswith(room) and known.endswith(f".{first}")]
    classes = [
        f"{MODULES[path]}.{first}"
        for path, tree in FILES.items()
        if any(isinstance(node, ast.ClassDef) and node.name == first for node in tree.body)
    ]
    return any(leads(".".join([start, *others])) for start in (*modules, *classes))


def test_dotted_names_in_docstrings_lead_somewhere():
    lost = {
        f"{path.relative_to(ROOT)}: {name}"
        for path, tree in FILES.items()
        for text, arguments in texts(tree)
        for name in DOTTED.findall(text)
        if not name.split(".")[0].isupper() and not resolves(name, MODULES[path], arguments)  # NAME stands for any
    }
    assert sorted(lost) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("binvit.packed.fast.softmax.score_table", True),
        ("binvit.packed.softmax.score_table", False),
        ("plan.train", True),
        ("experiments.plan", False),
        ("experiments.train", False),
        ("settings.parse_images", False),
        ("Recipe.stages", True),
        ("Recipe.stags", False),
        ("training.resume.environment", True),
        ("np.int64", True),
        ("torch.load", True),
        ("rule.backward", True),
        ("ruler.backward", False),
    ],
)
def test_what_leads_somewhere(name, expected):
    assert resolves(name, "binvit.lab.data.splits", {"rule"}) == expected
