# SPDX-License-Identifier: Apache-2.0
"""The compose files are valid, and what they name is there."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy.manifests import DEPLOY, SCHEMAS
from vtprune_loadtest.arguments import make_parser

SCHEMA = json.loads((SCHEMAS / "compose-spec.json").read_text())
FILES = ("compose.yaml", "compose.gpu.yaml")
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SERVERS = {name: SERVICES[name] for name in ("vtprune", "prometheus", "grafana")}


def validate(found: object) -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(found)


@pytest.mark.parametrize("name", FILES)
def test_compose_files_are_valid(name: str) -> None:
    validate(yaml.safe_load((DEPLOY / name).read_text()))


@pytest.mark.parametrize("name", FILES)
def test_any_misspelt_field_is_refused(name: str) -> None:
    found = yaml.safe_load((DEPLOY / name).read_text())
    for service, fields in found["services"].items():
        for field in fields:
            changed = copy.deepcopy(found)
            changed["services"][service][f"{field}x"] = changed["services"][service].pop(field)
            with pytest.raises(jsonschema.ValidationError):
                validate(changed)
    for field in (field for field in found if not field.startswith("x-")):
        with pytest.raises(jsonschema.ValidationError):
            validate({**found, f"{field}s": {}})


def test_mounted_and_built_files_are_there() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / source).exists(), source
    for name in FILES:
        build = yaml.safe_load((DEPLOY / name).read_text())["services"]["vtprune"]["build"]
        assert (DEPLOY.parent / build["dockerfile"]).is_file()


def test_secrets_are_files_that_git_does_not_see() -> None:
    for name in FILES:
        secrets = yaml.safe_load((DEPLOY / name).read_text())["secrets"]
        assert all(secret["file"].startswith("./secrets/") for secret in secrets.values())
    assert "/deploy/secrets/" in (DEPLOY.parent / ".gitignore").read_text().splitlines()
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if "KEY" in variable or "PASSWORD" in variable:
                assert value.startswith("/run/secrets/")
                assert value.removeprefix("/run/secrets/") in service["secrets"]


def test_services_are_hardened_and_listen_on_this_machine_alone() -> None:
    for service in SERVICES.values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_the_monitoring_finds_the_server() -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    (job,) = scraped["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    assert job["job_name"] == "vtprune"  # which the alert rules name
    assert target.split(":")[0] in SERVERS
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "vtprune.yaml").read_text())["providers"]
    dashboards = [v.split(":")[1] for v in SERVERS["grafana"]["volumes"] if "dashboard.json" in v]
    assert [path.rsplit("/", 1)[0] for path in dashboards] == [provider["options"]["path"]]


def test_the_load_test_s_arguments_are_the_load_tester_s() -> None:
    command, *arguments = SERVICES["loadtest"]["command"]
    assert command == "loadtest"
    parsed = make_parser("vtprune loadtest").parse_args(arguments)
    assert parsed.base_url == "http://vtprune:8000"
