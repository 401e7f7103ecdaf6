# SPDX-License-Identifier: Apache-2.0
"""How the names we lean on stood in the vLLM releases that were read and run, and what differs now."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from vllm_vtprune.hooks.declared import DECLARED
from vllm_vtprune.hooks.source_tree import SourceTree, State
from vllm_vtprune.hooks.uses import Use, uses

_RECORDS = Path(__file__).parent / "records"

Record = Mapping[str, State | None]


@dataclass(frozen=True)
class Difference:
    """A name that stands otherwise than recorded.

    Attributes:
        symbol: the name of vLLM.
        what: "gone", "moved" (defined elsewhere, same code), "signature" or "body".
        detail: a sentence's rest: where it is now, or both signatures.
        uses: who of us leans on it.
    """

    symbol: str
    what: str
    detail: str
    uses: tuple[Use, ...]

    @property
    def breaks(self) -> bool:
        """Whether what we do with the name cannot work as it stands; otherwise somebody must read it."""
        kinds = {use.kind for use in self.uses}
        return self.what == "gone" or (self.what == "signature" and bool(kinds & {"override", "replace"}))


def manifest(tree: SourceTree) -> list[Use]:
    """All that we lean on, derived and declared, given a vLLM in which base classes are looked up."""
    return sorted({*uses(tree), *DECLARED})


def table() -> str:
    """What we override and replace, by our file, as a Markdown table; vLLM's names without their module."""
    by_file: dict[str, dict[str, list[str]]] = {}
    for use in manifest(installed_vllm()):
        if use.kind in ("override", "replace"):
            name = f"`{use.symbol.rpartition(':')[2]}`"
            names = by_file.setdefault(use.where, {}).setdefault(use.kind, [])
            names.extend([] if name in names else [name])
    rows = [
        f"| `{where}` | {', '.join(kinds.get('override', []))} | {', '.join(kinds.get('replace', []))} |"
        for where, kinds in sorted(by_file.items())
    ]
    return "\n".join(["| our file | overrides | replaces on an object |", "|---|---|---|", *rows])


def states(tree: SourceTree, symbols: Sequence[str]) -> dict[str, State | None]:
    """How each symbol stands in a tree; None where it is gone."""
    return {symbol: tree.state(symbol) for symbol in sorted(set(symbols))}


def compare(old: Record, new: Record, leaning: Sequence[Use]) -> list[Difference]:
    """What differs between two records, for the symbols of `old`."""
    by_symbol: dict[str, list[Use]] = {}
    for use in leaning:
        by_symbol.setdefault(use.symbol, []).append(use)
    found = []
    for symbol, was in old.items():
        now = new.get(symbol)
        if was is None or was == now:
            continue
        if now is None:
            what, detail = "gone", f"it was in {was.module}"
        elif was.signature != now.signature:
            what, detail = "signature", f"({was.signature}) became ({now.signature})"
        elif was.body != now.body:
            what, detail = "body", f"its code in {now.module} changed"
        else:
            what, detail = "moved", f"from {was.module} to {now.module}"
        found.append(Difference(symbol, what, detail, tuple(by_symbol.get(symbol, ()))))
    return found


def recorded_releases() -> list[str]:
    """The releases that have a record, such as "0.32", the newest last."""
    return sorted(
        (path.stem for path in _RECORDS.glob("*.json")), key=lambda name: [*map(int, name.split("."))]
    )


def read_record(release: str) -> dict[str, State | None]:
    """The record of a release.

    Raises:
        FileNotFoundError: there is none.
    """
    entries = json.loads((_RECORDS / f"{release}.json").read_text())
    return {symbol: None if state is None else State(**state) for symbol, state in entries.items()}


def write_record(release: str, record: Record) -> Path:
    """Write a release's record; one line a symbol, so that a diff shows what moved."""
    lines = (
        f"{json.dumps(symbol)}: {json.dumps(None if state is None else asdict(state))}"
        for symbol, state in sorted(record.items())
    )
    path = _RECORDS / f"{release}.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return path


def installed_vllm() -> SourceTree:
    """The sources of the vLLM that an import would find; nothing of it is imported.

    Raises:
        FileNotFoundError: there is none.
    """
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("vLLM is not installed: give the folder of an unpacked one.")
    return SourceTree(Path(spec.origin).parent.parent)


def broken_hooks(release: str) -> list[Difference]:
    """What we override or replace in the installed vLLM and does not stand there as recorded for `release`.

    Some 50 names, two thirds of a second of one core. Imports are left out: a missing one speaks for itself.
    """
    tree = installed_vllm()
    hooked = [use for use in manifest(tree) if use.kind in ("override", "replace")]
    symbols = {use.symbol for use in hooked}
    recorded = {symbol: state for symbol, state in read_record(release).items() if symbol in symbols}
    return [d for d in compare(recorded, states(tree, list(symbols)), hooked) if d.breaks]
