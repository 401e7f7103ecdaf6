# SPDX-License-Identifier: Apache-2.0
"""When requests arrive in an open loop, as times fixed before the first one is sent.

The client never waits for the server before the next arrival, so a slow server cannot thin out its own load
(coordinated omission). Sampled gaps are rescaled so that `count` requests arrive in exactly `count / rate`
seconds: two seeds then differ in the order of the gaps and not in the load.
"""

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from vtprune_loadtest.errors import LoadTestError

Times = NDArray[np.float64]


class ArrivalProcess(StrEnum):
    """How the gaps between arrivals are distributed."""

    POISSON = "poisson"
    CONSTANT = "constant"


def arrival_times(count: int, rate: float, process: ArrivalProcess, rng: np.random.Generator) -> Times:
    """`count` ascending arrival times in seconds after the start; the last one is exactly `count / rate`.

    Raises:
        LoadTestError: the rate is not a positive finite number.
    """
    if not 0 < rate < float("inf"):
        raise LoadTestError(
            f"The request rate must be a positive number of requests per second, not {rate:g}."
        )
    return _unit_arrivals(count, process, rng) / rate


def ramp_times(rate: float, ramp_s: float, process: ArrivalProcess, rng: np.random.Generator) -> Times:
    """Arrival times in (0, ramp_s] while the rate rises linearly from 0 to `rate`.

    The expected number of arrivals by time t is m(t) = rate t^2 / (2 ramp_s); a unit-rate process mapped
    through the inverse of m has that rate (Cinlar 1975, "Introduction to Stochastic Processes", section 4.7).
    """
    count = round(rate * ramp_s / 2)
    if count == 0:
        return np.empty(0)
    return ramp_s * np.sqrt(_unit_arrivals(count, process, rng) / count)


def _unit_arrivals(count: int, process: ArrivalProcess, rng: np.random.Generator) -> Times:
    """`count` arrivals at one a second on average: the last one is exactly `count`."""
    if process is ArrivalProcess.CONSTANT or count == 0:
        return np.arange(1, count + 1, dtype=np.float64)
    times = np.cumsum(rng.exponential(size=count))
    times *= count / times[-1]
    times[-1] = count
    return times
