"""The folder of the project, wherever a notebook or command runs."""

from __future__ import annotations

from pathlib import Path


def project_dir() -> Path:
    """Return the folder of the project: the clone around the working directory, else the clone of the package.

    JupyterLab and nbval run a notebook in its own folder, papermill in the caller's. Without a clone, that is for an
    installed package alone, it is the working directory.
    """
    here = Path.cwd()
    for candidate in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (candidate / "notebooks").is_dir() and (candidate / "binvit" / "lab").is_dir():
            return candidate
    return here


def folder(path: str | Path) -> Path:
    """Return a folder of the project, such as results or paper_figures; an absolute path stays as it is."""
    return project_dir() / path
