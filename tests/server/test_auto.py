# SPDX-License-Identifier: Apache-2.0
"""The preset `auto`: the controller alone, before a simulated queue, and how it reads vLLM's statistics."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from benchmarks import auto_queue
from benchmarks.auto_queue import SERVICE, late_share, simulate
from benchmarks.auto_queue import controller as goal_controller
from vllm_vtprune.contract import AUTO, LEVEL_HEADER, PRESETS
from vllm_vtprune.errors import PolicyError, SettingsError
from vllm_vtprune.offline import request_kwargs
from vllm_vtprune.policy import CONFIG_KEY, PrunePolicy
from vllm_vtprune.settings import Controls
from vtprune_server import engine_load, metrics
from vtprune_server.auto import AutoLevel, Load, Marks
from vtprune_server.engine_load import EngineLoad, auto_level, listen

LADDER = ("off", "light", "balanced", "aggressive")
IDLE, BUSY = Load(), Load(waiting=15)


def controller(calm_s: float = 10.0, **marks: float) -> AutoLevel:
    return AutoLevel(LADDER, Marks(**(marks or {"waiting": 10})), calm_s)


def observed(auto: AutoLevel, load: Load, start: float, seconds: float) -> list[str]:
    """The levels of some seconds of one load, a quarter of a second apart."""
    levels = []
    for tick in range(int(seconds * 4)):
        auto.observe(load, start + tick / 4)
        levels.append(auto.level)
    return levels


def test_it_rises_a_level_a_second_and_falls_one_per_calm_stretch() -> None:
    auto = controller()
    up = observed(auto, BUSY, 0, 5)
    assert up == [*["light"] * 4, *["balanced"] * 4, *["aggressive"] * 12]
    steep = controller()
    assert observed(steep, Load(waiting=20), 0, 1)[:3] == list(LADDER[1:])
    down = observed(auto, IDLE, 5, 31)
    assert [down.count(level) for level in reversed(LADDER)] == [40, 40, 40, 4]
    assert down == sorted(down, key=LADDER.index, reverse=True)


def test_between_calm_and_the_mark_it_holds() -> None:
    auto = controller()
    observed(auto, BUSY, 0, 1)
    assert set(observed(auto, Load(waiting=7), 1, 500)) == {"light"}
    # a moment of load in between starts the calm anew
    assert set(observed(auto, IDLE, 501, 9)) == {"light"}
    assert set(observed(auto, Load(waiting=7), 510, 1)) == {"light"}
    assert set(observed(auto, IDLE, 511, 9)) == {"light"}


@pytest.mark.parametrize(
    "load", [Load(waiting=8), Load(kv_use=0.9), Load(images=16), Load(ttft_s=0.5)], ids=repr
)
def test_each_signal_alone_raises_it_and_a_mark_of_0_passes_over_it(load: Load) -> None:
    policy = PrunePolicy(auto_ttft_ms=500)
    auto = auto_level(policy)
    assert auto.observe(load, 0.0) == 1
    deaf = auto_level(PrunePolicy(auto_waiting=0, auto_kv_use=0, auto_images=0))
    assert deaf.observe(load, 0.0) == 0 and deaf.pressure == 0


def test_a_load_between_two_levels_does_not_swing_for_ever() -> None:
    """Light is too little and balanced more than enough: each step down is taken back."""
    auto = controller(calm_s=2.0)
    changes: list[float] = []
    for tick in range(4 * 200):
        load = IDLE if LADDER.index(auto.level) >= 2 else BUSY
        if auto.observe(load, tick / 4) < 0:
            changes.append(tick / 4)
    gaps = [after - before for before, after in pairwise(changes)]
    assert gaps == sorted(gaps) and gaps[-1] >= 4 * 2.0
    assert len(changes) < 200 / (4 * 2.0) + 4


# --- before a queue ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("times_capacity", [1.5, 2.0, 3.0])
def test_under_overload_it_holds_the_goal_where_off_cannot(times_capacity: float) -> None:
    rate = times_capacity / SERVICE["off"]
    assert late_share(simulate(lambda _: rate, "off", 120)) > 0.9
    assert late_share(simulate(lambda _: rate, goal_controller(), 120)) < 0.05
    if times_capacity > SERVICE["off"] / SERVICE["light"]:
        assert late_share(simulate(lambda _: rate, "light", 120)) > 0.9


def test_within_capacity_it_prunes_nothing_and_after_overload_it_gives_full_pictures_back() -> None:
    auto = goal_controller()
    assert {request.preset for request in simulate(lambda _: 4.0, auto, 60)} == {"off"}
    done = simulate(lambda now: 12.0 if now < 30 else 2.0, auto, 150)
    assert "balanced" in {request.preset for request in done if request.came < 30}
    assert {request.preset for request in done if request.came > 120} == {"off"}


def test_the_simulation_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert auto_queue.main(["--plot", str(tmp_path / "auto.png")]) == 0
    shown = capsys.readouterr().out
    assert "3x" in shown and (tmp_path / "auto.png").stat().st_size > 10_000


# --- vLLM's statistics -------------------------------------------------------------------------------------


def told(
    load: EngineLoad, waiting: int, kv: float = 0.0, ttfts: tuple[float, ...] = (), idx: int = 0
) -> None:
    """One step's statistics, through vLLM's own manager."""
    manager: Any = SimpleNamespace(stat_loggers=[load])
    iteration = IterationStats()
    iteration.time_to_first_tokens_iter.extend(ttfts)
    stats = SchedulerStats(num_waiting_reqs=waiting, kv_cache_usage=kv)
    StatLoggerManager.record(manager, stats, iteration, None, idx)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(engine_load.time, "monotonic", lambda: clock.now)
    return clock


def test_the_queue_and_the_cache_are_the_newest_and_go_stale(clock: SimpleNamespace) -> None:
    load = EngineLoad()
    assert load.load(clock.now, 3) == Load(images=3)
    told(load, 4, 0.2)
    told(load, 6, 0.7, idx=1)
    assert load.load(clock.now, 0) == Load(waiting=5, kv_use=0.7)
    clock.now += 11
    assert load.load(clock.now, 0) == Load()


def test_the_wait_is_foretold_by_the_pace_while_others_waited(clock: SimpleNamespace) -> None:
    load = EngineLoad()
    told(load, 0, ttfts=(0.1,))
    # one request in five seconds is little demand, and no slow engine
    assert load.load(clock.now, 3).ttft_s == pytest.approx(0.1)
    told(load, 10)
    for left in (9, 8, 7, 6):
        clock.now += 0.5
        told(load, left, ttfts=(0.3,))
    assert load.load(clock.now, 0).ttft_s == pytest.approx(6 * 0.5)
    assert load.load(clock.now, 4).ttft_s == pytest.approx(10 * 0.5)
    shared = EngineLoad(processes=2)
    told(shared, 10)
    clock.now += 0.5
    told(shared, 9, ttfts=(0.3,))
    assert shared.load(clock.now, 0).ttft_s == pytest.approx(9 * 0.25)
    clock.now += 6
    told(load, 0)
    assert load.load(clock.now, 0).ttft_s is None


def test_vllm_without_statistics_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="vtprune_server.engine_load"):
        listen(SimpleNamespace(logger_manager=None), 1)
    assert "--disable-log-stats" in caplog.text
    manager = SimpleNamespace(stat_loggers=[])
    assert manager.stat_loggers == [] and listen(SimpleNamespace(logger_manager=manager), 1)
    assert len(manager.stat_loggers) == 1


def test_waiting_images_are_counted() -> None:
    before = metrics.waiting_images()
    metrics.count_waiting_images(3)
    assert metrics.waiting_images() == before + 3
    metrics.count_waiting_images(-3)


# --- the operator's bounds ---------------------------------------------------------------------------------


def asked(policy: PrunePolicy, level: str | None = None, **fields: Any) -> Any:
    return policy.resolve(Controls.from_mapping({"preset": AUTO, **fields}), level)


@pytest.mark.parametrize("level", LADDER)
def test_auto_is_the_preset_it_stands_for(level: str) -> None:
    policy = PrunePolicy(prune_layer=2, auto_ceiling="aggressive")
    auto, named = asked(policy, level), policy.resolve(Controls.from_mapping({"preset": level}))
    assert (auto.preset, auto.level) == (AUTO, level)
    assert auto.prunes_as(named) and auto.vision.canonical() == named.vision.canonical()
    assert auto.as_dict()["level"] == level and "level" not in named.as_dict()
    assert asked(policy, level, keep_ratio=0.3).preset == "custom"


def test_the_ladder_lies_between_floor_and_ceiling_and_within_the_caps() -> None:
    assert PrunePolicy().auto_levels == ("off", "light", "balanced")
    assert PrunePolicy(auto_floor="light", auto_ceiling="aggressive").auto_levels == LADDER[1:]
    assert PrunePolicy(auto_ceiling="aggressive", max_aggressiveness=0.6).auto_levels == LADDER[:3]
    assert PrunePolicy(prune_layer=2, min_kv_keep=0.7).auto_levels == ("off", "light")
    assert asked(PrunePolicy(auto_floor="light")).level == "light", "where nobody follows the load"
    by_default = PrunePolicy(default_preset=AUTO)
    assert by_default.resolve(Controls(), "balanced").level == "balanced"
    assert by_default.default_settings.level == "off"
    locked = PrunePolicy(default_preset=AUTO, client_controls=False)
    assert locked.resolve(Controls(), "light").level == "light"


@pytest.mark.parametrize(
    "fields,word",
    [
        ({"auto_floor": "aggressive"}, "prunes more than auto_ceiling"),
        ({"auto_floor": "balanced", "max_aggressiveness": 0.3}, "beyond the caps"),
        ({"auto_ceiling": "auto"}, "must be one of off"),
        ({"auto_calm_s": 0.0}, "auto_calm_s"),
    ],
)
def test_bounds_that_cannot_be_are_refused(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(PolicyError, match=word):
        PrunePolicy.from_config({CONFIG_KEY: fields})


def test_offline_there_is_no_load_to_follow() -> None:
    with pytest.raises(SettingsError, match="name another preset"):
        request_kwargs(preset=AUTO)


def test_the_presets_are_in_the_order_of_their_pruning() -> None:
    assert tuple(PRESETS) == LADDER and LEVEL_HEADER.lower().startswith("x-vtprune-")
