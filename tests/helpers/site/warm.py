# SPDX-License-Identifier: Apache-2.0
"""Has Ray's workers, and the engines of those that become replicas, forked from a process that has imported vLLM.

    python -m warm SOCKET        # that process, one for a machine; `WARM` in its environment names the socket

A replica imports vLLM three times, one after the other: in its own process, in its engine, in the engine's
worker; each time keeps a core busy for more than ten seconds, and tests start a dozen. Here a program that is
to be a worker of Ray's has the warm process fork a child, which runs what it would have run, with its
arguments, environment, folder and outputs, and waits for the child's end; when it is killed so is the child.
The child's engine, and that one's worker, come from a fork server of its own, so that they are descendants of
it, and get no descriptors but those they are sent.

Imported beforehand is what comes before any plugin is loaded, and packages of others; not Ray, which reads
its settings when it is imported.
"""

from __future__ import annotations

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
import time
from multiprocessing import (
    connection,
    context,
    forkserver,
    popen_forkserver,
    popen_spawn_posix,
    resource_tracker,
    spawn,
)
from typing import Any

#: The variable with the socket's path.
WARM = "VTPRUNE_TEST_WARM"
_CLONE_NEWNET = 0x40000000  # of sched.h
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
#: vLLM's processes that are forked, by the beginnings of their names.
_FORKED = ("EngineCore", "VllmWorker")
_preparation_data, _prepare = spawn.get_preparation_data, spawn.prepare


def run_warm() -> None:
    """Where a worker of Ray's is to run and a warm process is there: have it run in a child of that."""
    program = [*itertools.dropwhile(lambda one: one.startswith("-"), sys.orig_argv[1:])]
    if not program or not program[0].endswith("/default_worker.py"):
        return
    with socket.socket(socket.AF_UNIX) as warm:
        while True:
            try:
                warm.connect(os.environ[WARM])
                break
            except FileNotFoundError:  # it still imports
                time.sleep(0.1)
            except ConnectionError:  # it has ended
                return
        order = {"argv": program, "env": dict(os.environ), "cwd": os.getcwd()}
        content = json.dumps(order).encode()
        network = os.open("/proc/self/ns/net", os.O_RDONLY)
        socket.send_fds(warm, [len(content).to_bytes(8, "big")], [0, 1, 2, network])
        warm.sendall(content)
        child = int.from_bytes(warm.recv(8, socket.MSG_WAITALL), "big")
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
        warm.recv(1)
    os._exit(0)


def main(path: str) -> None:
    """Import, and fork a child for each connection."""
    sys.modules["ray"] = None  # type: ignore[assignment]
    for name in _IMPORTED:
        importlib.import_module(name)
    del sys.modules["ray"]
    # it finds the memory of the title by the environment as it was at the start
    import setproctitle

    setproctitle.getproctitle()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    children: dict[socket.socket, int] = {}
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(path + ".new")
        listener.listen()
        os.rename(path + ".new", path)
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(1.0 if children else None):
                asking = key.fileobj
                assert isinstance(asking, socket.socket)
                if asking is not listener:  # its program has ended
                    _kill(children.pop(asking))
                    selector.unregister(asking)
                    asking.close()
                    continue
                asking, _ = listener.accept()
                length, descriptors, _, _ = socket.recv_fds(asking, 8, 4)
                content = asking.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
                if child := os.fork():
                    for descriptor in descriptors:
                        os.close(descriptor)
                    asking.sendall(child.to_bytes(8, "big"))
                    children[asking] = child
                    selector.register(asking, selectors.EVENT_READ)
                    continue
                selector.close()
                for other in (*children, asking, listener):
                    other.close()
                _run(json.loads(content), descriptors)
                return
            for asking, child in [*children.items()]:
                if not os.path.exists(f"/proc/{child}"):
                    selector.unregister(asking)
                    del children[asking]
                    asking.close()


def _kill(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _run(order: dict[str, Any], descriptors: list[int]) -> None:
    """Be the program."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # as Ray does
    *outputs, network = descriptors
    if os.path.sameopenfile(network, os.open("/proc/self/ns/net", os.O_RDONLY)) is False:
        if ctypes.CDLL(None, use_errno=True).setns(network, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    os.close(network)
    for target, descriptor in enumerate(outputs):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(order["cwd"])
    _set_environment(order["env"])
    _fork_engines()
    sys.argv[:] = order["argv"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")


def _fork_engines() -> None:
    """Have engines and their workers come from a fork server that is a child of this process."""
    spawn.get_preparation_data = _with_environment
    spawn.prepare = _prepare_with_environment
    context.SpawnProcess._Popen = staticmethod(_popen)  # type: ignore[method-assign]
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    # `multiprocessing.forkserver.ForkServer.ensure_running`, with a fork in the place of a new interpreter
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(connection.arbitrary_address("AF_UNIX"))
    listener.listen()
    alive_read, alive_write = os.pipe()
    if child := os.fork():
        os.close(alive_read)
        server._forkserver_address = listener.getsockname()
        server._forkserver_alive_fd = alive_write
        server._forkserver_pid = child
        listener.close()
        return
    os.close(alive_write)
    # a process forked from it asks it again, and not one of its own
    server.ensure_running = resource_tracker.ensure_running
    forkserver.main(listener.detach(), alive_read, None)  # type: ignore[attr-defined]
    os._exit(0)


def _popen(process: Any) -> Any:
    if not process._name.startswith(_FORKED):
        return popen_spawn_posix.Popen(process)
    started = popen_forkserver.Popen(process)
    with open(f"{os.environ[WARM]}.{os.getpid()}", "a") as file:
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
    if "LD_PRELOAD" not in os.environ:
        from vtprune_server.serve import prepare_environment

        prepare_environment()
        if "LD_PRELOAD" in os.environ:
            os.execv(sys.executable, sys.orig_argv)
    main(sys.argv[1])
