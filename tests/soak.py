"""Kills trainings at random moments, and feeds damaged files to all readers: what RELIABILITY.md promises, at length.

python tests/soak.py [--kills N] [--cases N] [--minutes M] [--seed S] [--only NAME]...

Ends with exit code 1 if a finished trial was lost or changed, a result differs from that of an undisturbed run, or a
reader raised anything but one of our sentences or took too much memory; and with 3 if there was no such fault, but the
minutes ran out before all kills and cases were done.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from soak_kills import TINY, soak_kills

import binvit
from binvit import lab
from binvit.lab.data.sources import read_source
from binvit.lab.notebooks.parameters import convert
from binvit.lab.notebooks.plan import read_values
from binvit.lab.training.checkpoint import load_checkpoint
from binvit.lab.training.devices import Team
from binvit.lab.training.resume import Position, read_state, write_state
from binvit.lab.trials import archive
from binvit.lab.trials.store import model_path, read_result, result_path
from binvit.lab.trials.trial import Trial

MOST_MEMORY = 2**30
FAULTS, UNFINISHED = 1, 3  # exit codes
AT_ONCE = 2  # parts that run side by side
GOLDEN = Path(__file__).parent / "golden" / "imrl_tiny.pth"

# ----------------------------------------------------------------------------------------------------------------- fuzz

Reader = tuple[Path, Callable[[], object]]  # the file that is damaged, and what reads it


def _trial() -> Trial:
    return Trial("digits", "gsb", samples_per_class=7, recipe_options=TINY | {"epochs": 1})


def write_files(folder: Path) -> None:
    """Write a sound file for each reader."""
    folder.mkdir()
    lab.run_trials([_trial()], folder, keep_models=True, progress=False)
    binvit.save(binvit.pack(load_checkpoint(model_path(_trial(), folder))[0]), folder / "packed.safetensors")
    shutil.copy(GOLDEN, folder / "official.pth")
    archive.add([read_result(_trial(), folder)], folder / "archive")
    net = torch.nn.Linear(2, 2)
    write_state(folder / "run.state", Position(), net, torch.optim.AdamW(net.parameters()), "run", Team("cpu"))
    (folder / "01.cpu.yaml").write_text(
        "schemes: [gsb, bit]\nepochs: 3\nrate: 1.0e-3\nroot: null\nnoise: {a: [1, 2]}\n"
    )
    _write_parquet(folder)
    _write_chaoyang(folder / "chaoyang")


def readers(folder: Path) -> dict[str, Reader]:
    """Return the readers of the files that `write_files` wrote."""
    packed, official, state = (folder / name for name in ("packed.safetensors", "official.pth", "run.state"))
    checkpoint, parameters, images = model_path(_trial(), folder), folder / "01.cpu.yaml", folder / "images.parquet"
    (line,) = (folder / "archive" / "trials").glob("*.jsonl")
    types = {"schemes": "list[str]", "epochs": "int", "rate": "float", "root": "str | None", "noise": "str"}

    def read_parameters() -> None:
        for name, value in read_values(parameters).items():
            if name in types:
                convert(name, value, types[name])

    return {
        "load": (packed, lambda: binvit.load(packed)),
        "load_official_gsb": (official, lambda: binvit.load_official_gsb(official)),
        "checkpoints": (checkpoint, lambda: load_checkpoint(checkpoint)),
        "states": (state, lambda: read_state(state, "run", Team("cpu"))),
        "results": (result_path(_trial(), folder), lambda: read_result(_trial(), folder)),
        "archive": (line, lambda: archive.find(_trial(), folder / "archive")),
        "parquet": (images, lambda: read_source(f"parquet:{images}")),
        "chaoyang": (folder / "chaoyang" / "train.json", lambda: read_source("chaoyang", folder / "chaoyang")),
        "parameters": (parameters, read_parameters),
    }


def _picture() -> Image.Image:
    return Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


def _write_parquet(folder: Path) -> None:
    import io

    import pandas as pd

    buffer = io.BytesIO()
    _picture().save(buffer, "PNG")
    rows = [{"image": buffer.getvalue(), "label": row % 2, "split": ("train", "test")[row // 4]} for row in range(8)]
    pd.DataFrame(rows).to_parquet(folder / "images.parquet")


def _write_chaoyang(folder: Path) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    _picture().save(folder / "images" / "a.png")
    for split in ("train", "test"):
        entries = [{"name": "images/a.png", "label": label} for label in range(4)]
        (folder / f"{split}.json").write_text(json.dumps(entries))


_PIECES = [
    *(b"", b"\0", b"\xff" * 8, b"\x7f" * 4, b"[" * 300, b"{}", b"null", b"NaN", b"true", b"-1", b"1e999", b"9" * 5000),
    *(b'"', b"\\ud800", b": ", b"- ", b"&a *a", b"!!python/object", b"../..", b"PK\x05\x06", b"PAR1"),
]


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """Return a file with one to four faults: flipped bits, cuts, pieces put in, moved or repeated."""
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        place, kind = draw.randrange(len(data) + 1), draw.randrange(6)
        other, size = draw.randrange(len(data) + 1), draw.choice((1, 2, 4, 8, 64))
        if kind == 0 and place < len(data):
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place : place + draw.choice((0, size))] = draw.choice(_PIECES)
        elif kind == 3:
            data[place:place] = data[other : other + size]
        elif kind == 4:
            del data[place : place + size]
        else:
            data[place : place + size] = draw.randbytes(size)
    return bytes(data)


def soak_reader(name: str, reader: Reader, cases: int, draw: random.Random, seconds: float) -> tuple[list[str], bool]:
    """Let a process read damaged files; each must be read or refused with a sentence.

    Returns:
        The faults, and whether all cases were done.
    """
    path, read = reader
    whole, faults, refused, done, until = path.read_bytes(), [], 0, 0, time.monotonic() + seconds
    warnings.simplefilter("ignore")
    while done < cases and len(faults) <= 5 and time.monotonic() < until:
        done += 1
        path.write_bytes(damaged(whole, draw))
        try:
            read()
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            if not str(error) or "\n" in str(error).strip():
                faults.append(f"{name}: no sentence, but {error!r}")
        except Exception as error:
            kept = Path(tempfile.gettempdir()) / f"soak-{name}-{done}"
            kept.write_bytes(path.read_bytes())
            faults.append(f"{name}: {error!r} for {kept}\n{traceback.format_exc()}")
    path.write_bytes(whole)  # for the next reader
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)
    if memory > MOST_MEMORY:
        faults.append(f"{name}: {memory / 2**20:.0f} MiB of memory")
    print(
        f"{name}: {done} cases, {refused} refused, {len(faults)} faults, at most {memory / 2**20:.0f} MiB", flush=True
    )
    return faults, done >= cases


# -------------------------------------------------------------------------------------------------------------- program


@click.command()
@click.option("--kills", default=200, show_default=True)
@click.option("--cases", default=100_000, show_default=True, help="Damaged files for each reader.")
@click.option("--minutes", default=20.0, show_default=True, help="Most time; what does not fit is left out, and told.")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", multiple=True, help="kills or the name of a reader; may be repeated.")
def main(kills: int, cases: int, minutes: float, seed: int, only: tuple[str, ...]) -> None:
    """Soak the store of trials and all readers."""
    torch.set_num_threads(1)  # a process that has started other threads must not be forked
    start, codes = time.monotonic(), {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        folder = Path(name)
        # the longest first, two at a time
        names = ["kills", "load_official_gsb", "parameters", "load", "checkpoints", "states", "results", "archive",
                 "parquet", "chaoyang"]  # fmt: skip
        running: dict[int, str] = {}
        for name in [name for name in names if not only or name in only]:
            if len(running) == AT_ONCE:
                codes |= _end_of_one(running)
            seconds = 60 * minutes - (time.monotonic() - start)
            running[_apart(name, folder, kills, cases, random.Random(f"{seed} {name}"), seconds)] = name
        while running:
            codes |= _end_of_one(running)
    sentence, code = conclusion(codes)
    print(f"{(time.monotonic() - start) / 60:.1f} minutes, {sentence}")
    sys.exit(code)


def conclusion(codes: dict[str, int]) -> tuple[str, int]:
    """Return what the exit codes of all parts mean, and the exit code of the whole."""
    faulty = [name for name, code in codes.items() if code not in (0, UNFINISHED)]
    unfinished = [name for name, code in codes.items() if code == UNFINISHED]
    sentence = f"faults of {', '.join(faulty)}." if faulty else "no faults."
    if unfinished:
        sentence += f" The time ran out before all was done of {', '.join(unfinished)}; --minutes gives more."
    return sentence, FAULTS if faulty else UNFINISHED if unfinished else 0


def _apart(name: str, folder: Path, kills: int, cases: int, draw: random.Random, seconds: float) -> int:
    """Start a process that soaks one part; its memory is measured and its crash is a fault."""
    child = os.fork()
    if child == 0:
        code = FAULTS
        try:
            if name == "kills":
                faults, complete = soak_kills(kills, folder / "kills", draw, seconds)
            else:
                files = folder / name
                _alone(lambda: write_files(files))  # compiling takes memory that is not the reader's
                faults, complete = soak_reader(name, readers(files)[name], cases, draw, seconds)
            print("\n".join(faults), end="\n" if faults else "", flush=True)
            code = FAULTS if faults else 0 if complete else UNFINISHED
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def _alone(work: Callable[[], object]) -> None:
    """Do something in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the files for the readers could not be written")


def _end_of_one(running: dict[int, str]) -> dict[str, int]:
    """Wait for the end of a part and return its name and exit code."""
    child, ended = os.wait()
    name, code = running.pop(child), os.waitstatus_to_exitcode(ended)
    if code < 0:
        print(f"{name}: its process died of the signal {-code}")
    return {name: code}


if __name__ == "__main__":
    main()
