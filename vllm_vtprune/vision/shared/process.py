# SPDX-License-Identifier: Apache-2.0
"""The tower process: one `VisionService` for all API processes of a device.

    python -m vllm_vtprune.vision.shared.process FOLDER NAME

An API process starts it (`client.SharedTower`) and leaves what to load in FOLDER/NAME.recipe. It listens at
FOLDER/NAME.sock once the tower is loaded; each connection has a thread, so that callers of all API processes
meet in `VisionService`, which batches them. It ends when nobody has been connected for a while: whoever
starts next starts it again.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_vtprune.families.base import Item
from vllm_vtprune.vision.encoder import VisionEncoder
from vllm_vtprune.vision.feature_cache import FeatureCache
from vllm_vtprune.vision.service import VisionService
from vllm_vtprune.vision.shared.channel import (
    pack_output,
    receive,
    send,
    unpack_item,
    unpack_kept,
)
from vllm_vtprune.vision.transfer import to_host

logger = logging.getLogger(__name__)

#: Seconds without a connection after which it ends: an API process keeps one for as long as it lives.
LONELY_S = 10.0


@dataclass(frozen=True)
class Recipe:
    """What an API process says of the tower it wants.

    Attributes:
        config: the checkpoint's configuration.
        model: local folder or hub id.
        load: further arguments of `VisionEncoder.load`.
        cache_bytes: of the feature cache, which all share.
        cache_on_host: as in `VisionService`.
        max_batch: likewise.
        threads: likewise.
    """

    config: Any
    model: str
    load: dict[str, Any]
    cache_bytes: int
    cache_on_host: bool
    max_batch: int
    threads: int

    def service(
        self, observer: Callable[[int, float], None] | None = None, *, answers_on_host: bool = False
    ) -> VisionService:
        """Load the tower."""
        encoder = VisionEncoder.load(self.config, self.model, **self.load)
        pinned = self.cache_on_host and encoder.device.type == "cuda"
        return VisionService(
            encoder,
            FeatureCache(self.cache_bytes, pinned=pinned),
            max_batch=self.max_batch,
            threads=self.threads,
            cache_on_host=self.cache_on_host,
            answers_on_host=answers_on_host,
            own_thread=encoder.device.type == "cuda",
            observer=observer,
        )


class TowerProcess:
    """Answers API processes.

    Args:
        make: the service, given what it is to call after each pass.
    """

    def __init__(self, make: Callable[[Callable[[int, float], None]], VisionService]) -> None:
        #: Passes that no API process has been told of.
        self._passes: deque[tuple[int, float]] = deque()
        self.service = make(lambda images, seconds: self._passes.append((images, seconds)))
        self._connected = 0
        self._changed = threading.Condition()

    def listen(self, path: Path, lonely_s: float = LONELY_S) -> None:
        """Serve connections until there has been none for a while."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        beside = path.with_suffix(f".{os.getpid()}")
        listener.bind(str(beside))
        listener.listen(128)
        # clients find it when it listens and not before
        beside.rename(path)
        listener.settimeout(lonely_s)
        while True:
            try:
                channel, _ = listener.accept()
            except TimeoutError:
                with self._changed:
                    if not self._connected:
                        return
                continue
            channel.setblocking(True)
            with self._changed:
                self._connected += 1
            threading.Thread(target=self._serve, args=(channel,), daemon=True).start()

    def _serve(self, channel: socket.socket) -> None:
        try:
            with channel:
                while True:
                    message, tensors = receive(channel)
                    send(channel, *self.answer(message, tensors))
        except (EOFError, OSError):
            pass  # the API process has gone, or lets go of a spare connection
        finally:
            with self._changed:
                self._connected -= 1

    def answer(self, message: dict[str, Any], tensors: list[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
        """The answer to one message; an error becomes one, and is the caller's to raise."""
        out: list[Tensor] = []
        try:
            result = getattr(self, f"_do_{message['do']}")(message, tensors, out)
        except Exception as error:
            out.clear()
            logger.exception("vtprune: a request to the vision tower failed")
            result = {"error": type(error).__name__, "text": str(error)}
        told = []
        while self._passes:
            told.append(self._passes.popleft())
        return {**result, "passes": told, "pid": os.getpid(), "cached": self.service.cache.nbytes}, out

    def _do_state(self, message: dict[str, Any], tensors: list[Tensor], out: list[Tensor]) -> dict[str, Any]:
        return {}

    def _do_available(
        self, message: dict[str, Any], tensors: list[Tensor], out: list[Tensor]
    ) -> dict[str, Any]:
        return {"count": self.service.available(message["keys"], frozenset(message["outputs"]))}

    def _do_encode(self, message: dict[str, Any], tensors: list[Tensor], out: list[Tensor]) -> dict[str, Any]:
        given = {int(i): unpack_item(item, tensors) for i, item in message["items"].items()}

        missing: list[int] = []

        def prepare(positions: Sequence[int]) -> list[Item]:
            missing.extend(i for i in positions if i not in given)
            return [given[i] for i in positions]

        try:
            outputs = self.service.encode(message["keys"], prepare, frozenset(message["outputs"]))
        except KeyError:
            if not missing:
                raise
            return {"missing": missing}
        return {"outputs": [pack_output(output, out) for output in outputs]}

    def _do_project(
        self, message: dict[str, Any], tensors: list[Tensor], out: list[Tensor]
    ) -> dict[str, Any]:
        device = self.service.encoder.device
        projected = self.service.project([unpack_kept(kept, tensors, device) for kept in message["images"]])
        out += to_host([embeddings for embeddings, _ in projected])
        out += to_host([places for _, places in projected])
        return {"images": len(projected)}


def main(arguments: list[str]) -> int:
    """Load the tower and serve it."""
    folder, name = Path(arguments[0]), arguments[1]
    logging.basicConfig(level=logging.INFO, format="%(levelname)s tower %(process)d: %(message)s")
    # a server that is told to stop finishes what it has accepted, and lets go of its connections then
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # the server's own, in a folder that is its user's alone
    recipe: Recipe = pickle.loads((folder / f"{name}.recipe").read_bytes())
    TowerProcess(partial(recipe.service, answers_on_host=True)).listen(folder / f"{name}.sock")
    return 0


if __name__ == "__main__":
    # under its own name, so that the recipe's class is this one
    from vllm_vtprune.vision.shared import process

    sys.exit(process.main(sys.argv[1:]))
