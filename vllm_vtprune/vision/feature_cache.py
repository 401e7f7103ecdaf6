# SPDX-License-Identifier: Apache-2.0
"""Tower outputs per image, kept apart from any request's settings, bounded in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict

from vllm_vtprune.vision.encoder import TowerOutput


class FeatureCache:
    """Least-recently-used cache of `TowerOutput` by image content. Thread-safe.

    Args:
        capacity: bytes held at most; 0 keeps nothing.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.nbytes = 0
        self._entries: OrderedDict[str, TowerOutput] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str, outputs: frozenset[str] = frozenset()) -> TowerOutput | None:
        """The entry, if it has all of the optional outputs wanted."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not outputs <= entry.outputs:
                return None
            self._entries.move_to_end(key)
            return entry

    def put(self, key: str, entry: TowerOutput) -> None:
        """Keep an entry, evicting the least recently used; one larger than the whole cache is not kept."""
        with self._lock:
            old = self._entries.pop(key, None)
            if old is not None:
                self.nbytes -= old.nbytes
            if entry.nbytes > self.capacity:
                return
            self._entries[key] = entry
            self.nbytes += entry.nbytes
            while self.nbytes > self.capacity:
                _, evicted = self._entries.popitem(last=False)
                self.nbytes -= evicted.nbytes

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)
