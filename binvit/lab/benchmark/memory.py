"""Peak memory of loading a model and classifying one image, each in a process of its own."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import timm
import torch
from torch.nn import functional as F

from binvit import bits
from binvit.lab.benchmark.models import calibrated_model, random_model
from binvit.packed import load, pack, save


def benchmark_memory(batch: int = 1, width: int = 384, depth: int = 12) -> pd.DataFrame:
    """Measure the memory that loading and running a model adds to a process, each model in a process of its own.

    Args:
        batch: images per run.
        width: width of the model.
        depth: blocks.

    Returns:
        One row per model: contender, file_bytes, peak_bytes (highest memory of the process above that before loading).
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(width, depth=depth)
        files = {"timm float32": Path(folder) / "float.pt", "binvit gsb": Path(folder) / "packed.safetensors"}
        torch.save(model.state_dict(), files["timm float32"])
        save(pack(calibrated_model(model, "binvit gsb")), files["binvit gsb"])
        processes = {}
        for name, path in files.items():
            code = (
                f"from binvit.lab.benchmark import peak_memory as p; print(p({str(path)!r}, {batch}, {width}, {depth}))"
            )
            processes[name] = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for name, path in files.items():
            answer, _ = processes[name].communicate()
            if processes[name].returncode:
                raise RuntimeError(f"The process that measures the memory of {name} ended with an error.")
            peak = int(answer)
            rows.append({"contender": name, "batch": batch, "file_bytes": path.stat().st_size, "peak_bytes": peak})
    return pd.DataFrame(rows)


def peak_memory(path: str, batch: int, width: int, depth: int) -> int:
    """Load and run a model file in this process and return the bytes by which the process's highest memory grew."""
    bits.warm_up()
    images = torch.randn(batch, 3, 224, 224)
    with torch.inference_mode():
        F.conv2d(images, torch.randn(8, 3, 16, 16))  # libraries that both models need
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest from here on
    before = _highest_memory()
    if path.endswith(".pt"):
        options = {"embed_dim": width, "num_heads": width // 64, "depth": depth, "num_classes": 1000}
        with torch.device("meta"):
            model = timm.create_model("deit_small_distilled_patch16_224", **options)
        model.load_state_dict(torch.load(path, mmap=True, weights_only=True), assign=True)
        with torch.inference_mode():
            model.eval()(images)
    else:
        load(path)(images)
    return _highest_memory() - before


def _highest_memory() -> int:
    """Return the most bytes of memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss of a new program starts at its parent's
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
