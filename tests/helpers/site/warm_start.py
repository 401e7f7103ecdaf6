# SPDX-License-Identifier: Apache-2.0
"""Has Ray's workers, servers and their engines forked from one process that has imported vLLM.

    python -m warm_start SOCKET        # that process; its children's PYTHONPATH has this folder

A server on the CPU imports vLLM three times, one after the other: in the process that answers, in its engine,
in the engine's worker. Each time keeps a core busy for more than ten seconds, and the tests of deploy/ start
a dozen engines. With `VARIABLE` in its environment a program that is to be a worker of Ray's, or a server,
has the process fork a child that runs it with its arguments, environment, folder, outputs and namespace,
and itself waits for the child's end; when it is killed, so is the child's process group. A child's engine,
and that one's worker, come from Python's own fork server, a child of the child: they are its descendants, as
they would be, and get no descriptors but those they are sent.

Imported beforehand is what comes before any plugin is loaded, and packages of others; not Ray, which reads
its settings when it is imported. No thread runs when it forks.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import itertools
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from multiprocessing import context, forkserver, popen_forkserver, popen_spawn_posix, resource_tracker, spawn
from typing import Any

#: Names the socket. Beside it lies a file for each process with children from its fork server, named by the
#: process's id: their names and process ids, a line each.
VARIABLE = "VTPRUNE_TEST_WARM"
#: What is run in a child: a worker of Ray's, and a server.
_WORKER = "/default_worker.py"
_SERVER = ["-m", "vtprune_server.cli"]
_IMPORTED = (
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.cli.serve",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "torch._dynamo",
    "transformers.models.llava.modeling_llava",
    "xgrammar",
)
#: vLLM's processes that are forked, by the beginnings of their names. Those that answer are not, where there
#: are several: Prometheus's client reads their environment when it is imported.
_FORKED = ("EngineCore", "VllmWorker", "VLLM_DP_Coordinator")
_CLONE_NEWNET = 0x40000000  # of <sched.h>
_preparation_data, _prepare = spawn.get_preparation_data, spawn.prepare


def run_warm() -> None:
    """Run this program in a child of the warm process, if it is one of those, and end with it."""
    program = [*itertools.dropwhile(lambda one: one.startswith("-") and one != "-m", sys.orig_argv[1:])]
    if program[:2] != _SERVER and not (program and program[0].endswith(_WORKER)):
        return
    content = json.dumps({"argv": program, "env": dict(os.environ), "cwd": os.getcwd()}).encode()
    network = os.open("/proc/self/ns/net", os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as warm:
        warm.connect(os.environ[VARIABLE])
        socket.send_fds(warm, [len(content).to_bytes(8, "big")], [0, 1, 2, network])
        warm.sendall(content)
        if not (child := int.from_bytes(warm.recv(8), "big")):
            raise SystemExit("the process that this one was to be forked from has ended")
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
        warm.recv(1)
    os._exit(0)


def main(path: str) -> None:
    """Import, and fork a child for each connection."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    _import()
    children: dict[socket.socket, int] = {}

    def end(*_: object) -> None:
        for child in children.values():
            _kill(child)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            ended = []
            for key, _ in selector.select(0.5):
                if key.fileobj is not listener:
                    ended.append(key.fileobj)
                    continue
                asking, _ = listener.accept()
                length, descriptors, _, _ = socket.recv_fds(asking, 8, 4)
                if not length:  # killed before it could ask
                    asking.close()
                    continue
                order = asking.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
                if child := os.fork():
                    for descriptor in descriptors:
                        os.close(descriptor)
                    children[asking] = child
                    selector.register(asking, selectors.EVENT_READ)
                    with contextlib.suppress(OSError):
                        asking.sendall(child.to_bytes(8, "big"))
                    continue
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                selector.close()
                for inherited in (listener, asking, *children):
                    inherited.close()
                _run(json.loads(order), descriptors)
                return
            for asking in ended:  # the program was killed
                _kill(children[asking])
            ended += [asking for asking, child in children.items() if not os.path.exists(f"/proc/{child}")]
            for asking in {*ended}:
                selector.unregister(asking)
                asking.close()
                del children[asking]


def _import() -> None:
    sys.modules["ray"] = None  # type: ignore[assignment]  # vLLM does without
    for name in _IMPORTED:
        importlib.import_module(name)
    del sys.modules["ray"]
    # it finds the memory of a process's title by the environment, as long as that is the first one
    setproctitle = importlib.import_module("setproctitle")
    setproctitle.getproctitle()
    if len(threads := os.listdir("/proc/self/task")) > 1:
        raise RuntimeError(f"{len(threads)} threads run, and a fork would lose them")
    gc.collect()
    gc.freeze()


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def _run(order: dict[str, Any], descriptors: list[int]) -> None:
    """Be the program."""
    os.setpgid(0, 0)  # as Ray has each worker
    *outputs, network = descriptors
    if not os.path.samestat(os.fstat(network), os.stat("/proc/self/ns/net")):
        libc = ctypes.CDLL(None, use_errno=True)  # `os.setns` is of Python 3.12
        if libc.setns(network, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "the network namespace cannot be entered")
    os.close(network)
    for target, descriptor in enumerate(outputs):
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(order["cwd"])
    _set_environment(order["env"])
    _fork_engines()
    sys.argv[:] = order["argv"]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")


def _fork_engines() -> None:
    """Have engines and their workers come from a fork server that is a child of this process."""
    spawn.get_preparation_data = _with_environment
    spawn.prepare = _prepare_with_environment
    context.SpawnProcess._Popen = staticmethod(_popen)  # type: ignore[method-assign]
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    # `multiprocessing.forkserver.ForkServer.ensure_running`, by a fork and not by a new interpreter
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{os.environ[VARIABLE]}.{os.getpid()}.fork")
    listener.listen()
    alive_read, alive_write = os.pipe()
    if child := os.fork():
        server._forkserver_address = listener.getsockname()
        server._forkserver_alive_fd = alive_write
        server._forkserver_pid = child
        os.close(alive_read)
        listener.close()
        return
    try:
        os.close(alive_write)
        # a process forked from it asks it again, and does not start one of its own
        server.ensure_running = resource_tracker.ensure_running
        forkserver.main(listener.detach(), alive_read, None)  # type: ignore[attr-defined]
    finally:
        os._exit(0)


def _popen(process: Any) -> Any:
    if not process._name.startswith(_FORKED):
        return popen_spawn_posix.Popen(process)
    started = popen_forkserver.Popen(process)
    with open(f"{os.environ[VARIABLE]}.{os.getpid()}", "a") as file:
        print(process._name, started.pid, file=file)
    return started


def _with_environment(name: str) -> dict[str, Any]:
    return {**_preparation_data(name), "environment": dict(os.environ)}


def _prepare_with_environment(data: dict[str, Any]) -> None:
    if environment := data.get("environment"):
        _set_environment(environment)
    _prepare(data)


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


if __name__ == "__main__":
    if "LD_PRELOAD" not in os.environ:  # as `vtprune serve` has its engines started
        importlib.import_module("vtprune_server.serve").prepare_environment()
        if "LD_PRELOAD" in os.environ:
            os.execv(sys.executable, sys.orig_argv)
    main(sys.argv[1])
