"""The child process of `run_trials`: reads trials as JSON lines, runs them, and answers in JSON lines.

A program of its own, and not a function handed to `multiprocessing`, so that notebooks and scripts without a
`__main__` guard can use several jobs.
"""

import json
import os
import sys
import traceback

import torch

from binvit.lab.trials.train_trial import is_wrong_input, run_trial
from binvit.lab.trials.trial import Trial


def main() -> None:
    """Serve until the parent closes the pipe or dies."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def answer(**values: object) -> None:
        answers.write(json.dumps(values) + "\n")

    for line in sys.stdin:
        order = json.loads(line)
        trial = Trial.from_dict(order["trial"])
        report = lambda done, total, record: answer(epoch=[done, total])  # noqa: E731
        try:
            answer(finished=run_trial(trial, order["results_dir"], order["keep_model"], report, order["wait"]))
        except (ValueError, OSError) as error:
            answer(failure=str(error), wrong_input=is_wrong_input(error))
        except Exception as error:
            traceback.print_exc()
            answer(failure=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
