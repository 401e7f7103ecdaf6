# SPDX-License-Identifier: Apache-2.0
"""A process that has imported vLLM and forks itself: each child starts as if it had just done so.

    python -m tests.helpers.warm_process        # reads orders, a line of JSON each; `WarmProcess` writes them

Importing vLLM keeps a core busy for ten seconds, and the engine tests start dozens of processes, since a
plugin cannot be unloaded. A child runs a module as ``python -m MODULE ARGUMENTS`` does. Imported beforehand
is what ``from vllm import LLM`` imports, which comes before any plugin is loaded, and packages of others that
an engine needs: the plugin finds a child as it finds any process. No thread runs when it forks.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.helpers.model_inspection import inspect_here

#: What an engine imports of others' packages once it is made.
_OTHERS = ("torch._dynamo", "transformers.models.llava.modeling_llava", "xgrammar")
#: Read when modules are imported, thus the same for a process and its children.
READ_AT_IMPORT = ("TRITON_INTERPRET", "VLLM_LOGGING_LEVEL", "OMP_NUM_THREADS")


class WarmProcess:
    """One such process.

    Args:
        env: its environment.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.warm_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(env),
            cwd=REPOSITORY,
        )

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        log: Path,
        timeout: float,
        cwd: Path = REPOSITORY,
    ) -> int:
        """Have a child run a module, its output in a file; the exit status, negative for a signal.

        After an exception there is no child left, and this process cannot be used again.

        Raises:
            TimeoutError: it did not end in time.
            RuntimeError: the process could not import vLLM.
        """
        order = {
            "module": module,
            "arguments": [*arguments],
            "env": dict(env),
            "log": str(log),
            "cwd": str(cwd),
        }
        child = 0
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            child = self._told(timeout)
            return self._told(timeout)
        except BaseException:
            if child:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
            self.close()
            raise

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _told(self, timeout: float) -> int:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                raise TimeoutError(f"not done within {timeout} s")
        if not (line := self._process.stdout.readline()):
            raise RuntimeError("the process that imports vLLM has ended; its words are on standard error")
        return int(line)


def main() -> None:
    """Import; then fork for each order, and tell the child's process id and exit status."""
    # what is imported may print: the lines meant for `WarmProcess` go over a descriptor of their own
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if os.environ.get("TRITON_INTERPRET"):
        from tests.helpers.model_runner_v2 import offer_triton

        offer_triton()
    import vllm

    vllm.LLM  # noqa: B018  # vLLM's names are imported when they are asked for
    inspect_here()
    for name in _OTHERS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        sys.stdout.flush()
        sys.stderr.flush()
        if child := os.fork():
            print(child, file=told, flush=True)
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), file=told, flush=True)
            continue
        os.setsid()
        os.close(told.fileno())
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
            os.dup2(descriptor, target)
        os.chdir(order["cwd"])
        os.environ.clear()
        os.environ.update(order["env"])
        sys.argv[1:] = order["arguments"]
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
        return


if __name__ == "__main__":
    main()
