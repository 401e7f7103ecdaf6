# SPDX-License-Identifier: Apache-2.0
"""What all commands do alike: one sentence and an exit status where something cannot run."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from vtprune_loadtest.errors import LoadTestError

OK, CANNOT_RUN, INTERRUPTED = 0, 2, 130


class SentenceParser(argparse.ArgumentParser):
    """A parser that refuses with a sentence instead of its whole usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what every other bad argument raises.

        Raises:
            LoadTestError: always; the message names the flag.
        """
        raise LoadTestError(f"{message.removeprefix('argument ').rstrip('.')}. See {self.prog} --help.")


def command(
    prog: str,
    run: Callable[[], int | None],
    refusals: tuple[type[Exception], ...] = (LoadTestError,),
) -> int:
    """Run a command to its exit status: its own, 2 with one sentence where it cannot run, 130 if interrupted.

    Args:
        prog: the command's name, before the sentence.
        run: the command; None is success.
        refusals: the exceptions whose text is that sentence.
    """
    try:
        return run() or OK
    except refusals as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return CANNOT_RUN
    except KeyboardInterrupt:
        return INTERRUPTED


def make_folder(flag: str, folder: Path) -> Path:
    """Make the folder that a flag names, parents too, and give it.

    Raises:
        LoadTestError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoadTestError(f"{flag} {folder} cannot be made: {error.strerror}.") from None
    return folder
