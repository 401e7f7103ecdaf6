# SPDX-License-Identifier: Apache-2.0
"""The preset `auto` before a simulated queue: what its controller does to the time to first token.

    python -m benchmarks.auto_queue --plot docs/benchmarks/auto.png

One server, first come first served, evenly spaced arrivals, and for each preset a time per request that is
assumed and not measured. It shows the controller, not a speed-up: that is `vtprune loadtest --sweep
off,balanced,auto --rate 0.5x,1x,2x --interleave blocks` on an idle machine.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_vtprune.contract import PRESETS
from vtprune_loadtest.columns import columns
from vtprune_loadtest.command import SentenceParser, command
from vtprune_server.auto import AutoLevel, Load, Marks
from vtprune_server.engine_load import TICK_SECONDS

#: Seconds that the server takes for a request under each preset: assumed.
SERVICE: Mapping[str, float] = {"off": 0.2, "light": 0.12, "balanced": 0.08, "aggressive": 0.06}
#: Operator's goal for the time to first token, in seconds; `auto` acts at three fifths of it.
GOAL_S = 1.0
_STEP_S = 0.01


@dataclass(frozen=True, slots=True)
class Served:
    """One request: when it came, its time to first token in seconds, the preset it was given on arrival."""

    came: float
    ttft_s: float
    preset: str


def controller(levels: Sequence[str] = tuple(SERVICE), calm_s: float = 10.0) -> AutoLevel:
    """`auto` with a goal, over these levels."""
    return AutoLevel(levels, Marks(waiting=20, ttft_s=0.6 * GOAL_S), calm_s)


def simulate(rate: Callable[[float], float], level: AutoLevel | str, seconds: float) -> list[Served]:
    """Serve a queue.

    Args:
        rate: arrivals a second at a time.
        level: a fixed preset, or `auto`.
        seconds: how long.
    """
    due, free_at = 0.0, 0.0
    queue: deque[tuple[float, str]] = deque()
    done: list[Served] = []
    every = round(TICK_SECONDS / _STEP_S)
    for number in range(int(seconds / _STEP_S)):
        now = number * _STEP_S
        current = level if isinstance(level, str) else level.level
        while rate(now) and due <= now:
            queue.append((now, current))
            due += 1 / rate(now)
        due = max(due, now)
        while queue and free_at <= now:
            came, preset = queue.popleft()
            free_at = max(free_at, now) + SERVICE[preset]
            done.append(Served(came, free_at - came, preset))
        if not isinstance(level, str) and number % every == 0:
            expected = sum(SERVICE[preset] for _, preset in queue)
            level.observe(Load(waiting=len(queue), ttft_s=expected), now)
    return done


def _constant(rate: float) -> Callable[[float], float]:
    return lambda _: rate


def late_share(done: Sequence[Served], after: float = 10.0) -> float:
    """Share of the requests that missed the goal, once the first seconds were over."""
    kept = [request.ttft_s for request in done if request.came >= after]
    return sum(ttft > GOAL_S for ttft in kept) / len(kept) if kept else 0.0


def main(argv: Sequence[str] | None = None, prog: str = "python -m benchmarks.auto_queue") -> int:
    """Print a table, draw a day's rise and fall; gives the exit status."""
    return command(prog, lambda: _run(list(sys.argv[1:] if argv is None else argv), prog))


def _run(arguments: list[str], prog: str) -> None:
    parser = SentenceParser(prog=prog, description=__doc__)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw load, level and time to first token")
    options = parser.parse_args(arguments)
    rows = []
    for times in (0.5, 1.0, 1.5, 2.0, 3.0):
        arrivals = times / SERVICE["off"]
        cells = [f"{times:g}x"]
        levels: tuple[AutoLevel | str, ...] = ("off", "balanced", controller())
        for level in levels:
            done = simulate(_constant(arrivals), level, 120)
            cells.append(f"{100 * late_share(done):.0f} %")
        full = sum(request.preset == "off" for request in done) / len(done)
        rows.append([*cells, f"{100 * full:.0f} %"])
    print(
        f"Share of the requests later than {GOAL_S:g} s; the last column: served whole under auto. Simulated."
    )
    print("\n".join(columns(["rate / capacity", "off", "balanced", "auto", "auto, whole"], rows)))
    if options.plot is not None:
        print(f"wrote {_plot(options.plot)}")


def _plot(path: Path) -> Path:
    """The rate rises to twice the capacity and falls again."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def rate(now: float) -> float:
        return (2.0 if 30 <= now < 90 else 0.6) / SERVICE["off"]

    seconds = 180
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 5.2), sharex=True, layout="constrained")
    for name, colour in (("off", "#555555"), ("balanced", "#20639b"), ("auto", "#c1121f")):
        done = simulate(rate, controller() if name == "auto" else name, seconds)
        above.plot([r.came for r in done], [r.ttft_s for r in done], color=colour, label=name, linewidth=1.4)
        if name == "auto":
            order = list(PRESETS)
            below.step([r.came for r in done], [order.index(r.preset) for r in done], color=colour)
            below.set_yticks(range(len(order)), order)
    above.axhline(GOAL_S, color="black", linewidth=1, linestyle="--", label="goal")
    above.set_yscale("log")
    above.set_ylabel("time to first token (s)")
    above.axvspan(30, 90, color="black", alpha=0.06, linewidth=0)
    below.axvspan(30, 90, color="black", alpha=0.06, linewidth=0)
    below.set_ylabel("auto")
    below.set_xlabel("seconds; grey: twice the capacity, else 0.6 times")
    above.set_title("auto before a simulated queue (service times assumed)")
    above.legend(frameon=False, fontsize=8, ncols=4)
    for axis in (above, below):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    sys.exit(main())
