# SPDX-License-Identifier: Apache-2.0
"""Which worker of pytest-xdist gets which files, and in which order (``--dist loadfile``).

A file's tests run in one worker, as their module's fixtures do. So do the files of a group in `TOGETHER`:
what they share is started once and not in each worker. Files that take minutes come first, so that both
workers end at the same time: a long one at the end would have the other worker wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    import pytest

#: Files that share a fixture of the session, by the fixture's name.
TOGETHER: dict[str, tuple[str, ...]] = {
    "live_server": (
        "tests/clients/test_clients.py",
        "tests/deploy/test_data_parallel.py",  # shares `parallel` with the gateways
        "tests/deploy/test_gateways.py",
        "tests/deploy/test_prometheus.py",
        "tests/loadtest/test_twice.py",
        "tests/playground/test_live.py",
        "tests/server/test_contract.py",
        "tests/server/test_evaluate_server.py",
        "tests/server/test_grammar.py",
        "tests/server/test_hostile.py",
        "tests/server/test_inspection.py",
        "tests/server/test_interrupted.py",
        "tests/server/test_metrics.py",
        "tests/server/test_openai_client.py",
        "tests/server/test_openapi_fuzz.py",
        "tests/server/test_presets.py",
        "tests/server/test_question.py",
        "tests/server/test_request_log.py",
        "tests/server/test_shared_tower.py",
    ),
    "cluster": ("tests/deploy/test_ray.py", "tests/deploy/test_ray_failures.py"),
}
GROUP_OF = {file: group for group, files in TOGETHER.items() for file in files}
#: What takes longest, the longest first: files and groups.
LONGEST_FIRST = (
    "tests/kv_drop/test_equality.py",
    "cluster",
    "live_server",
    "tests/families/test_engine.py",
    "tests/kv_drop/test_bands.py",
    "tests/calibrate/test_calibrate_cli.py",
    "tests/families/test_http.py",
    "tests/families/test_both_stages.py",
    "tests/vision/test_engine.py",
    "tests/server/test_operator.py",
    "tests/deploy/test_ray_key.py",
    "tests/server/test_plain_vllm.py",
    "tests/server/test_refused_at_start.py",
    "tests/vision/test_outcomes.py",
)


def unit(nodeid: str) -> str:
    """What a test belongs to that runs in one worker: its file, or its file's group."""
    file = nodeid.split("::", 1)[0]
    return GROUP_OF.get(file, file)


def longest_first(items: list[pytest.Item]) -> None:
    """Order tests as their units are to be handed out; those of a unit stay in their order."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(unit(item.nodeid), len(places)))


class UnitScheduling(LoadFileScheduling):
    """Hands out a unit at a time."""

    def _split_scope(self, nodeid: str) -> str:
        return unit(nodeid)
