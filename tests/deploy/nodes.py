# SPDX-License-Identifier: Apache-2.0
"""Machines for tests: network namespaces on a bridge, or loopback addresses where those are refused."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count

import psutil


@dataclass
class Node:
    """A machine.

    Attributes:
        address: its IP address, reachable from the test and from the other nodes.
        namespace: its network namespace, or None where it shares the host's.
    """

    address: str
    namespace: str | None = None
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def command(self, *command: str) -> list[str]:
        """The command line that runs a command on this machine."""
        prefix = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        return [*prefix, *command]

    def start(self, *command: str, **popen: object) -> subprocess.Popen[bytes]:
        """Start a program that belongs to the machine and ends with it."""
        process = subprocess.Popen(self.command(*command), start_new_session=True, **popen)  # type: ignore[call-overload]
        self._started.append(process)
        return process  # type: ignore[no-any-return]

    def processes(self) -> list[psutil.Process]:
        """What runs on it: everything in the namespace, else what was started here and its children."""
        if self.namespace:
            listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
            pids = [int(pid) for pid in listed.stdout.split()]
        else:
            pids = []
            for process in self._started:
                with suppress(psutil.NoSuchProcess):
                    top = psutil.Process(process.pid)
                    pids += [top.pid, *(child.pid for child in top.children(recursive=True))]
        found = []
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return found

    def kill(self) -> None:
        """Lose the machine: everything on it is killed at once."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        for started in self._started:
            with suppress(subprocess.TimeoutExpired):
                started.wait(10)
        self._started.clear()


_LENT = count()


@contextmanager
def machines(wanted: int) -> Iterator[list[Node]]:
    """Lend machines that can reach each other and that the test can reach."""
    if not namespaces_allowed():
        nodes = [Node(f"127.0.0.{i + 1}") for i in range(wanted)]
        try:
            yield nodes
        finally:
            for node in nodes:
                node.kill()
        return
    number = _bridge()
    tag, net = f"vtp{number}", f"10.78.{number}"
    nodes = []
    try:
        _ip("addr", "add", f"{net}.254/24", "dev", f"{tag}b")
        _ip("link", "set", f"{tag}b", "up")
        for i in range(wanted):
            name = f"{tag}n{i}"
            _ip("netns", "add", name)
            nodes.append(Node(f"{net}.{i + 1}", name))
            _ip("link", "add", f"{tag}v{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", f"{tag}v{i}", "master", f"{tag}b", "up")
            _ip("-n", name, "addr", "add", f"{net}.{i + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield nodes
    finally:
        for node in nodes:
            node.kill()
            subprocess.run(["ip", "netns", "del", str(node.namespace)], check=False)
        subprocess.run(["ip", "link", "del", f"{tag}b"], check=False)


def _bridge() -> int:
    """Make a bridge whose number no other test process has, and give that."""
    for _ in range(250):
        number = (os.getpid() + 97 * next(_LENT)) % 250
        with suppress(subprocess.CalledProcessError):
            _ip("link", "add", f"vtp{number}b", "type", "bridge")
            return number
    raise RuntimeError("no bridge can be made: `ip link` shows those that are left over")


def namespaces_allowed() -> bool:
    """Whether this machine lets us make a network namespace with a virtual cable into it."""
    if os.geteuid():
        return False
    name = f"vtp{os.getpid() % 100000}t"
    try:
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        with suppress(OSError):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return True


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
