# SPDX-License-Identifier: Apache-2.0
"""The Grafana dashboard asks for metrics that exist, with the labels they have."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from prometheus_client import REGISTRY

import vllm_vtprune.kv_drop.metrics
import vtprune_server.metrics
from tests.conftest import REPOSITORY

DASHBOARD = json.loads((REPOSITORY / "deploy" / "grafana-dashboard.json").read_text())
MODULES = (vtprune_server.metrics, vllm_vtprune.kv_drop.metrics)
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def labels_of(metric: str) -> set[str]:
    """The labels of a sample name such as `vtprune_kept_ratio_bucket`, `le` included."""
    base = re.sub(r"_(total|bucket|sum|count)$", "", metric)
    collector: Any = REGISTRY._names_to_collectors.get(metric) or REGISTRY._names_to_collectors[base]
    return {*collector._labelnames, *(["le"] if metric.endswith("_bucket") else []), "job"}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_its_metrics_exist(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    for target in panel["targets"]:
        for metric in re.findall(r"\bvtprune_\w+", target["expr"]):
            asked = re.findall(rf"by \(([^)]*)\) \(rate\({metric}", target["expr"])
            assert {name for names in asked for name in names.split(", ")} <= labels_of(metric)
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels_of(metric)


def test_every_metric_is_shown() -> None:
    shown = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    names = {
        collector._name  # type: ignore[attr-defined]
        for module in MODULES
        for collector in vars(module).values()
        if hasattr(collector, "_labelnames")
    }
    assert {name for name in names if name not in shown} <= {"vtprune_kv_requests_pruned"}


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
