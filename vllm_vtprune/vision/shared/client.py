# SPDX-License-Identifier: Apache-2.0
"""A vision tower that runs in another process, for an API process: what `VisionService` is where it does not.

No process watches over the tower: whoever finds none starts one, under a lock, and a tower that dies is
started again by the first that misses it. A request that was under way is sent once more.
"""

from __future__ import annotations

import fcntl
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_vtprune.errors import TowerLostError
from vllm_vtprune.families.base import Item, Kept, Projected, TowerOutput
from vllm_vtprune.vision.outcomes import Outcomes
from vllm_vtprune.vision.shared.channel import pack_item, pack_kept, receive, send, unpack_output
from vllm_vtprune.vision.shared.process import Recipe

logger = logging.getLogger(__name__)

#: Names the folder of a server's towers; set by the process that starts it, inherited by the others.
FOLDER_VARIABLE = "VTPRUNE_TOWER_FOLDER"
#: Loading a tower may mean fetching a checkpoint.
_START_S = 1800.0
_POLL_S = 0.05
#: Spare connections an API process keeps: as many as threads call at once.
_SPARE = 16
#: Errors that keep their type on the way here; others are RuntimeError.
_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "OutOfMemoryError": torch.OutOfMemoryError}


class RemoteCache:
    """What is known here of the tower's cache.

    Attributes:
        nbytes: bytes held, as told last; 0 in all API processes but the first, as metrics add them up.
    """

    nbytes = 0


class SharedTower:
    """Thread-safe access to the tower process of one device.

    Args:
        folder: of the server's towers.
        name: the device's.
        recipe: how to load it, if it is to be started.
        first: whether this API process tells of the cache.

    Attributes:
        device: where the tower runs.
        dtype: its precision.
        observer: as in `VisionService`; each pass is told to one of the API processes.
        waiting_observer: as in `VisionService`, but an image counts until its output is here.
    """

    def __init__(self, folder: Path, name: str, recipe: Recipe, *, first: bool = True) -> None:
        self.device: torch.device = recipe.load["device"]
        self.dtype: torch.dtype = recipe.load["dtype"]
        self.outcomes = Outcomes()
        self.cache = RemoteCache()
        self.observer: Callable[[int, float], None] | None = None
        self.waiting_observer: Callable[[int], None] | None = None
        self._folder, self._name, self._recipe, self._first = folder, name, recipe, first
        self._spare: list[socket.socket] = []
        self._lock = threading.Lock()
        self._started: subprocess.Popen[bytes] | None = None
        # held for as long as this process lives: it is what keeps the tower from ending
        self._anchor: socket.socket | None = None

    # --- what VisionService does ----------------------------------------------------------------------------

    def encode(
        self,
        keys: Sequence[str],
        prepare: Callable[[list[int]], Sequence[Item]],
        outputs: frozenset[str] = frozenset(),
    ) -> list[TowerOutput]:
        """`VisionService.encode`, by the tower process; the outputs are on the host.

        Raises:
            TowerLostError: the tower process died, and died again.
            Exception: whatever `prepare` raised, or the tower.
        """
        prepared: dict[int, Item] = {}
        self._tell_waiting(len(keys))
        try:
            while True:
                tensors: list[Tensor] = []
                items = {str(i): pack_item(item, tensors) for i, item in prepared.items()}
                asked = {"do": "encode", "keys": list(keys), "outputs": sorted(outputs), "items": items}
                answer, found = self._call(asked, tensors)
                if "missing" not in answer:
                    return [unpack_output(output, found) for output in answer["outputs"]]
                # neither cached nor on their way; more of them where the cache has let go of one since
                missing = answer["missing"]
                prepared |= zip(missing, prepare(missing), strict=True)
        finally:
            self._tell_waiting(-len(keys))

    def project(self, images: Sequence[Kept]) -> list[Projected]:
        """`VisionService.project`, by the tower process; the embeddings are on the host."""
        tensors: list[Tensor] = []
        packed = [pack_kept(kept, tensors) for kept in images]
        answer, found = self._call({"do": "project", "images": packed}, tensors)
        count = answer["images"]
        return list(zip(found[:count], found[count:], strict=True))

    def available(self, keys: Iterable[str], outputs: frozenset[str] = frozenset()) -> int:
        """`VisionService.available`."""
        asked = {"do": "available", "keys": list(keys), "outputs": sorted(outputs)}
        count: int = self._call(asked)[0]["count"]
        return count

    # --- the process ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Whether the tower process answers, without starting it: its `pid` or None, and its `restarts`."""
        found: dict[str, Any] = {"pid": None, "restarts": max(self._starts() - 1, 0)}
        try:
            with self._connected() as channel:
                channel.settimeout(5)
                send(channel, {"do": "state"})
                answer = receive(channel)[0]
        except (OSError, EOFError):
            return found
        self._learn(answer)
        return {**found, "pid": answer["pid"]}

    def revive(self) -> None:
        """Start the tower process where there is none, and wait until it answers."""
        self._call({"do": "state"})

    def _call(self, message: dict[str, Any], tensors: Sequence[Tensor] = ()) -> tuple[Any, list[Tensor]]:
        died: set[int] = set()
        deadline = time.monotonic() + _START_S
        while True:
            channel = self._channel()
            number = self._starts()
            try:
                send(channel, message, tensors)
                answer, found = receive(channel)
            except (OSError, EOFError) as error:
                channel.close()
                self._forget()
                if number not in died:
                    logger.warning("vtprune: the vision tower's process has died; the request is sent again.")
                died.add(number)
                if len(died) > 1 or time.monotonic() > deadline:
                    raise TowerLostError(
                        "The vision tower's process died twice while it served a request: its log says why."
                    ) from error
                # one that is dying still takes connections for a moment: that is no second death
                time.sleep(_POLL_S)
                continue
            with self._lock:
                if len(self._spare) < _SPARE:
                    self._spare.append(channel)
                else:
                    channel.close()
            self._learn(answer)
            if "error" in answer:
                raise _ERRORS.get(answer["error"], RuntimeError)(answer["text"])
            return answer, found

    def _learn(self, answer: dict[str, Any]) -> None:
        if self._first:
            self.cache.nbytes = answer["cached"]
        if self.observer is not None:
            for images, seconds in answer["passes"]:
                self.observer(images, seconds)

    def _tell_waiting(self, change: int) -> None:
        if self.waiting_observer is not None:
            self.waiting_observer(change)

    def _channel(self) -> socket.socket:
        with self._lock:
            if self._spare:
                return self._spare.pop()
        try:
            return self._anchored()
        except OSError:
            self._start()
            return self._anchored()

    def _anchored(self) -> socket.socket:
        channel = self._connected()
        with self._lock:
            if self._anchor is None:
                self._anchor = self._connected()
        return channel

    def _connected(self) -> socket.socket:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            channel.connect(str(self._folder / f"{self._name}.sock"))
        except OSError:
            channel.close()
            raise
        return channel

    def _forget(self) -> None:
        """Let go of connections to a process that has died."""
        with self._lock:
            gone, self._spare = self._spare, []
            gone += [self._anchor] if self._anchor is not None else []
            self._anchor = None
        for channel in gone:
            channel.close()

    def _starts(self) -> int:
        path = self._folder / f"{self._name}.starts"
        return int(path.read_text()) if path.is_file() else 0

    def _start(self) -> None:
        """Start the process, unless another API process does, and wait until it listens.

        Raises:
            TowerLostError: it ended before it listened.
        """
        with (self._folder / f"{self._name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self._connected().close()
            except OSError:
                pass
            else:
                return  # while this process waited for the lock
            (self._folder / f"{self._name}.recipe").write_bytes(pickle.dumps(self._recipe))
            (self._folder / f"{self._name}.starts").write_text(str(self._starts() + 1))
            if self._started is not None:
                self._started.poll()  # or the last one would stay a zombie
            module = "vllm_vtprune.vision.shared.process"
            command = [sys.executable, "-m", module, str(self._folder), self._name]
            process = self._started = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            deadline = time.monotonic() + _START_S
            while time.monotonic() < deadline:
                try:
                    self._connected().close()
                except OSError:
                    if process.poll() is not None:
                        break
                    time.sleep(_POLL_S)
                else:
                    logger.info("vtprune: one vision tower for all API processes, process %d", process.pid)
                    return
        raise TowerLostError(
            "The vision tower's process ended before it could serve: its log above says why."
        )


def tower_folder() -> Path:
    """The folder of this server's towers, made by the first process that asks.

    Raises:
        OSError: it cannot be made.
    """
    import atexit
    import shutil
    import tempfile

    if FOLDER_VARIABLE not in os.environ:
        folder = tempfile.mkdtemp(prefix="vtprune-")  # for this user alone
        os.environ[FOLDER_VARIABLE] = folder
        maker = os.getpid()

        def remove() -> None:
            if os.getpid() == maker:
                shutil.rmtree(folder, ignore_errors=True)

        atexit.register(remove)
    return Path(os.environ[FOLDER_VARIABLE])
