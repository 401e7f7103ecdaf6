# SPDX-License-Identifier: Apache-2.0
"""The manifest of hooks: complete, true of the installed vLLM, and able to find what moved."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from vllm import version

from tests.conftest import REPOSITORY
from vllm_vtprune import compat
from vllm_vtprune.hooks import record
from vllm_vtprune.hooks.__main__ import main
from vllm_vtprune.hooks.declared import DECLARED
from vllm_vtprune.hooks.record import Difference, compare, installed_vllm, manifest, read_record, states
from vllm_vtprune.hooks.source_tree import SourceTree, State

RELEASE = compat.release_of(version.__version__)
CONNECTION = "vllm.connections:HTTPConnection.get_bytes"


@pytest.fixture(scope="module")
def tree() -> SourceTree:
    return installed_vllm()


def our_file(where: str) -> Path:
    package, _, path = where.partition("/")
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / path


def test_the_installed_vllm_is_as_recorded(tree: SourceTree) -> None:
    leaning = manifest(tree)
    now = states(tree, [use.symbol for use in leaning])
    gone = [symbol for symbol, state in now.items() if state is None]
    others = [read_record(release) for release in record.recorded_releases() if release != RELEASE]
    # a name that another supported release keeps elsewhere is imported from there (`compat.serve_parser`)
    assert all(any(other[symbol] is not None for other in others) for symbol in gone)
    written = "run `python -m vllm_vtprune.hooks --write` once the new hooks are read and tested"
    assert read_record(RELEASE) == now, written


def test_imports_and_overrides_are_found_by_themselves(tree: SourceTree) -> None:
    found = {(use.kind, use.symbol) for use in manifest(tree)}
    assert ("override", CONNECTION) in found
    assert ("override", "vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead") in found
    assert ("import", "vllm.v1.core.sched.scheduler:Scheduler") in found


def test_the_page_on_the_architecture_has_the_table() -> None:
    written = "copy what `python -m vllm_vtprune.hooks --table` prints"
    assert record.table() in (REPOSITORY / "docs" / "architecture.md").read_text(), written


@pytest.mark.parametrize("use", DECLARED, ids=lambda use: f"{use.where}-{use.symbol.rpartition(':')[2]}")
def test_what_is_declared_stands_where_it_says(use: record.Use) -> None:
    text = our_file(use.where).read_text()
    if use.kind == "order":
        assert use.why, "an order is a sentence"
    else:
        assert use.symbol.rpartition(":")[2].split(".")[-1] in text


@pytest.mark.parametrize(
    ("edit", "what", "breaks"),
    [
        (("def get_bytes(", "def fetch_bytes("), "gone", True),
        (
            ("max_bytes: int | None = None,", "most: int | None = None,"),
            "signature",
            True,
        ),
        (("with self.get_response(", "with self.get_answer("), "body", False),
    ],
    ids=["renamed", "another parameter", "other code"],
)
def test_what_moved_is_told(
    tree: SourceTree, tmp_path: Path, edit: tuple[str, str], what: str, breaks: bool
) -> None:
    (tmp_path / "vllm").mkdir()
    source = tree.root / "vllm" / "connections.py"
    text = source.read_text()
    start = text.index("def get_bytes(")
    assert edit[0] in text[start:]
    (tmp_path / "vllm" / "connections.py").write_text(
        text[:start] + text[start:].replace(edit[0], edit[1], 1)
    )
    leaning = [use for use in manifest(tree) if use.symbol == CONNECTION]
    [difference] = compare(states(tree, [CONNECTION]), states(SourceTree(tmp_path), [CONNECTION]), leaning)
    assert (difference.what, difference.breaks) == (what, breaks)
    assert difference.uses[0].where == "vtprune_server/media.py"


def test_docstrings_and_annotations_do_not_count(tmp_path: Path) -> None:
    found = []
    for body in ("def f(a: int, b=1) -> int:\n    'Says.'\n    return a", "def f(a, b=1):\n    return a"):
        (tmp_path / "m.py").write_text(body)
        found.append(SourceTree(tmp_path).state("m:f"))
    assert found[0] == found[1] == State("m", "a, b=1", found[0].body if found[0] else "")


def test_re_exports_and_base_classes_are_followed(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "__init__.py").write_text(
        "from .a import Derived as Shown\nTABLE = {'Late': '.a:Base'}\n".replace("'", '"')
    )
    (tmp_path / "p" / "a.py").write_text(
        "class Base:\n    def run(self, x): ...\n\n"
        "class Derived(Base):\n    def __init__(self):\n        self.y = 1\n"
    )
    tree = SourceTree(tmp_path)
    assert (run := tree.state("p:Shown.run")) is not None and (run.module, run.signature) == (
        "p.a",
        "self, x",
    )
    assert tree.state("p:Shown.y") is not None and tree.state("p:Late") is not None
    assert tree.state("p:Shown.missing") is None and tree.state("p.b:Base") is None


def test_a_vllm_whose_hook_changed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VTPRUNE_HOOKS_CHECKED", raising=False)
    compat.check_hooks()
    recorded = read_record(RELEASE)
    was = recorded[CONNECTION]
    assert was is not None
    changed = {**recorded, CONNECTION: State(was.module, was.signature + ", more", was.body)}
    monkeypatch.setattr(record, "read_record", lambda _release: changed)
    compat.check_hooks()  # checked once in a process and those that it starts
    monkeypatch.delenv("VTPRUNE_HOOKS_CHECKED")
    with pytest.raises(
        compat.UnsupportedError, match=r"HTTPConnection.get_bytes, on which vtprune_server/media.py"
    ):
        compat.check_hooks()


def test_the_command_names_what_is_gone(
    tree: SourceTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm-0.99.0.dist-info").mkdir()
    shutil.copy(tree.root / "vllm" / "connections.py", tmp_path / "vllm")
    assert main([str(tmp_path), "--release", RELEASE]) == 1
    said = capsys.readouterr().out
    assert f"BREAKS {CONNECTION}" not in said
    assert "BREAKS vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead: gone" in said
    assert "override in vllm_vtprune/kv_drop/hooks/scheduler.py" in said


def test_only_what_we_override_breaks_by_its_signature() -> None:
    imported = Difference("m:f", "signature", "", (record.Use("m:f", "import", "x.py"),))
    overridden = Difference("m:f", "signature", "", (record.Use("m:f", "override", "x.py"),))
    assert not imported.breaks and overridden.breaks
