"""The committed notebooks executed in place: `python -m binvit.lab.notebooks.refresh notebooks/*.ipynb`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from binvit.lab.notebooks.check import problems
from binvit.lab.notebooks.clean import clean, write


def main(paths: list[str]) -> int:
    """Execute the notebooks in place with their defaults, clean them and print what is wrong with them.

    Returns:
        0 if all is well, 1 otherwise.
    """
    from binvit.lab.notebooks.plan import Job
    from binvit.lab.notebooks.run import run_job
    from binvit.lab.project import project_dir

    found = []
    for path in map(Path, paths):
        print(f"executing {path}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_job(Job(path, {}), Path(folder), progress=sys.stderr.isatty())
            if outcome.error:
                found.append(f"{path.name}: {outcome.error}")
                continue
            executed = json.loads(outcome.executed.read_text(encoding="utf-8"))
        write(clean(executed, project_dir()), path)
        found += problems(path)
    print("\n".join(found) or f"{len(paths)} notebooks executed, no problem found")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
