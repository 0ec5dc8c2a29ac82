"""The command that all others belong to, and how paths are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


class _Path(click.Path):
    """A path in which `~` and environment variables are replaced, also where a shell leaves them: --out=~/results."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("A path must not be empty.", param, ctx)
        return super().convert(os.path.expandvars(os.path.expanduser(value)), param, ctx)


class _Folder(_Path):
    """A folder, which need not exist yet; a file or a device of that name is refused before anything is computed."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        if path.exists() and not path.is_dir():
            self.fail(f"{printable(str(path))} is no folder.", param, ctx)
        return path


def printable(text: str) -> str:
    """Escape line breaks, codes that a terminal obeys, and bytes that are no text; names of files may hold them."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def in_words(error: Exception) -> str:
    """Return what an error says; one of the system names its file, and our own sentences come without a number."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    where = "" if error.filename is None else f": {error.filename}"
    return f"{error.strerror}{where}."


PATH = _Path(path_type=Path)
FOLDER = _Folder(path_type=Path)
RECIPES = "[smoke|digits|cpu|flowers|cifar|pretrained|paper]"  # as registered: an import would cost seconds


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="binvit")
def cli() -> None:
    """1-bit vision transformers: train, pack, and repeat the experiments of two papers."""
