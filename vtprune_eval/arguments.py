# SPDX-License-Identifier: Apache-2.0
"""The command line of `vtprune eval` and the values in it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from vllm_vtprune.contract import FIELDS, PRESETS
from vllm_vtprune.errors import SettingsError
from vllm_vtprune.selection import DEFAULT_METHOD, METHODS, SCORES
from vtprune_eval.borders import RATINGS
from vtprune_eval.drawn import DOMAINS
from vtprune_eval.scenes import SPLITS
from vtprune_eval.setting import DOWNSCALE
from vtprune_loadtest.command import SentenceParser

#: What rates tokens at a single prune layer, where none is below to inherit from.
_ALONE = tuple(name for name, rating in RATINGS.items() if not rating.inherits)


def make_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """The parser; it raises `LoadTestError` instead of exiting."""
    parser = SentenceParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder or hub id; a served name with --server"
    )
    what = parser.add_argument_group("what is asked")
    what.add_argument("--questions", type=Path, help="JSON lines with image, question, answer and kind")
    what.add_argument("--suffix", default="", help="text added to each question of the file")
    what.add_argument("--split", choices=tuple(SPLITS), default="test", help="default: %(default)s")
    what.add_argument("--scenes", type=count, default=300, help="drawn pictures; default: %(default)s")
    what.add_argument("--domain", choices=DOMAINS, default="scenes", help="of them; default: %(default)s")
    what.add_argument(
        "--size",
        type=count,
        metavar="PIXELS",
        help="side of drawn pictures, with --server or --write-questions; default: 168, and on transformers "
        "the tower's own",
    )
    what.add_argument(
        "--tasks",
        type=lambda text: [name for name in text.split(",") if name],
        default=[],
        metavar="TASK[,TASK]",
        help="published benchmarks by lmms-eval's names, such as pope,gqa,textvqa, on a server",
    )
    what.add_argument("--limit", type=count, metavar="N", help="questions of each task; default: all")
    what.add_argument(
        "--tasks-include", type=Path, metavar="FOLDER", help="tasks of your own, in lmms-eval's format"
    )
    what.add_argument(
        "--tasks-python",
        type=Path,
        metavar="PYTHON",
        help="of an environment with lmms-eval; default: the one of `make tasks-env`",
    )
    how = parser.add_argument_group("how it is pruned (comma-separated values make a grid)")
    how.add_argument("--preset", type=_names(PRESETS), default=[], help="instead of the options below")
    how.add_argument("--method", type=_names((*METHODS, DOWNSCALE)), default=[DEFAULT_METHOD])
    how.add_argument("--aggressiveness", type=_numbers("aggressiveness"), default=[])
    how.add_argument("--keep-ratio", type=_numbers("keep_ratio"), default=[])
    how.add_argument(
        "--max-share",
        type=_numbers("keep_ratio"),
        default=[1.0],
        help="of each picture no more than this share stays, as presets have it; not with --server",
    )
    how.add_argument("--score", choices=tuple(SCORES), default="cosine")
    how.add_argument("--kv-keep", type=_numbers("kv_keep"), default=[1.0])
    how.add_argument("--kv-scope", type=_names(FIELDS["kv_scope"].choices), default=["all"])
    how.add_argument(
        "--prune-layer",
        type=_counts,
        default=[],
        help="K; default: the demo model's own; a server has its own",
    )
    how.add_argument(
        "--schedule",
        nargs="+",
        default=[],
        metavar="SCHEDULE",
        help="several prune layers in place of one: 1:0.5,3:0, aim, pyramid, exit, or a JSON file",
    )
    how.add_argument("--window", type=_counts, default=[8])
    how.add_argument("--relevance", type=_names(_ALONE), default=["attention"])
    how.add_argument("--no-baselines", action="store_true", help="run nothing else at the same counts")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--server", metavar="URL", help="a running vtprune server, instead of transformers")
    where.add_argument(
        "--api-key", default=os.environ.get("OPENAI_API_KEY"), help="the server's; default: $OPENAI_API_KEY"
    )
    where.add_argument("--concurrency", type=count, default=8, help="requests in flight to the server")
    where.add_argument("--device", default="cpu")
    where.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    where.add_argument("--threads", type=int, default=0, help="0 leaves it to torch")
    where.add_argument("--max-tokens", type=count, default=16, help="of an answer")
    out = parser.add_argument_group("what comes out")
    out.add_argument("--out", type=Path, help="folder for the JSON and the plots")
    out.add_argument(
        "--draw", type=Path, nargs="+", metavar="PICTURE", help="draw curve and kept patches instead"
    )
    out.add_argument(
        "--write-questions",
        type=Path,
        metavar="FILE",
        help="write the drawn questions for --questions, their pictures beside it, and ask nothing",
    )
    out.add_argument("--study", action="store_true", help="calibrate and compare everything: docs/evaluation")
    out.add_argument("--validation-scenes", type=count, default=300, help="of the study's calibration")
    out.add_argument("--deciding-scenes", type=count, default=100, help="of its choice of stage 2's defaults")
    return parser


def _names(known: Any) -> Any:
    def names(text: str) -> list[str]:
        wanted = list(known) if text == "every" else text.split(",")
        for name in wanted:
            if name not in known:
                raise argparse.ArgumentTypeError(f"must be every or some of {', '.join(known)}, not {name!r}")
        return wanted

    return names


def _numbers(field: str) -> Any:
    def numbers(text: str) -> list[float]:
        try:
            found = [FIELDS[field].parse(part, field, text=True) for part in text.split(",")]
        except SettingsError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{field} ")) from None
        # a field of one number for each prune layer: one, as transformers drops at one layer
        return [value[0] if isinstance(value, tuple) else value for value in found]

    return numbers


def count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be one whole number of at least 1, not {text!r}")
    return number


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"must be whole numbers of at least 1, not {text!r}")
    return counts
