# SPDX-License-Identifier: Apache-2.0
"""deploy/kubernetes/ray, rendered and checked against the kinds' own schemas."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.conftest import REPOSITORY

SCHEMAS = Path(__file__).parent / "schemas"
KINDS = {"RayService": "rayservice_v1.json", "PodMonitor": "podmonitor_v1.json"}
MISSING = "" if shutil.which("kubectl") else "kubectl is not installed: it renders the manifests"

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def rendered() -> dict[str, dict[str, Any]]:
    """The objects by kind."""
    folder = REPOSITORY / "deploy" / "kubernetes" / "ray"
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True)
    return {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}


def strict(schema: Any) -> Any:
    """The schema with unknown fields refused, as a server that is asked to validate strictly does."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def faults(kind: str, thing: dict[str, Any]) -> list[str]:
    schema = strict(json.loads((SCHEMAS / KINDS[kind]).read_text()))
    schema["properties"]["metadata"] = {"type": "object"}
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(thing)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_objects_are_of_their_kinds(rendered: dict[str, Any], kind: str) -> None:
    assert faults(kind, rendered[kind]) == []


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "serveConfigV2"),
        ("spec", "rayClusterConfig", "authOptions"),
        ("spec", "rayClusterConfig", "workerGroupSpecs", 0, "minReplicas"),
        ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "containers", 0, "resources"),
    ],
)
def test_a_misspelt_field_is_found(rendered: dict[str, Any], path: tuple[Any, ...]) -> None:
    broken = copy.deepcopy(rendered["RayService"])
    place: Any = broken
    for step in path[:-1]:
        place = place[step]
    place[path[-1] + "x"] = place.pop(path[-1])
    assert any(path[-1] + "x" in fault for fault in faults("RayService", broken))


def test_serves_configuration_is_one_that_serve_reads(rendered: dict[str, Any]) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="Ray is not installed here: make test-deploy")
    config = yaml.safe_load(rendered["RayService"]["spec"]["serveConfigV2"])
    (application,) = schema.ServeDeploySchema.model_validate(config).applications
    (deployment,) = application.deployments
    from vtprune_server import ray_app

    assert application.import_path == f"{ray_app.__name__}:{ray_app.app.__name__}"
    assert deployment.name == ray_app.DEPLOYMENT


def test_rays_version_is_the_locked_one(rendered: dict[str, Any]) -> None:
    locked = (REPOSITORY / "requirements" / "ray.lock").read_text()
    assert f"\nray=={rendered['RayService']['spec']['rayClusterConfig']['rayVersion']}\n" in locked


def test_all_nodes_have_the_environment_of_the_other_ways(rendered: dict[str, Any]) -> None:
    lines = (REPOSITORY / "deploy" / "ray" / "node.env").read_text().splitlines()
    wanted = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    cluster = rendered["RayService"]["spec"]["rayClusterConfig"]
    assert cluster["authOptions"]["mode"] == wanted.pop("RAY_AUTH_MODE")
    del wanted["HF_HUB_OFFLINE"]  # there, the weights are fetched
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        given = {one["name"]: one.get("value") for one in container["env"]}
        assert wanted.items() <= given.items()
        assert "VLLM_API_KEY" in given
