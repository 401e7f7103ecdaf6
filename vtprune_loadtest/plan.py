# SPDX-License-Identifier: Apache-2.0
"""What is run: load points, and for each the phases that make it up.

A phase starts on an idle server and ends when its last answer has come. One warm-up phase per load point
comes first. Then, interleaved by request, one measured phase in which all settings take turns; or,
interleaved by blocks, several rounds of one short measured phase per setting.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from vtprune_loadtest.record import Role


class Interleave(StrEnum):
    """What alternates between settings."""

    REQUESTS = "requests"
    BLOCKS = "blocks"


@dataclass(frozen=True)
class LoadPoint:
    """Open loop (a rate in requests/s), closed loop (a concurrency), or a rate under a concurrency cap.

    `times_capacity` is the rate in terms of what the first setting reached in a closed loop beforehand;
    `rate` is None until that is known.
    """

    rate: float | None
    concurrency: int | None
    times_capacity: float | None = None

    def at(self, capacity: float) -> "LoadPoint":
        """This point, with a rate where it was given as a multiple of the capacity in requests/s."""
        if self.times_capacity is None:
            return self
        return replace(self, rate=round(self.times_capacity * capacity, 3))

    @property
    def is_closed(self) -> bool:
        """Whether the next request waits for an earlier one to finish, and for nothing else."""
        return self.rate is None

    def describe(self) -> str:
        """A few words for titles."""
        if self.rate is None:
            return f"closed loop, concurrency {self.concurrency}"
        cap = "" if self.concurrency is None else f", at most {self.concurrency} in flight"
        times = "" if self.times_capacity is None else f" ({self.times_capacity:g} times capacity)"
        return f"open loop, {self.rate:g} requests/s{times}{cap}"


@dataclass(frozen=True)
class Amount:
    """How much is measured per setting at each load point: a number of requests or a time, not both."""

    requests: int | None
    duration_s: float | None


@dataclass(frozen=True)
class Phase:
    """One drained stretch of load.

    Attributes:
        settings: indices of the settings that take turns in it.
        requests: how many to send after the ramp, all settings together; None in a closed loop by duration.
        duration_s: how long to send after the ramp; None where `requests` decides.
        ramp_s: how long the load rises before; those requests are left out of the statistics.
    """

    role: Role
    settings: tuple[int, ...]
    requests: int | None
    duration_s: float | None
    ramp_s: float = 0.0


def plan_phases(
    point: LoadPoint,
    settings: int,
    amount: Amount,
    interleave: Interleave,
    rounds: int,
    warmup: int,
    ramp_s: float,
    rng: np.random.Generator,
) -> list[Phase]:
    """The phases of one load point in order; `warmup` is in requests per setting, 0 for no such phase."""
    every = tuple(range(settings))
    phases = [Phase(Role.WARMUP, every, warmup * settings, None)] if warmup else []
    if interleave is Interleave.REQUESTS:
        whole = _measured(point, every, _scaled(amount, settings, 1), ramp_s)
        return [*phases, whole]
    if amount.requests is not None:
        rounds = min(rounds, amount.requests)
    for turn in range(rounds):
        part = _part(amount, turn, rounds)
        phases.extend(
            _measured(point, (int(setting),), part, ramp_s) for setting in rng.permutation(settings)
        )
    return phases


def capacity_phases(amount: Amount, warmup: int) -> list[Phase]:
    """A closed loop of the first setting alone."""
    measured = Phase(Role.MEASURED, (0,), amount.requests, amount.duration_s)
    return [*([Phase(Role.WARMUP, (0,), warmup, None)] if warmup else []), measured]


def total_requests(phases: list[Phase], point: LoadPoint) -> int | None:
    """How many requests the phases send, None if only time decides."""
    if point.rate is None and any(phase.requests is None or phase.ramp_s for phase in phases):
        return None
    return sum((phase.requests or 0) + _ramp_requests(phase, point) for phase in phases)


def requests_needed(
    phases: list[Phase], point: LoadPoint, settings: int, ahead: int
) -> tuple[list[int], bool]:
    """How many bodies of each setting to prepare, and whether that is all that will be sent.

    Where a phase's number of requests is not known beforehand, `ahead` stands for it once.
    """
    counts = [0] * settings
    for phase in phases:
        for part in (_ramp_requests(phase, point), phase.requests or 0):
            for setting in phase.settings:
                counts[setting] += -(-part // len(phase.settings))
    if total_requests(phases, point) is None:
        return [count + ahead for count in counts], False
    return counts, True


def _ramp_requests(phase: Phase, point: LoadPoint) -> int:
    """The area under a linearly rising rate; how many a closed loop sends meanwhile is not known."""
    return 0 if point.rate is None else round(point.rate * phase.ramp_s / 2)


def _scaled(amount: Amount, numerator: int, denominator: int) -> Amount:
    if amount.duration_s is None:
        return Amount(amount.requests and amount.requests * numerator // denominator, None)
    return Amount(None, amount.duration_s * numerator / denominator)


def _part(amount: Amount, turn: int, rounds: int) -> Amount:
    """Round `turn` of `rounds`; the rounds add up to the whole amount."""
    if amount.requests is None:
        return _scaled(amount, 1, rounds)
    return Amount(amount.requests * (turn + 1) // rounds - amount.requests * turn // rounds, None)


def _measured(point: LoadPoint, settings: tuple[int, ...], amount: Amount, ramp_s: float) -> Phase:
    """In an open loop a duration becomes the number of requests that the rate sends in it."""
    if amount.duration_s is not None and point.rate is not None:
        return Phase(Role.MEASURED, settings, max(1, round(point.rate * amount.duration_s)), None, ramp_s)
    return Phase(Role.MEASURED, settings, amount.requests, amount.duration_s, ramp_s)
