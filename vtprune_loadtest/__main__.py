# SPDX-License-Identifier: Apache-2.0
"""Load an OpenAI-compatible server and report throughput, latency and what pruning saved.

    vtprune loadtest --sweep off,light,balanced,aggressive --interleave blocks --concurrency 4
    vtprune loadtest --rate 1,2,4,8 --sweep off,balanced --duration 60 --result-dir results
    vtprune loadtest --questions scenes.jsonl --sweep off,balanced,auto --rate 0.5x,1x,2x --slo ttft:1000
    vtprune loadtest --sweep-header X-VTPrune-Aggressiveness=0,0.25,0.5 --sweep-header X-VTPrune-KV-Keep=1,0.5

Also `python -m vtprune_loadtest`. Exit status: 0; 1 if more than --max-error-share of the measured
requests failed; 2 if the test could not run; 130 if it was interrupted (what was measured until then is
reported).
"""

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtprune_loadtest.command import CANNOT_RUN, INTERRUPTED, OK, make_folder
from vtprune_loadtest.config import LoadTestConfig
from vtprune_loadtest.errors import LoadTestError
from vtprune_loadtest.options import parse_options
from vtprune_loadtest.plots import write_plots
from vtprune_loadtest.progress import TerminalProgress
from vtprune_loadtest.questions import DataError
from vtprune_loadtest.report import error_samples, render
from vtprune_loadtest.results import build_document, error_share
from vtprune_loadtest.session import Progress, SessionResult, run_session

TOO_MANY_ERRORS = 1


def main(argv: Sequence[str] | None = None, prog: str = "vtprune loadtest") -> int:
    """Run one load test from command-line arguments; gives the exit status."""
    try:
        config = parse_options(argv, prog)
        if config.result_dir is not None:
            make_folder("--result-dir", config.result_dir)
        session = run_load_test(config)
    except (LoadTestError, DataError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return CANNOT_RUN
    document = build_document(config, session)
    records = [record for point in session.points for phase in point.phases for record in phase.records]
    failures = ((r.error_kind, r.error_message or "") for r in records if r.error_kind is not None)
    # Files first: a reader that closes the pipe early, such as head, must not cost the results.
    written = (
        _write(config.result_dir, config.plots, session, document) if config.result_dir is not None else []
    )
    print(render(document, error_samples(failures), config.server_counters))
    for path in written:
        print(f"wrote {path}")
    if session.interrupted:
        return INTERRUPTED
    share = error_share(document)
    if share > config.max_error_share:
        print(
            f"{prog}: {share:.1%} of the measured requests failed, more than --max-error-share allows "
            f"({config.max_error_share:.1%}).",
            file=sys.stderr,
        )
        return TOO_MANY_ERRORS
    return OK


def run_load_test(config: LoadTestConfig) -> SessionResult:
    """Run a load test to its end or to the first Ctrl-C; a second one kills the program as usual.

    Raises:
        LoadTestError: the test cannot run.
    """
    progress = TerminalProgress() if config.progress else None
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_run(config, progress or Progress()))
    finally:
        if progress is not None:
            progress.close()


async def _run(config: LoadTestConfig, progress: Progress) -> SessionResult:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop.set()

    # Only the main thread may take signals; elsewhere the caller decides what stops it.
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
        loop.add_signal_handler(signal.SIGINT, interrupt)
    return await run_session(config, progress, stop)


def _loop_factory() -> Any:
    """Make loops with uvloop where it is installed, as it is beside vLLM: it costs less per chunk."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _write(folder: Path, plots: bool, session: SessionResult, document: dict[str, Any]) -> list[Path]:
    """result.json, requests.jsonl (one line per request, warm-up included) and the plots."""
    result, requests = folder / "result.json", folder / "requests.jsonl"
    result.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with requests.open("w", encoding="utf-8") as lines:
        for point in session.points:
            for phase in point.phases:
                lines.writelines(json.dumps(record.as_json()) + "\n" for record in phase.records)
    written = [result, requests]
    if plots:
        try:
            written += write_plots(document, folder)
        except ImportError:
            print("No plots: matplotlib is not installed (pip install 'vtprune[bench]').", file=sys.stderr)
    return written


if __name__ == "__main__":
    sys.exit(main())
