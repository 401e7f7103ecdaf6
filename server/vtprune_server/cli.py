# SPDX-License-Identifier: Apache-2.0
"""The command line `vtprune`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from vllm_vtprune.compat import check_vllm_version

#: Each command and the module whose `main` runs it; imported when asked for.
_COMMANDS = {
    "serve": "vtprune_server.serve",
    "loadtest": "vtprune_loadtest.__main__",
    "eval": "vtprune_eval.__main__",
    "memory": "vtprune_server.memory",
    "calibrate": "vtprune_calibrate.__main__",
}

_USAGE = """\
usage: vtprune COMMAND [options]

commands:
  serve [MODEL]   start the OpenAI-compatible server; without MODEL the embedded demo model
  loadtest        load-test an OpenAI-compatible server
  eval            measure what pruning costs in answers
  memory MODEL    what tower and engine take of a GPU, from config.json alone
  calibrate       find the prune schedule for a model and its pictures
  version         print the versions

`vtprune COMMAND --help` lists a command's options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, or 2 with one sentence on standard error when something cannot work.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0
    if command == "version":
        return _version()
    if command not in _COMMANDS:
        print(f"vtprune: unknown command {command!r}; see vtprune --help", file=sys.stderr)
        return 2
    run: Callable[[list[str]], int] = import_module(_COMMANDS[command]).main
    return run(rest)


def _version() -> int:
    from vllm_vtprune import __version__

    print(f"vtprune {__version__}")
    check_vllm_version()
    from vllm.version import __version__ as vllm_version

    print(f"vLLM {vllm_version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
