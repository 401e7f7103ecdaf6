# SPDX-License-Identifier: Apache-2.0
"""What a load test prints, over real HTTP: read at 80 columns, the ratio to the first setting first."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.fake_chat import FakeChat
from tests.helpers.loadtest_runs import run
from vtprune_loadtest.columns import columns
from vtprune_loadtest.comparison import in_groups, ratio_to_first
from vtprune_loadtest.record import RequestRecord, Role
from vtprune_loadtest.report import number, render

BLOCKS = ("--interleave", "blocks", "--concurrency", "2")


def table(output: str) -> list[list[str]]:
    """The first table's cells, header and rows."""
    lines = output.split("==\n", 1)[1].split("\n\n", 1)[0].splitlines()
    return [[cell for cell in line.split("  ") if cell] for line in lines]


@pytest.mark.parametrize("arguments", [BLOCKS, ("--rate", "100", "--concurrency", "4", "--slo", "ttft:1000")])
def test_eight_settings_are_read_at_eighty_columns(
    arguments: tuple[str, ...], fake: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["--sweep", "light,aggressive", "--sweep-header", "X-VTPrune-KV-Keep=1,0.5"]
    sweep += ["--sweep-header", "X-VTPrune-Method=inflection_diverse,divprune", "--num-prompts", "8"]
    status, document, _ = run(fake, tmp_path, *sweep, *arguments)
    assert status == 0 and len(document["results"]) == 8
    printed = capsys.readouterr().out.split("wrote ")[0].splitlines()
    assert max(len(line) for line in printed) <= 80
    for entry in document["results"]:
        assert any(line.startswith(entry["setting"]) for line in printed)


def test_the_ratio_to_the_first_setting_comes_first_with_its_interval(
    fake: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, document, _ = run(fake, tmp_path, "--sweep", "off,balanced", "--num-prompts", "12", *BLOCKS)
    first, second = document["results"]
    assert "ratio_to_first" not in first
    rates = [[phase["request_throughput"] for phase in entry["phases"]] for entry in (first, second)]
    ratios = [after / before for before, after in zip(*rates, strict=True)]
    ratio = second["ratio_to_first"]
    assert (ratio["of"], ratio["piece"], ratio["pieces"]) == ("request_throughput", "round", 6)
    found = [ratio[name] for name in ("low", "median", "high")]
    assert found == pytest.approx([min(ratios), np.median(ratios), max(ratios)])
    header, off, balanced = table(capsys.readouterr().out)
    assert header[1].strip() == "vs off" and off[1].strip() == "1"
    shown = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    assert balanced[1].strip() == shown and balanced[-1].strip() == "22.0%"


@pytest.mark.parametrize(
    ("load", "measure"),
    [
        (["--concurrency", "4"], "request_throughput_at_equal_concurrency"),
        (["--rate", "200"], "mean_e2el_ms"),
    ],
)
def test_settings_that_take_turns_are_compared_in_groups_of_requests(
    load: list[str], measure: str, fake: FakeChat, tmp_path: Path
) -> None:
    """In a closed loop the longer a setting's requests stay, the lower its throughput alone."""
    fake.prefill_of = {"off": 0.03, "balanced": 0.01}
    _, document, lines = run(fake, tmp_path, "--sweep", "off,balanced", "--num-prompts", "24", *load)
    ratio = document["results"][1]["ratio_to_first"]
    assert (ratio["of"], ratio["piece"], ratio["pieces"]) == (measure, "group", 6)
    by_setting = [[line for line in lines if line["setting"] == name] for name in ("off", "balanced")]
    times: list[Any] = []
    for own in by_setting:
        own.sort(key=lambda line: float(line["intended_s"]))
        stay = [
            line["e2el_ms"] if measure == "mean_e2el_ms" else line["done_s"] - line["sent_s"] for line in own
        ]
        times.append(np.reshape(stay, (6, 4)).mean(1))
    ratios = times[1] / times[0] if measure == "mean_e2el_ms" else times[0] / times[1]
    found = [ratio[name] for name in ("low", "median", "high")]
    assert found == pytest.approx([ratios.min(), np.median(ratios), ratios.max()], rel=1e-3)


def test_counters_of_the_server_are_printed_on_request_alone(
    fake: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(fake, tmp_path, "--num-prompts", "2")
    assert "vllm:" not in capsys.readouterr().out
    run(fake, tmp_path, "--num-prompts", "2", "--server-counters")
    assert "vllm:generation_tokens_total  6" in capsys.readouterr().out


def test_every_column_is_defined_below_the_tables(
    fake: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(fake, tmp_path, "--sweep", "off,light", "--num-prompts", "4", "--concurrency", "1")
    output = capsys.readouterr().out
    for name in ("vs", "req/s", "TTFT", "TPOT", "ITL", "E2EL", "vision"):
        assert f"\n{name:<8} " in output
    assert "\ngoodput" not in output, "no column of that name was printed"


def test_what_has_no_meaning_is_a_dash(fake: FakeChat, tmp_path: Path) -> None:
    """A model without valid text until its end: all tokens in one chunk, so no time per token was seen."""
    fake.one_chunk = True
    _, document, lines = run(fake, tmp_path, "--num-prompts", "3", "--output-len", "8")
    assert document["results"][0]["total_output_tokens"] == 24
    assert document["results"][0]["mean_tpot_ms"] is None and "tpot_ms" not in lines[0]
    (row,) = table(render(document, {}))[1:]
    assert row[3].strip() == "-"
    assert number(None) == "-"


def request(at: float, done: float | None) -> RequestRecord:
    times = [] if done is None else [done]
    fields: dict[str, Any] = {"images": 0, "repeated_images": 0, "max_tokens": 1, "token_times_s": times}
    fields["error_kind"] = "timeout" if done is None else None
    return RequestRecord(
        "r", "off", Role.MEASURED, 0, 0, intended_s=at, sent_s=at, done_s=done or at, **fields
    )


@pytest.mark.parametrize(("count", "groups"), [(0, 1), (3, 1), (8, 2), (43, 10), (1000, 10)])
def test_groups_hold_consecutive_requests_and_lose_none(count: int, groups: int) -> None:
    records = [request(float(at), at + 1.0) for at in reversed(range(count))]
    found = in_groups(records)
    assert len(found) == groups
    assert [record for group in found for record in group] == records[::-1]
    if count >= 8:
        assert min(map(len, found)) >= 4


def test_a_piece_without_an_answer_has_no_ratio() -> None:
    ratio = ratio_to_first("x", "round", [2.0, 0.0, 2.0], [1.0, 1.0, float("nan")])
    assert ratio is not None and (ratio["pieces"], ratio["median"]) == (1, 2.0)
    assert ratio_to_first("x", "round", [0.0], [1.0]) is None


def test_a_label_too_long_for_its_column_has_a_line_of_its_own() -> None:
    rows = [["short", "1", "2"], ["x" * 75, "3", "4"]]
    assert columns(["name", "a", "bb"], rows) == ["name   a  bb", "short  1   2", "x" * 75, "       3   4"]
