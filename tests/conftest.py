# SPDX-License-Identifier: Apache-2.0
"""Environment of all tests, and the one live server they share."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# before any test module imports vLLM or transformers
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
if "PYTEST_XDIST_WORKER" in os.environ:
    # workers share the cores; threads that wait for each other would spin on them
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import hypothesis
import pytest

from vllm_vtprune import demo_model
from vllm_vtprune.error_text import withhold_everywhere
from vtprune_loadtest.processes import ServerProcess as LiveServer

# how fast the machine is decides no test
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO_MODEL = demo_model.FOLDER
MODEL_NAME = "vtprune-demo"
_START_SECONDS = 600
#: Lines that fixtures leave for the end of the report, by `tell_at_the_end`.
_TOLD: list[str] = []
#: In PYTHONPATH: engines sleep while they wait.
SITE = REPOSITORY / "tests" / "helpers" / "site"


def python_path(*folders: Path) -> str:
    """PYTHONPATH of processes that start engines."""
    given = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([*map(str, (SITE, *folders)), *filter(None, [given])])


#: Servers start from this: an engine configuration made in the test process changes variables of its own.
_ENVIRONMENT = {**os.environ, "PYTHONPATH": python_path()}
#: Names the socket of a process that servers are forked from (tests/helpers/site/warm_start.py).
WARM = "VTPRUNE_TEST_WARM"


def tell_at_the_end(config: pytest.Config, lines: list[str]) -> None:
    """Have these lines printed below the report, from a worker too."""
    if (output := getattr(config, "workeroutput", None)) is not None:
        output["told"] = output.get("told", []) + lines
    else:
        _TOLD.extend(lines)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a worker told."""
    _TOLD.extend(getattr(node, "workeroutput", {}).get("told", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print it."""
    for line in _TOLD:
        terminalreporter.write_line(line)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out files, some of them together."""
    if config.getvalue("dist") != "loadfile":
        return None
    from tests.helpers.scheduling import UnitScheduling

    return UnitScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first where there are workers to wait for them."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        from tests.helpers.scheduling import longest_first

        longest_first(items)


def start_server(
    log: Path, *arguments: str, module: str = "vtprune_server.cli", env: dict[str, str] | None = None
) -> LiveServer:
    """Start ``python -m vtprune_server.cli serve ARGUMENTS`` and wait until it is healthy."""
    command = [sys.executable, "-m", module, *(["serve"] if module.endswith("cli") else []), *arguments]
    warm = {WARM: os.environ[WARM]} if WARM in os.environ else {}
    return LiveServer.start(command, log, {**_ENVIRONMENT, **warm, **(env or {})}, within_s=_START_SECONDS)


def stop_server(server: LiveServer) -> None:
    """Stop the process and whatever it started."""
    server.stop()


@pytest.fixture(scope="session")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The server of `vtprune serve` without arguments: the embedded model, real engine, real HTTP.

    VTPRUNE_TEST_URL names one that runs already: the same model behind something else than `vtprune serve`.
    """
    if url := os.environ.get("VTPRUNE_TEST_URL"):
        yield LiveServer(url, None, Path(os.devnull))
        return
    server = start_server(tmp_path_factory.mktemp("server") / "server.log")
    yield server
    stop_server(server)


@pytest.fixture(scope="session")
def server(live_server: LiveServer) -> str:
    """The live server's base URL."""
    return live_server.url


@pytest.fixture(autouse=True)
def _root_level() -> None:
    """The root logger says warnings: where a test has built vLLM's server it is left at ERROR."""
    root = logging.getLogger()
    root.setLevel(min(root.level, logging.WARNING))


@pytest.fixture
def withheld() -> Iterator[None]:
    """Records are made without the text of errors, as in a process that serves requests."""
    factory = logging.getLogRecordFactory()
    withhold_everywhere()
    yield
    logging.setLogRecordFactory(factory)
