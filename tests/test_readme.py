"""The commands of the README, as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from binvit.__main__ import cli

ROOT = Path(__file__).parents[1]


def commands(section: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(rf"^## {section}\n.*?```sh\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    return block[1].splitlines()


def photograph(path: Path, shade: int, number: int) -> None:
    """Write noise of one of two shades, as phones do: 4:3, lying on its side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 80, (30, 40, 3), dtype=np.uint8) + np.uint8(shade)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(path, exif=exif)


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="no repository to clone")
def test_five_commands_lead_from_a_clone_to_the_class_of_a_new_photograph(tmp_path):
    for split, count in (("train", 12), ("test", 4)):
        for name, shade in (("day", 170), ("night", 0)):
            for number in range(count):
                photograph(tmp_path / "photos" / split / name / f"{number}.jpg", shade, number + 50 * (split == "test"))
    photograph(tmp_path / "new.jpg", 170, 99)
    site = tmp_path / "site"
    environment = os.environ | {
        "BINVIT": str(ROOT),
        # What is installed needs no network here: the build's and the package's own needs are in this environment.
        "PIP_TARGET": str(site),
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's own reading of it: no isolation
        "PATH": os.pathsep.join([str(site / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        # Changes that are not committed are tested, too, and kernels are compiled already.
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]),
    }
    steps = commands("Your own images")
    assert len(steps) == 5
    for step in steps:
        done = subprocess.run(step, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{step}\n{done.stderr}"
        if " train " in step:
            assert (site / "binvit" / "lab" / "data" / "folders.py").is_file()
            assert "test accuracy 1.0000" in done.stdout
    assert re.fullmatch(r"new\.jpg: day 0\.\d{3}, night 0\.\d{3}\n", done.stdout)


def test_what_the_papers_size_costs_is_what_the_command_prints():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"^\$ binvit plan --size paper\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    printed = CliRunner().invoke(cli, ["plan", "--size", "paper"], prog_name="binvit")
    assert printed.exit_code == 0
    assert [line.rstrip() for line in printed.stdout.splitlines()] == shown[1].splitlines()
