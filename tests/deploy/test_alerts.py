# SPDX-License-Identifier: Apache-2.0
"""The alert rules, by promtool: each fires on its fault and on nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import REGISTRY

import vtprune_server.metrics  # noqa: F401  (registers them)
from tests.conftest import REPOSITORY
from tests.deploy.manifests import DEPLOY

RULES = DEPLOY / "prometheus" / "rules.yaml"
CASES = Path(__file__).parent / "rules_test.yaml"
ALERTS = [rule["alert"] for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]]


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=280)


def test_rules_and_configuration_are_valid() -> None:
    for done in (
        promtool("check", "rules", RULES),
        promtool("check", "config", RULES.with_name("prometheus.yaml")),
    ):
        assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_on_their_faults_and_on_nothing_else() -> None:
    done = promtool("test", "rules", CASES)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_no_alert_is_untested(alert: str, tmp_path: Path) -> None:
    """Without it, and with one that always fires, the cases fail."""
    found = yaml.safe_load(RULES.read_text())
    rules = found["groups"][0]["rules"]
    (rule,) = [rule for rule in rules if rule["alert"] == alert]
    cases = CASES.read_text().replace("../../deploy/prometheus/rules.yaml", "rules.yaml")
    (tmp_path / "cases.yaml").write_text(cases)
    always = {**rule, "expr": 'label_replace(vector(1), "job", "vtprune", "", "")'}
    for changed in ([r for r in rules if r is not rule], [always if r is rule else r for r in rules]):
        found["groups"][0]["rules"] = changed
        (tmp_path / "rules.yaml").write_text(yaml.safe_dump(found))
        assert promtool("test", "rules", tmp_path / "cases.yaml").returncode != 0


def test_alerts_ask_for_metrics_that_exist() -> None:
    names = set(re.findall(r"\bvtprune_[a-z_]+", RULES.read_text()))
    assert len(names) >= 6
    for name in names:
        assert (
            name in REGISTRY._names_to_collectors
            or name.removesuffix("_total") in REGISTRY._names_to_collectors
        )


def test_the_numbers_in_the_texts_are_the_settings() -> None:
    from vllm_vtprune.policy import PrunePolicy

    (rule,) = [
        r
        for r in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
        if r["alert"] == "VTPruneTowerQueue"
    ]
    batch = PrunePolicy().encoder_batch
    assert f"--vtprune-encoder-batch {batch}" in rule["annotations"]["description"]
    assert rule["expr"].strip().endswith(f"> {2 * batch}")
    assert (REPOSITORY / "docs" / "operating.md").read_text().count("--vtprune-encoder-batch")
