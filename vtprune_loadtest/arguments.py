# SPDX-License-Identifier: Apache-2.0
"""The command line's arguments and the numbers in them."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vtprune_loadtest.arrivals import ArrivalProcess
from vtprune_loadtest.command import SentenceParser
from vtprune_loadtest.config import IgnoreEos
from vtprune_loadtest.plan import Interleave

DEFAULT_REQUESTS = 100
DEFAULT_CONCURRENCY = 4
OUTPUT_LEN, ANSWER_LEN = "64", "16"
N = TypeVar("N", int, float)


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The parser; it raises `LoadTestError` instead of exiting."""
    parser = SentenceParser(
        prog=prog,
        description="Load an OpenAI-compatible server with picture questions; report throughput and latency.",
        epilog=f"Example: {prog} --sweep off,light,balanced,aggressive --interleave blocks --concurrency 4",
    )
    add = parser.add_argument_group("server").add_argument
    add("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="default: %(default)s")
    add("--path", default="/v1/chat/completions", help="default: %(default)s")
    add("--model", metavar="NAME", help="default: the first one the server lists")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"), metavar="KEY", help="default: $OPENAI_API_KEY")
    add(
        "--header",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="sent with every request; repeatable",
    )
    add("--insecure", action="store_true", help="accept any TLS certificate")
    add("--timeout", type=positive, default=600.0, metavar="S", help="per request; default: %(default)g")
    add(
        "--ready-timeout",
        type=_not_negative,
        default=0.0,
        metavar="S",
        help="wait so long for the server to start",
    )

    add = parser.add_argument_group("load").add_argument
    add(
        "--rate",
        metavar="R[,R]",
        help="open loop: requests per second, or multiples of what the first setting reaches in a "
        "closed loop (0.5x,1x,2x), which is measured first; several make several load points",
    )
    add(
        "--concurrency",
        metavar="N[,N]",
        help=f"closed loop, or with --rate a cap; default: {DEFAULT_CONCURRENCY}",
    )
    add(
        "--arrivals",
        choices=[p.value for p in ArrivalProcess],
        default="poisson",
        help="default: %(default)s",
    )
    add("--num-prompts", type=count, metavar="N", help=f"requests per setting; default: {DEFAULT_REQUESTS}")
    add("--duration", type=positive, metavar="S", help="instead of a number: seconds of load per setting")
    add(
        "--ramp",
        type=_not_negative,
        default=0.0,
        metavar="S",
        help="let the load rise for S seconds, left out",
    )
    add(
        "--warmup",
        type=_whole,
        default=2,
        metavar="N",
        help="requests per setting, left out; default: %(default)s",
    )
    add(
        "--seed",
        type=_whole,
        metavar="N",
        help="of arrivals, order, lengths and drawn pictures; default: another one each run, since a server "
        "has the pictures of an earlier run in its caches",
    )

    add = parser.add_argument_group("settings under test").add_argument
    add(
        "--sweep",
        metavar="PRESET,...",
        help="values of X-VTPrune-Preset, such as off,light,balanced,aggressive,auto; downscale0.22 is off "
        "with pictures of 0.22 times the pixels, for towers that take any size",
    )
    add(
        "--sweep-header",
        action="append",
        default=[],
        metavar="NAME=V,...",
        help="of any header (NAME=V;... where values hold commas); several multiply, and combinations that "
        "cannot differ are run once",
    )
    add(
        "--interleave",
        choices=[i.value for i in Interleave],
        default="requests",
        help="what alternates between "
        "settings: single requests, or drained phases of one setting each; default: %(default)s",
    )
    add(
        "--rounds",
        type=count,
        default=6,
        metavar="N",
        help="phases per setting with blocks; 6 and more give a 95 %% interval; default: %(default)s",
    )

    add = parser.add_argument_group("requests").add_argument
    add(
        "--questions",
        type=Path,
        metavar="FILE",
        help="ask these questions about their pictures and grade the answers: JSON lines with image, "
        "question, answer and kind, as `vtprune eval` reads and writes them",
    )
    add("--suffix", default="", help="text added to each question of the file")
    add("--images", type=Path, metavar="FOLDER", help="send its pictures; default: drawn ones")
    add(
        "--image-size",
        default="336",
        metavar="W[xH]",
        help="of drawn pictures, in pixels; default: %(default)s",
    )
    add(
        "--image-format",
        choices=["jpeg", "png"],
        default="jpeg",
        help="of drawn pictures; default: %(default)s",
    )
    add("--images-per-prompt", default="1", metavar="N[-M]", help="0 for text only; default: %(default)s")
    add(
        "--repeat-share",
        type=float,
        default=0.0,
        metavar="P",
        help="share of pictures sent before; default: 0",
    )
    add("--prompt", default="What is in this picture?", help="default: %(default)r")
    add(
        "--prompt-words",
        type=_whole,
        default=0,
        metavar="N",
        help="random words before it; default: %(default)s",
    )
    add(
        "--output-len",
        metavar="N[-M]",
        help=f"max_tokens, fixed or drawn; default: {OUTPUT_LEN}, {ANSWER_LEN} with --questions",
    )
    add(
        "--ignore-eos",
        choices=[i.value for i in IgnoreEos],
        default="auto",
        help="answers run to their full length; auto: if the server is vLLM and answers are not graded",
    )
    add("--temperature", type=_not_negative, default=0.0, help="default: %(default)g")
    add(
        "--include-usage", action=argparse.BooleanOptionalAction, default=True, help="ask for the usage chunk"
    )
    add("--extra-body", metavar="JSON", help="fields added to every request's body")

    add = parser.add_argument_group("results").add_argument
    add(
        "--slo",
        metavar="NAME:MS,...",
        help="limits for goodput: ttft, tpot, e2el, for example ttft:500,e2el:5000",
    )
    add(
        "--max-error-share",
        type=float,
        default=0.01,
        metavar="P",
        help="exit status 1 above it; default: %(default)g",
    )
    add("--result-dir", type=Path, metavar="FOLDER", help="write result.json, requests.jsonl and plots there")
    add("--server-counters", action="store_true", help="print how much the server's own counters grew")
    add("--plots", action=argparse.BooleanOptionalAction, default=True, help="PNG plots in --result-dir")
    add("--progress", action=argparse.BooleanOptionalAction, default=True, help="a bar, on a terminal only")
    return parser


def positive(text: str) -> float:
    """A float above 0; `argparse.ArgumentTypeError` for anything else."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a positive number")


def _not_negative(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a number of 0 or more")


def count(text: str) -> int:
    """An integer of 1 or more; `argparse.ArgumentTypeError` for anything else."""
    return _number(text, int, lambda value: value > 0, "a whole number of 1 or more")


def _whole(text: str) -> int:
    return _number(text, int, lambda value: value >= 0, "a whole number of 0 or more")


def _number(text: str, convert: Callable[[str], N], accept: Callable[[N], bool], wanted: str) -> N:
    try:
        value = convert(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
    if not accept(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value
