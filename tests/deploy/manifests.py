# SPDX-License-Identifier: Apache-2.0
"""Kubernetes objects as kustomize and helm render them, and validators that let no misspelt field pass."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml

from tests.conftest import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
SCHEMAS = Path(__file__).parent / "schemas"
CHART = Path(__file__).parent / "production_stack_chart"
OVERLAYS = ("cpu-demo", "gpu", "replicas")
#: The oldest release with all that the manifests use (a pause before the stop without a shell), and the
#: newest that the validator knows.
RELEASES = ("1.30", kubernetes_validate.latest_version())
#: Kinds that Kubernetes itself does not know, by the file of their schema.
CUSTOM = {
    "ServiceMonitor": "servicemonitor_v1.json",
    "PrometheusRule": "prometheusrule_v1.json",
    "ScaledObject": "scaledobject_v1alpha1.json",
}
Object = dict[str, Any]
# It reads megabytes of schema for each object otherwise.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)
kubernetes_validate.utils.all_versions = functools.cache(kubernetes_validate.utils.all_versions)


@functools.cache
def overlay(name: str) -> tuple[Object, ...]:
    """An overlay's objects, rendered by kubectl or kustomize; skips the test where neither is installed."""
    folder = str(KUBERNETES / "overlays" / name)
    if kubectl := shutil.which("kubectl"):
        return _rendered(kubectl, "kustomize", folder)
    if kustomize := shutil.which("kustomize"):
        return _rendered(kustomize, "build", folder)
    pytest.skip("neither kubectl nor kustomize is installed, so nothing can be rendered")


@functools.cache
def production_stack(folder: Path) -> tuple[Object, ...]:
    """The chart's objects with our values, rendered by helm; skips the test where it is not installed.

    Args:
        folder: where a copy of the chart may be made without the charts it can bring along.
    """
    helm = os.environ.get("HELM") or shutil.which("helm")
    if helm is None:
        pytest.skip("helm is not installed: deploy/README.md says where it can be had; HELM names it")
    chart = folder / "chart"
    shutil.copytree(CHART, chart)
    about = yaml.safe_load((chart / "Chart.yaml").read_text())
    del about["dependencies"]  # two charts that are off by default, and lie in a registry
    (chart / "Chart.yaml").write_text(yaml.safe_dump(about))
    values = KUBERNETES / "production-stack" / "values.yaml"
    return _rendered(helm, "template", "vtprune", str(chart), "--values", str(values))


def _rendered(*command: str) -> tuple[Object, ...]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return tuple(found for found in yaml.safe_load_all(done.stdout) if found)


def validate(found: Object, release: str = RELEASES[-1]) -> None:
    """Refuse an object with an unknown field or a value of the wrong type.

    Raises:
        Exception: the validator's own.
    """
    if found["kind"] in CUSTOM:
        jsonschema.Draft7Validator(_schema(CUSTOM[found["kind"]])).validate(found)
    else:
        kubernetes_validate.validate(found, release, strict=True)


@functools.cache
def _schema(name: str) -> Object:
    schema: Object = json.loads((SCHEMAS / name).read_text())
    schema["additionalProperties"] = False  # the catalogue closes everything but the top
    return schema


def of_kind(objects: tuple[Object, ...], kind: str) -> list[Object]:
    """The objects of a kind."""
    return [found for found in objects if found["kind"] == kind]


def only(objects: tuple[Object, ...], kind: str) -> Object:
    """The one object of a kind."""
    (found,) = of_kind(objects, kind)
    return found
