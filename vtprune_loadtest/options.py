# SPDX-License-Identifier: Apache-2.0
"""From the command line to a checked configuration."""

import argparse
import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vtprune_loadtest.arguments import (
    ANSWER_LEN,
    DEFAULT_CONCURRENCY,
    DEFAULT_REQUESTS,
    OUTPUT_LEN,
    N,
    count,
    make_parser,
    positive,
)
from vtprune_loadtest.arrivals import ArrivalProcess
from vtprune_loadtest.asking import QuestionBook
from vtprune_loadtest.client import Endpoint
from vtprune_loadtest.config import IgnoreEos, LoadTestConfig
from vtprune_loadtest.errors import LoadTestError
from vtprune_loadtest.images import DrawnPictures, FolderPictures, PictureSource
from vtprune_loadtest.metrics import parse_slo
from vtprune_loadtest.plan import Amount, Interleave, LoadPoint
from vtprune_loadtest.sweep import parse_settings
from vtprune_loadtest.workload import IntRange

_MAX_SIDE = 8192
_SEED_BITS = 32
#: What a file of questions stands in place of.
_NOT_WITH_QUESTIONS = (
    *("--images", "--image-size", "--image-format", "--images-per-prompt", "--repeat-share"),
    *("--prompt", "--prompt-words"),
)
_OWN_FIELDS = ("model", "messages", "max_tokens", "stream", "stream_options")


def parse_options(argv: Sequence[str] | None, prog: str) -> LoadTestConfig:
    """Read and check the command line.

    Raises:
        LoadTestError: an argument that cannot be used; the message says which and what to write.
    """
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    if args.questions is not None:
        _judge_questions(args, parser)
    elif args.suffix:
        raise LoadTestError("--suffix is added to the questions of a file: give one with --questions.")
    if args.output_len is None:
        args.output_len = OUTPUT_LEN if args.questions is None else ANSWER_LEN
    if args.seed is None:
        args.seed = secrets.randbits(_SEED_BITS)
    settings = parse_settings(args.sweep, args.sweep_header)
    if args.num_prompts is not None and args.duration is not None:
        raise LoadTestError("--num-prompts and --duration exclude each other: give one of them.")
    requests = args.num_prompts
    if args.duration is None and requests is None:
        requests = DEFAULT_REQUESTS
    if not 0 <= args.repeat_share < 1:
        raise LoadTestError(f"--repeat-share is a share from 0 up to but not 1, not {args.repeat_share:g}.")
    if not 0 <= args.max_error_share <= 1:
        raise LoadTestError(f"--max-error-share is a share from 0 to 1, not {args.max_error_share:g}.")
    images = IntRange.parse("--images-per-prompt", args.images_per_prompt, minimum=0)
    return LoadTestConfig(
        endpoint=_endpoint(args),
        model=args.model,
        settings=settings,
        points=_points(args.rate, args.concurrency),
        amount=Amount(requests, args.duration),
        interleave=Interleave(args.interleave),
        rounds=args.rounds,
        warmup=args.warmup,
        ramp_s=args.ramp,
        process=ArrivalProcess(args.arrivals),
        questions=None if args.questions is None else QuestionBook(args.questions, args.suffix, args.seed),
        pictures=_pictures(args),
        images_per_prompt=images,
        repeat_share=args.repeat_share,
        prompt=args.prompt,
        prompt_words=args.prompt_words,
        output_len=IntRange.parse("--output-len", args.output_len, minimum=1),
        temperature=args.temperature,
        ignore_eos=IgnoreEos(args.ignore_eos),
        include_usage=args.include_usage,
        extra_body=_extra_body(args.extra_body),
        slo=parse_slo(args.slo) if args.slo is not None else {},
        max_error_share=args.max_error_share,
        seed=args.seed,
        ready_timeout_s=args.ready_timeout,
        result_dir=args.result_dir,
        plots=args.plots,
        server_counters=args.server_counters,
        progress=args.progress,
        arguments=_shown(args),
    )


def _judge_questions(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what does not go with --questions, and let answers end where they end."""
    given = [
        flag
        for flag in _NOT_WITH_QUESTIONS
        if getattr(args, name := flag[2:].replace("-", "_")) != parser.get_default(name)
    ]
    if given:
        raise LoadTestError(f"--questions has pictures and prompts of its own: leave out {', '.join(given)}.")
    if args.ignore_eos == IgnoreEos.ON:
        raise LoadTestError(
            "--questions grades answers, which end where the model ends them: leave out --ignore-eos on."
        )
    args.ignore_eos = IgnoreEos.OFF.value


def _endpoint(args: argparse.Namespace) -> Endpoint:
    base_url = args.base_url.rstrip("/").removesuffix("/v1")
    if not base_url.startswith(("http://", "https://")):
        raise LoadTestError(f"--base-url must begin with http:// or https://, unlike {args.base_url!r}.")
    headers: dict[str, str] = {}
    for item in args.header:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise LoadTestError(f"--header takes NAME=VALUE and got {item!r}.")
        headers[name.strip()] = value.strip()
    if args.api_key:
        headers["Authorization"] = f"Bearer {args.api_key}"
    return Endpoint(base_url, "/" + args.path.lstrip("/"), headers, args.timeout, not args.insecure)


def _points(rates: str | None, concurrencies: str | None) -> list[LoadPoint]:
    """Every rate with every concurrency, in the order given."""
    caps: list[int | None] = [None]
    if concurrencies is not None:
        caps = [_element("--concurrency", text, count) for text in concurrencies.split(",")]
    elif rates is None:
        caps = [DEFAULT_CONCURRENCY]
    points = [LoadPoint(None, cap) for cap in caps]
    if rates is not None:
        points = [_open_loop(text.strip(), cap) for text in rates.split(",") for cap in caps]
    if len(set(points)) != len(points):
        raise LoadTestError("--rate or --concurrency names a value twice: every load point runs once.")
    return points


def _open_loop(rate: str, cap: int | None) -> LoadPoint:
    if rate.endswith("x"):
        return LoadPoint(None, cap, _element("--rate", rate.removesuffix("x"), positive))
    return LoadPoint(_element("--rate", rate, positive), cap)


def _pictures(args: argparse.Namespace) -> PictureSource:
    if args.images is not None:
        return FolderPictures(args.images, args.seed)
    width, _, height = args.image_size.partition("x")
    try:
        size = (int(width), int(height or width))
    except ValueError:
        size = (0, 0)
    if not all(1 <= side <= _MAX_SIDE for side in size):
        raise LoadTestError(
            f"--image-size takes pixels like 336 or 640x480, up to {_MAX_SIDE}; got {args.image_size!r}."
        )
    return DrawnPictures(*size, args.image_format, args.seed)


def _extra_body(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        body = json.loads(text)
    except ValueError as error:
        raise LoadTestError(f"--extra-body is not JSON: {error}.") from None
    if not isinstance(body, dict):
        raise LoadTestError('--extra-body takes a JSON object, like {"top_k": 1}.')
    if own := [name for name in _OWN_FIELDS if name in body]:
        raise LoadTestError(f"--extra-body cannot set {', '.join(own)}: the load tester sets that itself.")
    return body


def _shown(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments for the result file: no key, and of the headers only the names."""
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    del shown["api_key"]
    return shown | {"header": [item.partition("=")[0] for item in args.header]}


def _element(option: str, text: str, convert: Callable[[str], N]) -> N:
    try:
        return convert(text)
    except argparse.ArgumentTypeError as error:
        raise LoadTestError(f"{option}: {error}.") from None
