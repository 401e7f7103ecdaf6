# SPDX-License-Identifier: Apache-2.0
"""requirements/ray.lock lies over the other locks and moves nothing in them."""

from __future__ import annotations

import tomllib
from importlib.metadata import distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY


def pins(lock: str) -> dict[str, Requirement]:
    lines = (REPOSITORY / "requirements" / lock).read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): one for one in wanted}


def test_no_pin_of_the_other_locks_moves() -> None:
    others = {**pins("cpu.lock"), **pins("test.lock")}
    twice = pins("ray.lock").keys() & others.keys()
    assert {name: pins("ray.lock")[name].specifier for name in twice} == {
        name: others[name].specifier for name in twice
    }


def test_the_extra_is_what_is_locked() -> None:
    (extra,) = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"][
        "ray"
    ]
    assert Requirement(extra).specifier == pins("ray.lock")["ray"].specifier


def test_what_ray_asks_for_is_locked_at_a_version_it_takes() -> None:
    pytest.importorskip("ray", reason="Ray is not installed here: make test-deploy")
    locked = {**pins("cpu.lock"), **pins("test.lock"), **pins("ray.lock")}
    for name in pins("ray.lock"):
        for text in distribution(name).requires or []:
            wanted = Requirement(text)
            extra = "serve" if name == "ray" else ""
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
                continue
            (pin,) = locked[canonicalize_name(wanted.name)].specifier
            assert wanted.specifier.contains(pin.version, prereleases=True), f"{name} asks for {text}"
