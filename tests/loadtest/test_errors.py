# SPDX-License-Identifier: Apache-2.0
"""The load tester over real HTTP when things go wrong, or the server is a plain one."""

import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.helpers.fake_chat import Failure, FakeChat
from tests.helpers.loadtest_runs import run
from vtprune_loadtest.__main__ import main


def test_errors_are_counted_by_kind(
    fake: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failures: dict[int, Failure] = {1: 503, 3: "cut", 5: "event", 7: 503}
    fake.fail = failures.get
    status, document, _ = run(fake, tmp_path, "--num-prompts", "10", "--concurrency", "1")
    assert status == 1
    entry = document["results"][0]
    assert entry["errors_by_kind"] == {"http_503": 2, "disconnected": 1, "stream_error": 1}
    assert (entry["completed"], entry["failed"]) == (6, 4)
    assert entry["total_output_tokens"] == 18, "tokens of failed requests do not count"
    output = capsys.readouterr()
    assert "refused with 503" in output.out and "the engine is gone" in output.out
    assert "40.0% of the measured requests failed" in output.err
    fake.reset()
    fake.fail = lambda number: {1: 503}.get(number)
    allowed = run(fake, tmp_path, "--num-prompts", "10", "--concurrency", "1", "--max-error-share", "0.1")
    assert allowed[0] == 0


def test_a_setting_the_server_refuses_stops_the_run(
    fake: FakeChat, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--base-url", fake.url, "--sweep", "off,bogus", "--image-size", "32", "--warmup", "1"]
    assert main(arguments) == 2
    assert "'bogus' failed" in capsys.readouterr().err
    assert len(fake.bodies) == 2


def test_unreachable_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base-url", "http://127.0.0.1:9"]) == 2
    error = capsys.readouterr().err
    assert "cannot be reached" in error and "--base-url" in error


def test_timeouts_are_errors(fake: FakeChat, tmp_path: Path) -> None:
    fake.prefill_s = 5
    status, document, _ = run(fake, tmp_path, "--num-prompts", "2", "--concurrency", "2", "--timeout", "0.1")
    assert status == 1
    assert document["results"][0]["errors_by_kind"] == {"timeout": 2}


def test_plain_server_has_no_pruning_columns(
    fake: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.prunes, fake.usage, fake.owner = False, False, "someone"
    status, document, _ = run(fake, tmp_path, "--num-prompts", "2", "--no-include-usage")
    assert status == 0
    entry = document["results"][0]
    assert entry["total_output_tokens"] == 6, "counted by chunks"
    assert not any(key.startswith(("vision", "kv_")) for key in entry)
    output = capsys.readouterr()
    assert "vision" not in output.out
    assert output.err == "", "no progress bar where standard error is no terminal"
    assert any("no usage" in note for note in document["notes"])
    assert all("ignore_eos" not in body and "stream_options" not in body for body in fake.bodies)


def test_a_terminal_gets_a_progress_bar(
    fake: FakeChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    fake.fail = lambda number: {2: 500}.get(number)
    run(fake, tmp_path, "--num-prompts", "4", "--concurrency", "1", "--max-error-share", "1")
    assert "4/4" in terminal.getvalue() and "1 failed" in terminal.getvalue()
    shown = len(terminal.getvalue())
    run(fake, tmp_path, "--num-prompts", "4", "--no-progress", "--max-error-share", "1")
    assert len(terminal.getvalue()) == shown


def test_interrupt_reports_what_was_measured(
    fake: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt_after_five() -> None:
        while len(fake.bodies) < 5:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    fake.prefill_s = 0.02
    thread = threading.Thread(target=interrupt_after_five)
    thread.start()
    status, document, _ = run(fake, tmp_path, "--num-prompts", "1000", "--concurrency", "1")
    thread.join()
    assert status == 130
    assert document["interrupted"]
    assert 3 <= document["results"][0]["completed"] < 1000
    assert document["results"][0]["failed"] == 0
    assert "req/s" in capsys.readouterr().out
