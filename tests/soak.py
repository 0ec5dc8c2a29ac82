"""Kills trainings at random moments, and feeds damaged files to all readers: what RELIABILITY.md promises, at length.

python tests/soak.py [--kills N] [--cases N] [--minutes M] [--seed S] [--only NAME]...

Ends with exit code 1 if a finished trial was lost or changed, a result differs from that of an undisturbed run, or a
reader raised anything but one of our sentences or took too much memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
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
AT_ONCE = 2  # parts that run side by side
GOLDEN = Path(__file__).parent / "golden" / "imrl_tiny.pth"
TINY = {"width": 16, "depth": 1, "heads": 2, "patch_size": 4, "epochs": 6, "batch_size": 64, "checkpoint_minutes": 0.0}

# ---------------------------------------------------------------------------------------------------------------- kills


def trials() -> list[Trial]:
    """Return the trials that are trained and killed: float and 1-bit, with a teacher, augmented."""
    made = [Trial("digits", name, seed=seed, samples_per_class=20, recipe_options=TINY)
            for name in ("float", "gsb") for seed in range(2)]  # fmt: skip
    options = {"distillation": "hard", "teacher_epochs": 3}, {"crop": 0.6, "mixup": 0.2, "drop_path": 0.1}
    return made + [Trial("digits", "elastic", samples_per_class=20, recipe_options=TINY | more) for more in options]


def content(folder: Path) -> dict[str, object]:
    """Return what the finished trials of a folder hold: results without their seconds, models byte by byte."""
    found: dict[str, object] = {}
    for trial in trials():
        with contextlib.suppress(FileNotFoundError):
            values = read_result(trial, folder).to_dict() | {"seconds": 0}
            found[trial.id] = json.dumps(values), model_path(trial, folder).read_bytes()
    return found


def run(folder: Path, jobs: int) -> int:
    """Start a process that runs the trials."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        code = 1
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                lab.run_trials(trials(), folder, jobs=jobs, keep_models=True, progress=False)
            code = 0
        finally:
            os._exit(code)
    return child


def soak_kills(kills: int, folder: Path, draw: random.Random, seconds: float) -> list[str]:
    """Kill runs at random moments until that has been done so often; every tenth is a run of several children."""
    run_undisturbed = run(folder / "whole", 1)
    os.waitpid(run_undisturbed, 0)
    until = time.monotonic() + seconds
    whole, faults, done, rounds, seen, longest = content(folder / "whole"), [], 0, 0, 0, 2.0
    if len(whole) != len(trials()):
        return ["the undisturbed run has not finished"]
    while done < kills and time.monotonic() < until:
        rounds += 1
        place, finished = folder / f"round{rounds}", {}
        while len(finished) < len(whole) and time.monotonic() < until:
            several = done % 10 == 9
            child, start = run(place, 2 if several else 1), time.monotonic()
            time.sleep(draw.uniform(0, 20.0 if several else longest))  # children of a pool start for seconds
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                done += 1
            elif status:
                faults.append(f"a run ended with the status {status}")
            now = content(place)
            faults += [f"{name} was finished and is lost" for name in finished if now.get(name) != finished[name]]
            faults += [f"{name} differs from the undisturbed run" for name in now if now[name] != whole[name]]
            seen += len(now) - len(finished)
            finished = now
            if faults or done >= kills:
                break
            longest = max(longest, min(10.0, time.monotonic() - start)) if ended else longest
        if faults:
            break
        shutil.rmtree(place, ignore_errors=True)
    told = f"{seen} trials finished among them, {len(faults)} faults"
    print(f"kills: {done} SIGKILLs in {rounds} rounds, {told}")
    return faults


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


def soak_reader(name: str, reader: Reader, cases: int, draw: random.Random, seconds: float) -> list[str]:
    """Let a process read damaged files; each must be read or refused with a sentence."""
    path, read = reader
    whole, faults, refused, done, until = path.read_bytes(), [], 0, 0, time.monotonic() + seconds
    warnings.simplefilter("ignore")
    for done in range(1, cases + 1):
        if time.monotonic() > until:
            break
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
        if len(faults) > 5:
            break
    path.write_bytes(whole)  # for the next reader
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)
    if memory > MOST_MEMORY:
        faults.append(f"{name}: {memory / 2**20:.0f} MiB of memory")
    print(
        f"{name}: {done} cases, {refused} refused, {len(faults)} faults, at most {memory / 2**20:.0f} MiB", flush=True
    )
    return faults


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
    start, code = time.monotonic(), 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        folder = Path(name)
        # the longest first, two at a time
        names = ["kills", "load_official_gsb", "parameters", "load", "checkpoints", "states", "results", "archive",
                 "parquet", "chaoyang"]  # fmt: skip
        running: dict[int, str] = {}
        for name in [name for name in names if not only or name in only]:
            if len(running) == AT_ONCE:
                code |= _end_of_one(running)
            seconds = 60 * minutes - (time.monotonic() - start)
            running[_apart(name, folder, kills, cases, random.Random(f"{seed} {name}"), seconds)] = name
        while running:
            code |= _end_of_one(running)
    print(f"{(time.monotonic() - start) / 60:.1f} minutes, {'faults' if code else 'no faults'}")
    sys.exit(code)


def _apart(name: str, folder: Path, kills: int, cases: int, draw: random.Random, seconds: float) -> int:
    """Start a process that soaks one part; its memory is measured and its crash is a fault."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if name == "kills":
                faults = soak_kills(kills, folder / "kills", draw, seconds)
            else:
                files = folder / name
                _alone(lambda: write_files(files))  # compiling takes memory that is not the reader's
                faults = soak_reader(name, readers(files)[name], cases, draw, seconds)
            print("\n".join(faults), end="\n" if faults else "", flush=True)
            code = int(bool(faults))
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


def _end_of_one(running: dict[int, str]) -> int:
    child, ended = os.wait()
    name, status = running.pop(child), os.waitstatus_to_exitcode(ended)
    if status < 0:
        print(f"{name}: its process died of the signal {-status}")
    return int(status != 0)


if __name__ == "__main__":
    main()
