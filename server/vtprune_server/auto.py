# SPDX-License-Identifier: Apache-2.0
"""The preset `auto`: prune as much as the load demands.

A ladder of presets between the operator's floor and ceiling. Four signals of load, each divided by the
operator's mark for it, are one pressure, the largest. At 1 the level rises by one step, and by another each
second that the pressure stays there; at 2 each look is a step. It falls by one step once the pressure has
stayed below a half for `calm_s`; between the two it holds. A step down that has to be taken back doubles the
calm that the next one needs, up to four times, until a step down holds: else a server whose load lies between
two levels would swing between them for ever.

The levels are presets and nothing between, so that a picture is decided for at most a few settings, and a
request under `auto` shares every cache with those that name the preset. Nothing here knows of vLLM or reads a
clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Between two steps up, in seconds.
RAISE_SECONDS = 1.0
#: Pressure below which the load counts as calm.
CALM = 0.5
#: Pressure at which the next step up does not wait.
STEEP = 2.0
_LONGEST_WAIT = 4


@dataclass(frozen=True, slots=True)
class Load:
    """What one API process knows of the load.

    Attributes:
        waiting: requests that wait in an engine.
        kv_use: share of its KV cache in use, in [0, 1].
        images: images that wait for the vision tower.
        ttft_s: the time to first token that a request may expect, in seconds; None where nothing tells.
    """

    waiting: float = 0
    kv_use: float = 0.0
    images: int = 0
    ttft_s: float | None = None


@dataclass(frozen=True, slots=True)
class Marks:
    """The load at which the level rises; 0 passes over a signal. The units are those of `Load`."""

    waiting: float = 0
    kv_use: float = 0.0
    images: float = 0
    ttft_s: float = 0.0

    def pressure(self, load: Load) -> float:
        """The largest signal, as a share of its mark."""
        pairs = [
            (load.waiting, self.waiting),
            (load.kv_use, self.kv_use),
            (load.images, self.images),
            (load.ttft_s or 0.0, self.ttft_s),
        ]
        return max((signal / mark for signal, mark in pairs if mark), default=0.0)


class AutoLevel:
    """Which preset `auto` stands for now.

    Args:
        levels: presets, the one that prunes least first.
        marks: the operator's.
        calm_s: seconds below `CALM` before a step down.
    """

    def __init__(self, levels: Sequence[str], marks: Marks, calm_s: float) -> None:
        self.levels = tuple(levels)
        self.pressure = 0.0
        self._marks = marks
        self._calm_s = calm_s
        self._at = 0
        self._raised = float("-inf")
        self._lowered = float("-inf")
        self._calm_since: float | None = None
        self._patience = 1

    @property
    def level(self) -> str:
        """The preset."""
        return self.levels[self._at]

    def observe(self, load: Load, now: float) -> int:
        """Take note of the load.

        Args:
            load: as it is.
            now: seconds of a clock that never goes back.

        Returns:
            1 where the level rose, -1 where it fell, 0 where it stayed.
        """
        self.pressure = self._marks.pressure(load)
        if self.pressure >= CALM:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        if self.pressure >= 1.0:
            return self._rise(now)
        if self._lowered > self._raised and now - self._lowered >= self._patience * self._calm_s:
            self._patience = 1  # the last step down has held
        if self._calm_since is not None and now - self._calm_since >= self._patience * self._calm_s:
            return self._fall(now)
        return 0

    def _rise(self, now: float) -> int:
        soon = now - self._raised < RAISE_SECONDS and self.pressure < STEEP
        if self._at == len(self.levels) - 1 or soon:
            return 0
        if now - self._lowered < self._calm_s:
            self._patience = min(2 * self._patience, _LONGEST_WAIT)
        self._at += 1
        self._raised = now
        return 1

    def _fall(self, now: float) -> int:
        if self._at == 0:
            return 0
        self._at -= 1
        self._lowered = self._calm_since = now
        return -1
