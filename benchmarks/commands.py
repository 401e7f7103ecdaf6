# SPDX-License-Identifier: Apache-2.0
"""Options and output that the benchmark commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vtprune_loadtest.command import SentenceParser, make_folder


def bench_parser(prog: str, description: str, *, models: bool = True) -> SentenceParser:
    """A parser with `--json` and, where models are built, `--model-dir`."""
    parser = SentenceParser(prog=prog, description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, every block included")
    if models:
        parser.add_argument(
            "--model-dir",
            type=Path,
            metavar="FOLDER",
            help="where built models are kept; default ~/.cache/vtprune",
        )
    return parser


def write_json(path: Path | None, document: Any) -> None:
    """Write what `--json` asked for, and say so; nothing where it did not.

    Raises:
        LoadTestError: the folder cannot be made.
    """
    if path is not None:
        make_folder("--json", path.parent)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}")
