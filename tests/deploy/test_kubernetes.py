# SPDX-License-Identifier: Apache-2.0
"""The manifests are valid to the last field, and say what the server needs."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY

import vtprune_server.metrics  # noqa: F401  (registers them)
from tests.deploy.manifests import (
    DEPLOY,
    OVERLAYS,
    RELEASES,
    Object,
    of_kind,
    only,
    overlay,
    production_stack,
    validate,
)
from vtprune_server.limits import SHUTDOWN_SECONDS


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Object, ...]:
    return production_stack(tmp_path_factory.mktemp("production-stack"))


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_are_valid(name: str, release: str) -> None:
    for found in overlay(name):
        validate(found, release)


@pytest.mark.parametrize("release", RELEASES)
def test_the_production_stack_chart_with_our_values_is_valid(chart: tuple[Object, ...], release: str) -> None:
    for found in chart:
        validate(found, release)


def test_any_misspelt_field_is_refused() -> None:
    """Each key of each object in turn, down to the leaves; names that are the operator's own apart."""
    seen = set()
    for found in (found for name in OVERLAYS for found in overlay(name)):
        for path in paths(found):
            field = (found["kind"], *(step for step in path if isinstance(step, str)))
            if field in seen:
                continue
            seen.add(field)
            changed: Any = copy.deepcopy(found)
            *above, last = path
            place = changed
            for step in above:
                place = place[step]
            place[f"{last}x"] = place.pop(last)
            with pytest.raises(Exception, match=r"unexpected|required|valid") as refused:
                validate(changed)
            assert "ValidationError" in type(refused.value).__name__, field
    assert len(seen) > 150


#: Maps whose keys the operator chooses.
_FREE = {"labels", "matchLabels", "requests", "limits", "annotations", "data", "selector"}


def paths(found: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the keys of nested maps are."""
    if isinstance(found, list):
        return [path for i, item in enumerate(found) for path in paths(item, (*above, i))]
    if not isinstance(found, dict) or (above and above[-1] in _FREE):
        return []
    if above[-1:] == ("metadata",) and "triggers" in above:
        return []
    if above == ("metadata",):
        return []  # Kubernetes' own schema leaves it open in places
    here = [(*above, key) for key in found if above or key not in ("apiVersion", "kind")]
    return here + [path for key, value in found.items() for path in paths(value, (*above, key))]


def pods(objects: tuple[Object, ...]) -> list[Any]:
    return [found["spec"]["template"]["spec"] for found in of_kind(objects, "Deployment")]


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_pod_may_do_nothing_it_need_not(name: str) -> None:
    (pod,) = pods(overlay(name))
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts) == {"/cache", "/tmp", "/dev/shm"}  # what a read-only root must have beside it
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_probes_fit_an_engines_start_and_stop(name: str) -> None:
    (pod,) = pods(overlay(name))
    (container,) = pod["containers"]
    start = container["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 15 * 60
    assert {
        container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness", "liveness")
    } == {"/health"}
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= pause + SHUTDOWN_SECONDS + 10


@pytest.mark.parametrize("name", OVERLAYS)
def test_names_lead_somewhere(name: str) -> None:
    objects = overlay(name)
    (pod,) = pods(objects)
    (container,) = pod["containers"]
    labels = only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    service, disruption = only(objects, "Service"), only(objects, "PodDisruptionBudget")
    assert service["spec"]["selector"].items() <= labels.items()
    assert disruption["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert only(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    claims = {found["metadata"]["name"] for found in of_kind(objects, "PersistentVolumeClaim")}
    used = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    assert used == claims
    namespaces = {found["metadata"].get("namespace") for found in objects if found["kind"] != "Namespace"}
    assert namespaces == {only(objects, "Namespace")["metadata"]["name"]}
    for monitor in of_kind(objects, "ServiceMonitor"):
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "vtprune"
        assert {e["port"] for e in monitor["spec"]["endpoints"]} <= {
            p["name"] for p in service["spec"]["ports"]
        }


def test_the_key_is_a_secret_everywhere(chart: tuple[Object, ...]) -> None:
    for objects in (*map(overlay, OVERLAYS), chart):
        engines = [c for pod in pods(objects) for c in pod["containers"] if c["name"] in ("vtprune", "vllm")]
        assert engines
        for container in engines:
            (key,) = [entry for entry in container["env"] if entry["name"] == "VLLM_API_KEY"]
            assert key["valueFrom"]["secretKeyRef"] == {"name": "vtprune-api-key", "key": "api_key"}


def test_scaling_looks_at_both_queues(chart: tuple[Object, ...]) -> None:
    for objects in (overlay("replicas"), chart):
        scaled = only(objects, "ScaledObject")["spec"]
        deployments = {found["metadata"]["name"] for found in of_kind(objects, "Deployment")}
        assert scaled["scaleTargetRef"]["name"] in deployments
        queries = " ".join(trigger["metadata"]["query"] for trigger in scaled["triggers"])
        assert "vllm:num_requests_waiting" in queries
        for metric in re.findall(r"vtprune_\w+", queries):
            assert metric in REGISTRY._names_to_collectors
        assert len(scaled["triggers"]) == 2
    assert "replicas" not in only(overlay("replicas"), "Deployment")["spec"]


def test_the_operator_s_rules_are_the_rules() -> None:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())["groups"]
    assert only(overlay("gpu"), "PrometheusRule")["spec"]["groups"] == groups


def test_outside_only_the_api_is_reachable() -> None:
    (rule,) = only(overlay("replicas"), "Ingress")["spec"]["rules"]
    paths = rule["http"]["paths"]
    assert {path["pathType"] for path in paths} == {"Exact"}
    # what the other gateways let through, whose health an ingress asks the pods
    allowed = {*(DEPLOY / "gateways" / "routes.lst").read_text().split()}
    assert {path["path"] for path in paths} == allowed - {"/health"}


def test_no_pod_reaches_a_private_address_or_the_cloud_s_metadata() -> None:
    rules = only(overlay("gpu"), "NetworkPolicy")["spec"]["egress"]
    blocks = [peer["ipBlock"] for rule in rules for peer in rule["to"] if "ipBlock" in peer]
    assert blocks
    for block in blocks:
        assert {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "100.64.0.0/10"} <= {
            *block["except"]
        }


def test_the_chart_s_engines_get_what_vtprune_serve_would_set(chart: tuple[Object, ...]) -> None:
    """The chart runs `vllm serve`; the page on operating says what that lacks."""
    (container,) = [c for pod in pods(chart) for c in pod["containers"] if c["name"] == "vllm"]
    page = (DEPLOY.parent / "docs" / "operating.md").read_text()
    plain = page[page.index("## Plain `vllm serve`") :]
    exported = re.search(r"export (.*?)\nvllm serve", plain, re.S)
    assert exported
    wanted = dict(pair.split("=") for pair in exported[1].replace("\\", "").split())
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert wanted.items() <= environment.items()
    stop = next(a for a in container["command"] if a.startswith("--shutdown-timeout="))
    assert int(stop.split("=")[1]) < 30  # the grace period, which the chart leaves at Kubernetes' own
    assert '--limit-mm-per-prompt={"image":16}' in container["command"]


def test_kustomizations_hold_every_file() -> None:
    """A manifest that no kustomization names would be shipped and never applied."""
    for folder in {path.parent for path in (DEPLOY / "kubernetes").rglob("*.yaml")}:
        if not (folder / "kustomization.yaml").exists():
            continue
        said = (folder / "kustomization.yaml").read_text()
        for file in folder.glob("*.yaml"):
            assert file.name == "kustomization.yaml" or Path(file).name in said, file
