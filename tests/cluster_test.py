"""A one-node Slurm, a grid of two notebooks on it, and a job that is killed in the middle: `make cluster-test`.

Needs Debian, root and the package's extra `cluster`; it installs Slurm, starts it, and stops what it has started.
"""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PARAMETERS = {"seeds": [0], "schemes": ["float", "gsb"], "changes": "width 16, depth 1, heads 1, checkpoint_minutes 0"}
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def running(*command: str, **options) -> Iterator[subprocess.Popen]:
    """Run a daemon in the foreground until the context ends."""
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for(what: str, seen, seconds: float = 900.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := seen():
            return found
        time.sleep(0.05)
    raise SystemExit(f"{what} did not happen within {seconds:.0f} s.")


def answers(*command: str) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


def start_slurm(stack: ExitStack, folder: Path) -> None:
    """Start munged and the two daemons of Slurm."""
    if missing := [name for name in PACKAGES if not answers("dpkg", "-s", name)]:
        subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", *missing], check=True)
    if not answers("munge", "-n"):
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        stack.enter_context(running("runuser", "-u", "munge", "--", "munged", "--foreground"))
        wait_for("munge", lambda: answers("munge", "-n"), 30)
    for name in ("spool", "state"):
        (folder / name).mkdir()
    conf = Path("/etc/slurm/slurm.conf")  # where jobs look: the executor drops SLURM_CONF from their environment
    if conf.exists():
        raise SystemExit(f"There is a Slurm already: {conf}.")
    stack.callback(conf.unlink)
    conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, cores=os.cpu_count()))
    for daemon in ("slurmctld", "slurmd"):
        log = stack.enter_context((folder / f"{daemon}.log").open("w"))
        stack.enter_context(running(daemon, "-D", "-f", str(conf), stdout=log, stderr=log))
    stack.callback(subprocess.run, ["scancel", "--user", "root"])  # before the daemons end
    wait_for("Slurm", lambda: answers("srun", "true"), 60)


def training(identity: str) -> list[int]:
    """Return the processes that train a trial."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "train" in words and f"--id={identity}" in words and "binvit" in words:
            found.append(int(path.parent.name))
    return found


def epochs_done(state: Path) -> int:
    """Return how many epochs the state of an unfinished training holds, 0 without a state."""
    try:
        content: dict[str, Any] = torch.load(io.BytesIO(state.read_bytes()[32:]), weights_only=True)
    except FileNotFoundError:
        return 0
    return content["position"]["epoch"]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="binvit-cluster-") as name, ExitStack() as stack:
        folder = Path(name)
        start_slurm(stack, folder)
        (folder / "config.yaml").write_text(json.dumps({"only": "01 06", "per_job": 1, "parameters": PARAMETERS}))
        command = [sys.executable, "-m", "snakemake", "-s", ROOT / "notebooks" / "Snakefile"]
        command += ["--executor", "slurm", "--jobs", "2", "--retries", "1", "--latency-wait", "30"]
        command += ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "5"]
        command += ["--default-resources", "mem_mb=0", "runtime=60", "--configfile", "config.yaml"]
        log = stack.enter_context((folder / "snakemake.log").open("w"))
        grid = stack.enter_context(running(*map(str, command), cwd=folder, stdout=log, stderr=log))
        running_folder = folder / "results" / ".running"
        plan = folder / "report" / "plan.jsonl"

        def planned() -> dict[str, int]:
            """Return the epochs of each trial."""
            lines = map(json.loads, plan.read_text().splitlines() if plan.exists() else [])
            return {line["id"]: line["epochs"] for line in lines if "id" in line}

        def alive() -> None:
            if grid.poll() is not None:
                raise SystemExit((folder / "snakemake.log").read_text())

        def state_and_processes():
            alive()
            epochs = planned()
            for state in running_folder.glob("*.state"):
                # What is left takes long enough to be seen when the job has been restarted.
                if 3 <= epochs_done(state) < epochs[state.stem] - 20 and (processes := training(state.stem)):
                    return state, processes
            return None

        state, processes = wait_for("A training with three epochs behind it and many to go", state_and_processes)
        for process in processes:
            os.kill(process, signal.SIGKILL)
        wait_for("The end of the killed training", lambda: not training(state.stem), 60)
        killed_at = epochs_done(state)
        print(f"killed {state.stem} after {killed_at} epochs")

        def next_state():
            alive()
            return done if (done := epochs_done(state)) != killed_at else None

        wait_for("The restart of the killed job", lambda: training(state.stem))
        first = wait_for("A state of the restarted job", next_state)
        assert first > killed_at, f"The restarted training began anew: it had {killed_at} epochs, then {first}."
        print(f"restarted, and at {first} epochs")
        code = grid.wait(1800)
        text = (folder / "snakemake.log").read_text()
        if code:
            raise SystemExit(text + "".join(path.read_text() for path in folder.glob(".snakemake/slurm_logs/**/*.log")))
        trials = planned()
        missing = [trial for trial in trials if not (folder / "results" / f"{trial}.json").is_file()]
        assert not missing, missing
        assert (folder / "report" / "index.html").is_file()
        assert "Trying to restart job" in text, text
        print(f"{len(trials)} trials of two notebooks finished on Slurm; the killed one was restarted and finished.")


if __name__ == "__main__":
    main()
