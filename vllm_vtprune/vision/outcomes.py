# SPDX-License-Identifier: Apache-2.0
"""What was decided about an image, as a part of its identity in vLLM's caches.

A tower's pass differs in its last bits with the company in its batch, and selection is a hard cut: two
processes, or one before and after it forgot, may keep different tokens of the same picture under the same
settings. vLLM takes what lies under one identifier for one thing (`EncoderCacheManager`,
`generate_block_hash_extra_keys`, the processor's caches), so the identifier carries the kept units too. Equal
outcomes have equal identifiers, whoever computed them.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor

from vllm_vtprune.families.base import Kept

#: Characters of a setting that is a key as it is.
_LONGEST_SETTING = 200


def outcome_of(units: Tensor, tokens: int) -> str:
    """Names what stays of one image, in 16 hexadecimal digits.

    Args:
        units: the kept ones, ascending, [k] int64.
        tokens: k' >= k, where a method adds tokens of its own.
    """
    kept = units.to("cpu", torch.int64).numpy().tobytes()
    return hashlib.blake2b(kept, digest_size=8, salt=tokens.to_bytes(8, "little")).hexdigest()


@dataclass
class Decided:
    """An image or a video on its way through the processor.

    Attributes:
        key: from its content and its preprocessing.
        raw: decoded, as vLLM's parser holds it; None where a trusted id stands for it.
        kwargs: of its preprocessing.
        modality: `image` or `video`.
        outcome: what stays of it; None where that is not known yet, or nothing is to be dropped.
        kept: the same, with the tokens; None where vLLM's cache holds them.
    """

    key: str
    raw: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    modality: str = "image"
    outcome: str | None = None
    kept: Kept | None = None

    def decide(self, kept: Kept) -> str:
        """This is what stays; returns its name."""
        self.kept = kept
        self.outcome = outcome_of(kept.units, kept.tokens.shape[0])
        return self.outcome

    def confirm(self, kept: Kept) -> None:
        """This is what stays, and the image's identifier says so already.

        Raises:
            RuntimeError: it says otherwise.
        """
        if self.outcome is not None and self.outcome != outcome_of(kept.units, kept.tokens.shape[0]):
            raise RuntimeError(
                f"A {self.modality} left vLLM's cache while its prompt was prepared: send it again."
            )
        self.kept = kept


def _short(setting: str) -> str:
    """A canonical setting, or a digest of one that carries a long question."""
    if len(setting) <= _LONGEST_SETTING:
        return setting
    return hashlib.blake2b(setting.encode(), digest_size=16).hexdigest()


class Outcomes:
    """The last outcome of each picture and setting in this process, so that a known one runs no tower.

    Thread-safe. An entry is some 200 bytes; the longest unused one leaves first.
    """

    def __init__(self, limit: int = 1 << 16) -> None:
        self._known: LRUCache[tuple[str, str], str] = LRUCache(limit)
        self._lock = threading.Lock()

    def get(self, key: str, setting: str) -> str | None:
        """The outcome for a picture's content key under a canonical setting; None where there was none."""
        with self._lock:
            return self._known.get((key, _short(setting)))

    def put(self, key: str, setting: str, outcome: str) -> None:
        """Note an outcome."""
        with self._lock:
            self._known[key, _short(setting)] = outcome

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._known.clear()
