# SPDX-License-Identifier: Apache-2.0
"""Tower outputs per image, kept apart from any request's settings, bounded in bytes."""

from __future__ import annotations

import threading
from contextlib import suppress

from cachetools import LRUCache

from vllm_vtprune.families.base import TowerOutput
from vllm_vtprune.vision.transfer import held_bytes


class FeatureCache:
    """Least-recently-used cache of `TowerOutput` by image content. Thread-safe.

    Args:
        capacity: bytes held at most; 0 keeps nothing.
        pinned: the entries lie in pinned host memory.
    """

    def __init__(self, capacity: int, *, pinned: bool = False) -> None:
        self.pinned = pinned
        self._entries: LRUCache[str, TowerOutput] = LRUCache(
            capacity, getsizeof=lambda entry: held_bytes(entry, pinned=pinned)
        )
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """Bytes held at most."""
        return int(self._entries.maxsize)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self._entries.currsize)

    def get(self, key: str, outputs: frozenset[str] = frozenset()) -> TowerOutput | None:
        """The entry, if it has all of the optional outputs wanted."""
        with self._lock:
            entry = self._entries.get(key)
            return entry if entry is not None and outputs <= entry.outputs else None

    def put(self, key: str, entry: TowerOutput) -> None:
        """Keep an entry, evicting the least recently used; one larger than the whole cache is not kept."""
        # cachetools says so by ValueError, and keeps an older entry of that key
        with self._lock, suppress(ValueError):
            self._entries.pop(key, None)
            self._entries[key] = entry

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
