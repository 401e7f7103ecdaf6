# SPDX-License-Identifier: Apache-2.0
"""Prune schedules as operators write them, by name, and from a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_vtprune.kv_drop.schedule import (
    NAMED,
    PruneLayer,
    ScheduleError,
    band_groups,
    band_sizes,
    parse,
    resolve,
)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[PruneLayer, ...]:
    """One to four prune layers with shares of one unit that do not rise."""
    layers = sorted(draw(st.sets(st.integers(1, 80), min_size=1, max_size=4)))
    shares = sorted(draw(st.sets(st.integers(1, 1000), min_size=len(layers), max_size=len(layers))))
    of = draw(st.sampled_from(["prompt", "vision"]))
    found = [PruneLayer(k, s / 1000, of) for k, s in zip(layers, reversed(shares), strict=True)]
    if draw(st.booleans()):
        found[-1] = PruneLayer(found[-1].layer, 0.0, "vision")
    # nothing is said of a share of one
    return tuple(PruneLayer(p.layer) if p.share == 1 else p for p in found)


@given(schedules())
def test_a_schedule_reads_as_it_is_written(schedule: tuple[PruneLayer, ...]) -> None:
    assert parse(",".join(map(str, schedule))) == schedule


def test_what_an_operator_may_write() -> None:
    assert parse("8:0.5, 16:vision=0.25 ,24:0") == (
        PruneLayer(8, 0.5, "prompt"),
        PruneLayer(16, 0.25, "vision"),
        PruneLayer(24, 0.0, "vision"),
    )
    assert parse("8") == (PruneLayer(8, 1.0, "prompt"),)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "'' is no prune layer: write 8:0.5"),
        ("8:half", "'8:half' is no prune layer"),
        ("8:text=0.5", "'8:text=0.5' is no prune layer"),
        ("8;0.5", "is no prune layer"),
        ("0:0.5", "must be at least 1, not 0"),
        ("8:1.5", r"must be in \[0, 1\], not 1.5"),
        ("8:nan", r"must be in \[0, 1\], not nan"),
        ("8:0.5,8:0.25", "must rise, and 8 follows 8"),
        ("8:0.5,16:0.6", "must not rise, and 0.6 follows 0.5"),
        ("8:0,16:0", "no visual token is left to drop at layer 16"),
        ("1,2,3,4,5", "5 prune layers are given, and may be 1 to 4"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ScheduleError, match=sentence):
        parse(text)


def test_a_prune_layer_must_be_in_the_decoder() -> None:
    with pytest.raises(ScheduleError, match="must be 1 to 31 for 32 decoder layers, not 32"):
        resolve("8,32", 32)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("layers", [8, 12, 24, 28, 32, 36, 40, 48, 64, 80])
def test_a_named_schedule_fits_the_decoder_and_wastes_no_cache(name: str, layers: int) -> None:
    schedule = resolve(name, layers)
    assert parse(str(schedule)) == schedule.prune_layers
    _, empty = band_groups(band_sizes(layers, [p.layer for p in schedule.prune_layers]))
    assert empty == 0


def seen(schedule: tuple[PruneLayer, ...], layers: int) -> list[float]:
    """Share of the visual tokens that each layer sees."""
    shares = [1.0, *(p.share for p in schedule)]
    return [shares[sum(i >= p.layer for p in schedule)] for i in range(layers)]


@pytest.mark.parametrize(("layers", "start"), [(28, 14), (32, 13)])
def test_aim_is_its_published_curve_within_the_deviation_it_states(layers: int, start: int) -> None:
    schedule = resolve("aim", layers)
    # an eighth less after each layer from `start` on, none after the eighth
    curve = [max(0.0, 1 - 0.125 * max(0, i - start)) for i in range(layers)]
    difference = [a - b for a, b in zip(seen(schedule.prune_layers, layers), curve, strict=True)]
    assert max(map(abs, difference)) == pytest.approx(schedule.deviation)
    assert 0 < schedule.deviation < 0.2
    # as many tokens pass the layers above the first prune layer as in the curve
    assert sum(difference[schedule.prune_layers[0].layer :]) == pytest.approx(0, abs=0.02)
    assert schedule.relevance == ("pagerank",) * len(schedule.prune_layers)


def test_pyramid_halves_at_each_quarter_and_exit_leaves_in_the_middle() -> None:
    assert str(resolve("pyramid", 32)) == "8:vision=0.5,16:vision=0.25,24:vision=0.125"
    assert str(resolve("EXIT", 32)) == "16:0"


def test_a_schedule_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    content = {"prune_layers": "8:0.5,16:0", "relevance": ["key_norm", "inherited"], "layers": 32, "note": 1}
    path.write_text(json.dumps(content))
    schedule = resolve(str(path), 32)
    assert (str(schedule), schedule.relevance) == ("8:0.5,16:0", ("key_norm", "inherited"))
    with pytest.raises(ScheduleError, match="is for 32 decoder layers, and this model has 28"):
        resolve(str(path), 28)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "cannot be read"),
        ("[]", 'must be an object with "prune_layers"'),
        ('{"prune_layers": 8}', 'must be an object with "prune_layers"'),
        ('{"prune_layers": "8", "relevance": 1}', '"relevance" must be a name or a list of names'),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(content)
    with pytest.raises(ScheduleError, match=sentence):
        resolve(str(path), 32)
    with pytest.raises(ScheduleError, match="cannot be read"):
        resolve(str(tmp_path / "none.json"), 32)
