# SPDX-License-Identifier: Apache-2.0
"""Arrival times, the order of settings, the plan of phases, and the requests' contents."""

import asyncio
import hashlib
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune_loadtest.arrivals import ArrivalProcess, arrival_times, ramp_times
from vtprune_loadtest.errors import LoadTestError
from vtprune_loadtest.images import DrawnPictures
from vtprune_loadtest.plan import Amount, Interleave, LoadPoint, plan_phases, requests_needed, total_requests
from vtprune_loadtest.record import Role
from vtprune_loadtest.sweep import balanced_order, parse_settings
from vtprune_loadtest.workload import IntRange, PreparedRequest, Workload, WorkloadSpec, picture_streams

processes = st.sampled_from(list(ArrivalProcess))
seeds = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(st.integers(1, 500), st.floats(0.01, 1e4), processes, seeds)
def test_arrivals_have_exactly_the_rate(count: int, rate: float, process: ArrivalProcess, seed: int) -> None:
    times = arrival_times(count, rate, process, np.random.default_rng(seed))
    assert len(times) == count
    assert times[0] >= 0 and np.all(np.diff(times) >= 0)
    assert times[-1] == count / rate
    assert np.array_equal(times, arrival_times(count, rate, process, np.random.default_rng(seed)))


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(arrival_times(20_000, 5.0, ArrivalProcess.POISSON, np.random.default_rng(0)), prepend=0.0)
    assert gaps.mean() == pytest.approx(0.2, rel=1e-12)
    assert gaps.std() == pytest.approx(0.2, rel=0.03), "an exponential's deviation equals its mean"
    # Kolmogorov-Smirnov distance to the exponential distribution; 1.63 / sqrt(n) is its 1 % critical value.
    gaps.sort()
    expected = 1 - np.exp(-gaps / 0.2)
    assert np.abs(expected - np.arange(1, 20_001) / 20_000).max() < 1.63 / np.sqrt(20_000)


def test_constant_gaps_are_constant() -> None:
    assert np.allclose(
        np.diff(arrival_times(10, 4.0, ArrivalProcess.CONSTANT, np.random.default_rng(0))), 0.25
    )


@settings(deadline=None)
@given(st.floats(0.5, 1000), st.floats(0.1, 60), processes, seeds)
def test_ramp_rises_linearly(rate: float, ramp_s: float, process: ArrivalProcess, seed: int) -> None:
    times = ramp_times(rate, ramp_s, process, np.random.default_rng(seed))
    assert len(times) == round(rate * ramp_s / 2)
    assert np.all(np.diff(times) >= 0) and np.all((times > 0) & (times <= ramp_s * (1 + 1e-12)))


def test_ramp_has_a_quarter_of_its_requests_in_the_first_half() -> None:
    times = ramp_times(1000, 100, ArrivalProcess.POISSON, np.random.default_rng(0))
    assert (times < 50).mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_rates_are_refused(rate: float) -> None:
    with pytest.raises(LoadTestError, match="positive"):
        arrival_times(1, rate, ArrivalProcess.POISSON, np.random.default_rng(0))


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 200), seeds)
def test_order_is_balanced_at_every_length(settings: int, length: int, seed: int) -> None:
    order = list(islice(balanced_order(settings, np.random.default_rng(seed)), length))
    counts = Counter({setting: 0 for setting in range(settings)})
    counts.update(order)
    assert set(order) <= set(range(settings))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_every_setting_comes_first_equally_often() -> None:
    order = list(islice(balanced_order(4, np.random.default_rng(1)), 4 * 4000))
    assert all(900 < count < 1100 for count in Counter(order[::4]).values())


def test_grid_of_settings_is_a_product() -> None:
    grid = parse_settings("off,light", ["X-VTPrune-KV-Keep=,0.5", "X-Other=a"])
    assert [setting.label for setting in grid] == [
        "off kv-keep=unset x-other=a",
        "off kv-keep=0.5 x-other=a",
        "light kv-keep=unset x-other=a",
        "light kv-keep=0.5 x-other=a",
    ]
    assert grid[0].headers == (("X-VTPrune-Preset", "off"), ("X-Other", "a"))
    assert grid[3].headers == (("X-VTPrune-Preset", "light"), ("X-VTPrune-KV-Keep", "0.5"), ("X-Other", "a"))
    assert [(setting.label, setting.headers) for setting in parse_settings(None, [])] == [("default", ())]


METHODS = "X-VTPrune-Method=inflection,divprune"
SCOPES = "X-VTPrune-KV-Scope=all,vision"
BANDS = ["kv-keep=1", "kv-keep=0.5,0.25 kv-scope=all", "kv-keep=0.5,0.25 kv-scope=vision"]


@pytest.mark.parametrize(
    ("presets", "headers", "labels"),
    [
        ("off,light", [METHODS], ["off", "light method=inflection", "light method=divprune"]),
        (None, ["X-VTPrune-Keep-Ratio=1", METHODS], ["keep-ratio=1"]),
        (
            None,
            ["X-VTPrune-Aggressiveness=0.0", METHODS, "X-A=1,2"],
            ["aggressiveness=0.0 x-a=1", "aggressiveness=0.0 x-a=2"],
        ),
        (
            "off",
            ["X-VTPrune-Keep-Ratio=0.5", METHODS],
            ["off keep-ratio=0.5 method=inflection", "off keep-ratio=0.5 method=divprune"],
        ),
        ("off", [SCOPES], ["off"]),
        (
            "off",
            ["X-VTPrune-KV-Keep=1,0.5", SCOPES],
            ["off kv-keep=1", "off kv-keep=0.5 kv-scope=all", "off kv-keep=0.5 kv-scope=vision"],
        ),
        (
            "light",
            ["X-VTPrune-KV-Keep=,1", SCOPES],
            ["light kv-keep=unset kv-scope=all", "light kv-keep=unset kv-scope=vision", "light kv-keep=1"],
        ),
        (None, ["X-VTPrune-KV-Keep=1;0.5,0.25", SCOPES.replace(",", ";")], BANDS),
        # the operator's default decides, which is not known here
        (None, [METHODS], ["method=inflection", "method=divprune"]),
        # the server is to say what is wrong
        ("bogus", [METHODS], ["bogus method=inflection", "bogus method=divprune"]),
    ],
)
def test_settings_that_cannot_differ_are_one(
    presets: str | None, headers: list[str], labels: list[str]
) -> None:
    assert [setting.label for setting in parse_settings(presets, headers)] == labels


def test_a_setting_knows_what_it_stands_for() -> None:
    off, light, _ = parse_settings("off,light", [METHODS])
    assert off.stands_for == ("off method=inflection", "off method=divprune")
    assert off.headers == (("X-VTPrune-Preset", "off"),)
    assert light.stands_for == ()


@pytest.mark.parametrize(
    ("presets", "headers", "message"),
    [
        ("off,off", [], "twice"),
        ("off,", [], "empty"),
        (None, ["no equals"], "NAME=value"),
        (None, ["Bad Name=1"], "NAME=value"),
        (None, ["X-A=1", "x-a=2"], "swept twice"),
        ("off", ["X-VTPrune-Preset=light"], "swept twice"),
        (None, ["X-A=1\r\nX-Evil: 1"], "ASCII"),
    ],
)
def test_malformed_sweeps_are_refused(presets: str | None, headers: list[str], message: str) -> None:
    with pytest.raises(LoadTestError, match=message):
        parse_settings(presets, headers)


closed = LoadPoint(None, 4)
load_points = st.sampled_from([closed, LoadPoint(3.0, None), LoadPoint(0.5, 2)])
interleaves = st.sampled_from(list(Interleave))


@settings(deadline=None)
@given(
    load_points,
    st.integers(1, 5),
    st.integers(1, 50),
    interleaves,
    st.integers(1, 9),
    st.integers(0, 3),
    seeds,
)
def test_a_plan_by_number_sends_exactly_that(
    point: LoadPoint,
    settings: int,
    requests: int,
    interleave: Interleave,
    rounds: int,
    warmup: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    phases = plan_phases(point, settings, Amount(requests, None), interleave, rounds, warmup, 0.0, rng)
    sent = {role: np.zeros(settings) for role in Role}
    for phase in phases:
        assert phase.requests is not None and phase.requests > 0 and phase.duration_s is None
        assert phase.requests % len(phase.settings) == 0
        sent[phase.role][list(phase.settings)] += phase.requests // len(phase.settings)
    assert np.all(sent[Role.MEASURED] == requests)
    assert np.all(sent[Role.WARMUP] == warmup)
    assert total_requests(phases, point) == settings * (requests + warmup)
    assert requests_needed(phases, point, settings, ahead=7) == ([requests + warmup] * settings, True)


def test_blocks_have_every_setting_once_a_round() -> None:
    rng = np.random.default_rng(0)
    phases = plan_phases(closed, 3, Amount(10, None), Interleave.BLOCKS, 4, 0, 0.0, rng)
    assert len(phases) == 12
    assert all(
        sorted(p.settings[0] for p in phases[start : start + 3]) == [0, 1, 2] for start in range(0, 12, 3)
    )
    assert len({tuple(p.settings[0] for p in phases[start : start + 3]) for start in range(0, 12, 3)}) > 1


def test_a_duration_becomes_the_number_that_the_rate_sends() -> None:
    rng = np.random.default_rng(0)
    duration = Amount(None, 60.0)
    (phase,) = plan_phases(LoadPoint(2.5, None), 4, duration, Interleave.REQUESTS, 1, 0, 0.0, rng)
    assert (phase.requests, phase.duration_s) == (600, None)
    (phase,) = plan_phases(closed, 4, duration, Interleave.REQUESTS, 1, 0, 0.0, rng)
    assert (phase.requests, phase.duration_s) == (None, 240.0)
    assert total_requests([phase], closed) is None
    blocks = plan_phases(closed, 2, duration, Interleave.BLOCKS, 3, 0, 0.0, rng)
    assert [phase.duration_s for phase in blocks] == [20.0] * 6


def make_workload(settings: int, **changes: Any) -> Workload:
    fields: dict[str, Any] = {
        "base": {"model": "m"},
        "prompt": "What?",
        "prompt_words": 0,
        "images_per_prompt": IntRange(1, 1),
        "output_len": IntRange(4, 9),
        "repeat_share": 0.0,
        "seed": 0,
    }
    return Workload(
        picture_streams(WorkloadSpec(**fields | changes), DrawnPictures(16, 12, "png", 0), [1.0] * settings)
    )


def take(workload: Workload, setting: int, count: int) -> list[PreparedRequest]:
    async def all_of_them() -> list[PreparedRequest]:
        return [await workload.take(setting) for _ in range(count)]

    return asyncio.run(all_of_them())


def test_contents_depend_on_the_seed_and_not_on_timing() -> None:
    one, other = make_workload(2), make_workload(2)
    asyncio.run(other.prepare([3, 9]))
    bodies = [request.body for request in take(one, 0, 6)]
    assert [request.body for request in take(other, 0, 6)] == bodies
    assert [request.body for request in take(make_workload(2, seed=1), 0, 6)] != bodies
    assert len(set(bodies)) == 6


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_repeats_have_exactly_their_share(share: float) -> None:
    requests = take(make_workload(1, repeat_share=share, output_len=IntRange(4, 4)), 0, 100)
    distinct = len({hashlib.sha256(request.body).digest() for request in requests})
    repeated = sum(request.repeated_images for request in requests)
    assert distinct == 100 - repeated
    assert repeated == pytest.approx(100 * share, abs=1)


def test_drawn_pictures_are_distinct_and_of_their_size() -> None:
    source = DrawnPictures(20, 10, "png", seed=3)
    assert len({source.picture(number).data for number in range(300)}) == 300
    assert source.picture(7) == DrawnPictures(20, 10, "png", seed=3).picture(7)
    assert source.picture(7) != DrawnPictures(20, 10, "png", seed=4).picture(7)


@pytest.mark.parametrize("text", ["", "x", "4-", "9-4", "0", "-1", "1.5"])
def test_bad_ranges_are_refused(text: str) -> None:
    with pytest.raises(LoadTestError, match="--output-len"):
        IntRange.parse("--output-len", text, minimum=1)
