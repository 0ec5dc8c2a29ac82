"""The command line: `binvit COMMAND` or `python -m binvit COMMAND`.

Wrong input ends with one sentence on stderr and exit code 2, failed work with exit code 1.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress

import click

from binvit.cli import experiments, models  # noqa: F401 - they add their commands to the group
from binvit.cli.group import cli, in_words, printable


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 if all is well, 1 if work failed, 2 if the input was wrong."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell; libraries write to them without asking
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    # What torch and others load stays to the end: to look for garbage in it, again at the end, takes seconds.
    gc.set_threshold(100_000, 20, 20)
    atexit.register(gc.freeze)
    warnings.showwarning = _tell  # type: ignore[assignment]
    with suppress(AttributeError, ValueError):  # a name of a file may hold bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = cli.main(args=arguments, prog_name="binvit", standalone_mode=False)
    except click.Abort:
        click.echo("Stopped.", err=True)
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:  # the text of --help, not a sentence
        click.echo(error.format_message(), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _refuse(error.format_message())
    except OSError as error:
        _refuse(in_words(error), 1 if error.errno in _FAILED_WORK else 2)
    except (ValueError, ModuleNotFoundError) as error:
        _refuse(str(error), 2 if getattr(error, "wrong_input", True) else 1)  # trials can fail at their work
    sys.exit(code if isinstance(code, int) else 0)


# A full or broken disk; other numbers tell of a wrong path.
_FAILED_WORK = (errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC)


def _tell(message: Warning | str, *where: object) -> None:
    """Show a warning as the sentence that it is, without the line of code that gave it."""
    click.echo(printable(str(message)), err=True)


def _refuse(sentence: str, code: int = 2) -> None:
    click.echo(f"Error: {printable(sentence)}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
