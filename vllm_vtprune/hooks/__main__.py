# SPDX-License-Identifier: Apache-2.0
"""Check the names that the plugin leans on against a vLLM: see the package's docstring for the commands."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_vtprune.hooks.record import (
    compare,
    installed_vllm,
    manifest,
    read_record,
    recorded_releases,
    states,
    table,
    write_record,
)
from vllm_vtprune.hooks.source_tree import SourceTree


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0 where nothing that we lean on broke, 1 where something did, 2 for a bad argument.
    """
    parser = argparse.ArgumentParser(prog="python -m vllm_vtprune.hooks", description=__doc__)
    parser.add_argument(
        "path", nargs="?", type=Path, help="a folder with vLLM's own; default: the installed vLLM"
    )
    parser.add_argument(
        "--release", help="compare with this release's record; default: the tree's own, else the newest"
    )
    parser.add_argument(
        "--table", action="store_true", help="print docs/architecture.md's table and nothing else"
    )
    parser.add_argument("--write", action="store_true", help="write the record of the tree's release instead")
    args = parser.parse_args(argv)
    if args.table:
        print(table())
        return 0
    try:
        tree = installed_vllm() if args.path is None else SourceTree(args.path)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    release = _release(tree)
    if release is None:
        print(f"{tree.root} holds no vLLM: give the folder that its own folder lies in.", file=sys.stderr)
        return 2
    leaning = manifest(installed_vllm())
    record = states(tree, [use.symbol for use in leaning])
    if args.write:
        print(f"wrote {write_record(release, record)}")
        return 0
    known = recorded_releases()
    against = args.release or (release if release in known else known[-1])
    if against not in known:
        print(f"there is no record of {against}; there are {', '.join(known)}.", file=sys.stderr)
        return 2
    differences = compare(read_record(against), record, leaning)
    for difference in sorted(differences, key=lambda d: (not d.breaks, d.symbol)):
        mark = "BREAKS" if difference.breaks else "read  "
        print(f"{mark} {difference.symbol}: {difference.what}, {difference.detail}")
        if difference.what == "gone" and (
            places := tree.places(difference.symbol.rpartition(":")[2].split(".")[-1])
        ):
            print(f"         a name like it is defined in {', '.join(places)}")
        for use in difference.uses:
            print(f"         {use.kind} in {use.where}{f': {use.why}' if use.why else ''}")
    broken = sum(difference.breaks for difference in differences)
    print(
        f"vLLM {release} against the record of {against}: {len(record)} names, {broken} broken, "
        f"{len(differences) - broken} to read"
    )
    return 1 if broken else 0


def _release(tree: SourceTree) -> str | None:
    for folder in sorted(tree.root.glob("vllm*.dist-info")):
        found = re.fullmatch(r"vllm(?:_cpu)?-(\d+\.\d+)[.\w+]*\.dist-info", folder.name)
        if found is not None:
            return found[1]
    return None


if __name__ == "__main__":
    sys.exit(main())
