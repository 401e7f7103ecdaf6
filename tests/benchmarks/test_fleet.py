# SPDX-License-Identifier: Apache-2.0
"""The page about a large fleet is what its script prints, and its arithmetic is the roofline's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import fleet
from benchmarks.models import CLIP_L, LLAVA_7B, write_config
from tests.conftest import REPOSITORY
from vtprune_eval.flops import CostShape

PLANS = {name: fleet.replica(request) for name, request in fleet.SETTINGS.items()}


def test_the_page_is_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert fleet.main([]) == 0
    assert capsys.readouterr().out == (REPOSITORY / "docs" / "fleet.md").read_text()


def test_the_shape_is_the_checkpoint_s(tmp_path: Path) -> None:
    write_config(tmp_path, LLAVA_7B, CLIP_L, "bfloat16")
    assert CostShape.of(tmp_path) == fleet.LLAVA


def test_a_replica_is_the_roofline_over_the_share() -> None:
    """Twice the machine is twice the requests, whatever is kept."""
    twice = fleet.MachineLimits(2 * fleet.H100.peak_flops, 2 * fleet.H100.bandwidth)
    for name, request in fleet.SETTINGS.items():
        assert fleet.replica(request, machine=twice).requests_per_s == pytest.approx(
            2 * PLANS[name].requests_per_s
        )


def test_what_fits_the_memory_fits() -> None:
    for name, plan in PLANS.items():
        request = fleet.SETTINGS[name]
        whole = 2 * fleet.LLAVA.kv_width * fleet.LLAVA.element * fleet.LLAVA.layers
        assert plan.kv_bytes <= whole * (request.prompt + request.output)
        assert plan.at_once * plan.kv_bytes < fleet.H100_BYTES
    base, *pruned = PLANS.values()
    assert all(plan.kv_bytes < base.kv_bytes and plan.at_once >= base.at_once for plan in pruned)


def test_pruning_never_needs_more_replicas_and_more_load_never_fewer() -> None:
    loads = [10**i for i in range(9)]
    counts = {name: [fleet.replicas(load, plan) for load in loads] for name, plan in PLANS.items()}
    for needed in counts.values():
        assert needed == sorted(needed) and needed[0] == 2
    base, stage1, both = counts.values()
    assert all(a >= b >= c for a, b, c in zip(base, stage1, both, strict=True))


def test_a_load_fits_the_replicas_it_is_given_less_one() -> None:
    for plan in PLANS.values():
        for load in fleet.LOADS:
            count = fleet.replicas(load, plan) - 1
            most = count * fleet.UTILISATION * plan.requests_per_s * 3600
            assert load <= most * (1 + 1e-9)
            assert load > most * (count - 1) / count
            assert math.isfinite(most)


def test_a_picture_is_what_the_page_takes_it_for() -> None:
    size, seconds = fleet.measure_picture()
    assert size == pytest.approx(fleet.PICTURE_BYTES, rel=0.02)
    assert seconds > 0
