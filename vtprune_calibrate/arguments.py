# SPDX-License-Identifier: Apache-2.0
"""The command line of `vtprune calibrate` and the values in it."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from vllm_vtprune.kv_drop.relevance import RELEVANCE
from vllm_vtprune.kv_drop.schedule import MOST_PRUNE_LAYERS
from vtprune_eval.arguments import count
from vtprune_eval.drawn import DOMAINS
from vtprune_loadtest.command import SentenceParser

UNITS = {"flops": "operations of the decoder's prefill", "kv": "bytes of KV cache"}


@dataclass(frozen=True)
class Budget:
    """The most that a prompt may cost.

    Attributes:
        unit: of `UNITS`.
        amount: up to 1 a share of what the unpruned prompts cost; above it a number a prompt.
    """

    unit: str
    amount: float

    def absolute(self, whole: float) -> float:
        """The amount a prompt, where unpruned ones cost `whole`."""
        return self.amount * whole if self.amount <= 1 else self.amount


def make_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """The parser; it raises `LoadTestError` instead of exiting."""
    parser = SentenceParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub id; default: the demo model")
    what = parser.add_argument_group("what is wanted (one of them)")
    what.add_argument(
        "--tolerance", type=_share, help="fewest tokens that lose at most this share of answers"
    )
    what.add_argument("--budget", type=_budget, help="best answers at a cost: flops=0.5, kv=0.3, kv=2e6")
    what.add_argument(
        "--presets", action="store_true", help="the presets' aggressiveness alone, for these pictures"
    )
    what.add_argument(
        "--study", action="store_true", help="compare schedules on the demo model instead: docs/schedules"
    )
    what.add_argument(
        "--gate",
        type=_layers,
        metavar="LAYERS",
        help="train a gate for an exit at this prune layer, or at each of several, and judge it",
    )
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--questions", type=Path, help="JSON lines with image, question, answer and kind")
    asked.add_argument("--images", type=Path, metavar="FOLDER", help="pictures alone, for --presets")
    asked.add_argument("--suffix", default="", help="text added to each question of the file")
    asked.add_argument(
        "--hold-out",
        type=_share,
        default=0.5,
        help="share of its pictures that confirm; default: %(default)s",
    )
    asked.add_argument(
        "--scenes", type=count, default=200, help="drawn pictures, as many to confirm; default: %(default)s"
    )
    asked.add_argument("--domain", choices=DOMAINS, default="scenes", help="of them; default: %(default)s")
    asked.add_argument(
        "--by",
        choices=("answers", "agreement"),
        default="answers",
        help="a reply counts where it is right, or where it is the unpruned model's; default: %(default)s",
    )
    how = parser.add_argument_group("the schedule")
    how.add_argument("--bands", type=_bands, default=3, help="prune layers at most; default: %(default)s")
    how.add_argument("--candidates", type=_layers, help="prune layers to search, e.g. 4,8,12; default: all")
    how.add_argument("--relevance", type=_relevance, default="attention", help="default: %(default)s")
    how.add_argument("--window", type=count, default=8, help="default: %(default)s")
    how.add_argument(
        "--aggressiveness", type=_share, default=0.0, help="of stage 1 below it; default: nothing pruned"
    )
    where = parser.add_argument_group("where it runs")
    where.add_argument(
        "--server", metavar="URL", help="a running vtprune server whose prune layers are the candidates"
    )
    where.add_argument(
        "--api-key", default=os.environ.get("OPENAI_API_KEY"), help="the server's; default: $OPENAI_API_KEY"
    )
    where.add_argument("--concurrency", type=count, default=8, help="requests in flight to the server")
    where.add_argument("--device", default="cpu")
    where.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    where.add_argument("--threads", type=int, default=0, help="0 leaves it to torch")
    where.add_argument("--max-tokens", type=count, default=16, help="of an answer")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of schedule, plot and journal; it resumes what is there",
    )
    return parser


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1), not {text!r}")
    return value


def _bands(text: str) -> int:
    number = count(text)
    if number > MOST_PRUNE_LAYERS:
        raise argparse.ArgumentTypeError(f"must be 1 to {MOST_PRUNE_LAYERS}, not {text!r}")
    return number


def _layers(text: str) -> list[int]:
    return sorted({count(part) for part in text.split(",")})


def _relevance(text: str) -> str:
    names = text.split(",")
    if any(name not in RELEVANCE for name in names) or RELEVANCE[names[0]].inherits:
        raise argparse.ArgumentTypeError(
            f"must be some of {', '.join(RELEVANCE)}, of which the first cannot inherit, not {text!r}"
        )
    return text


def _budget(text: str) -> Budget:
    unit, _, number = text.partition("=")
    try:
        amount = float(number)
    except ValueError:
        amount = 0.0
    if unit not in UNITS or not amount > 0:
        raise argparse.ArgumentTypeError(
            f"must be flops= or kv= and a share of the unpruned prompt's, or a number above 1, not {text!r}"
        )
    return Budget(unit, amount)
