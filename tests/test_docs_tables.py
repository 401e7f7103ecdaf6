# SPDX-License-Identifier: Apache-2.0
"""The documents' tables of the contract and of the operator's settings say what the code says."""

from __future__ import annotations

import ast
import re

import pytest

from tests.conftest import REPOSITORY
from tests.helpers.kv_matrix import compared_table
from vllm_vtprune import errors
from vllm_vtprune.contract import FIELDS, HEADERS, KWARG
from vllm_vtprune.kv_drop.schedule import NAMED, resolve
from vtprune_server.limits import variable
from vtprune_server.options import OperatorSettings, flag, shown


def contract_table() -> str:
    rows = [f"| `{f.header}` | `{KWARG}.{f.name}` | {f.description} |" for f in FIELDS.values()]
    return "\n".join(["| request header | body field | meaning |", "|---|---|---|", *rows])


def settings_table() -> str:
    rows = [
        f"| `{flag(name)}` | `{variable(name)}` | {shown(field.default)} | {field.description} |"
        for name, field in OperatorSettings.model_fields.items()
    ]
    return "\n".join(["| flag | variable | default | meaning |", "|---|---|---|---|", *rows])


def schedules_table() -> str:
    rows = []
    for layers in (24, 28, 32, 36, 40):
        found = [resolve(name, layers) for name in NAMED]
        rows.append(f"| {layers} | {' | '.join(f'`{s}`' for s in found)} | {found[0].deviation:.2f} |")
    head = f"| decoder layers | {' | '.join(f'`{name}`' for name in NAMED)} | deviation of `aim` |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])


@pytest.mark.parametrize(
    "page,table",
    [
        ("README.md", contract_table()),
        ("docs/operating.md", settings_table()),
        ("docs/schedules.md", schedules_table()),
        ("docs/architecture.md", compared_table()),
    ],
    ids=["contract", "settings", "schedules", "compared"],
)
def test_a_table_is_the_code_s(page: str, table: str) -> None:
    """Where it is not, copy the table this prints."""
    assert table in (REPOSITORY / page).read_text(), f"{page} should hold:\n{table}"


def test_the_playground_sends_the_contracts_headers() -> None:
    script = (REPOSITORY / "server/vtprune_server/static/playground/api.js").read_text()
    sent = dict(re.findall(r'(\w+): "(X-VTPrune-[\w-]+)"', script))
    assert sent and sent.items() <= HEADERS.items()


PACKAGES = (
    *("vllm_vtprune", "server/vtprune_server", "vtprune_loadtest", "vtprune_eval", "vtprune_calibrate"),
    *("benchmarks", "demo"),
)


def test_every_error_hangs_in_the_tree_that_is_drawn() -> None:
    sources = [path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")]
    bases: dict[str, list[str]] = {}
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base) for base in node.bases]

    def root(name: str) -> bool:
        return name == "VTPruneError" or any(root(base) for base in bases.get(name, ()))

    raised = {
        name: found
        for name, found in bases.items()
        if any(base.endswith(("Error", "Exception")) or base in errors.__dict__ for base in found)
    }
    drawn = re.findall(r"^ *\* (\w+)", errors.__doc__ or "", re.MULTILINE)
    apart = {"PrivateAddressError"}
    assert {"SettingsError", "LoadTestError", "DataError"} <= set(drawn)
    assert set(raised) - apart == set(drawn)
    assert all(root(name) for name in drawn)
