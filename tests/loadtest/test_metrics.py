# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the load tester, on records and byte streams written by hand."""

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune_loadtest.__main__ import main
from vtprune_loadtest.errors import LoadTestError
from vtprune_loadtest.metrics import at_equal_concurrency, parse_slo, summarise
from vtprune_loadtest.prometheus import add_counters, counter_deltas, parse_counters
from vtprune_loadtest.record import RequestRecord, Role
from vtprune_loadtest.sse import EventParser
from vtprune_loadtest.stream import ChatStream, StreamError


def record(sent: float, tokens: list[float], **changes: Any) -> RequestRecord:
    """A request sent at `sent` whose chunks came at `tokens`, one token each."""
    fields: dict[str, Any] = {
        "request_id": "r-0",
        "setting": "off",
        "role": Role.MEASURED,
        "load_point": 0,
        "phase": 0,
        "images": 1,
        "repeated_images": 0,
        "max_tokens": len(tokens),
        "intended_s": sent,
        "sent_s": sent,
        "done_s": tokens[-1] if tokens else sent,
        "token_times_s": tokens,
        "output_tokens": len(tokens),
        "prompt_tokens": 10,
    }
    return RequestRecord(**fields | changes)


def failed(sent: float, done: float, kind: str) -> RequestRecord:
    return record(sent, [], done_s=done, error_kind=kind, error_message="no")


def test_latencies_of_known_times() -> None:
    # Sent at 0: tokens at 0.1, 0.2, 0.4. Sent at 1: one token at 1.3.
    summary = summarise([record(0.0, [0.1, 0.2, 0.4]), record(1.0, [1.3])], 2.0, {}, is_open_loop=False)
    assert (summary["mean_ttft_ms"], summary["median_ttft_ms"]) == pytest.approx((200, 200))
    assert summary["mean_tpot_ms"] == pytest.approx(150), "the answer of one token has no TPOT"
    assert summary["mean_itl_ms"] == pytest.approx(150)
    assert summary["p99_itl_ms"] == pytest.approx(199)
    assert summary["mean_e2el_ms"] == pytest.approx(350)
    assert (summary["request_throughput"], summary["output_throughput"]) == (1.0, 2.0)
    assert summary["total_token_throughput"] == 12.0
    assert summary["request_goodput"] is None
    assert "mean_client_queue_time_ms" not in summary


def test_tpot_divides_by_tokens_and_not_by_chunks() -> None:
    summary = summarise([record(0.0, [0.1, 0.5], output_tokens=5)], 1.0, {}, is_open_loop=False)
    assert summary["mean_tpot_ms"] == pytest.approx(100)
    assert summary["mean_itl_ms"] == pytest.approx(400)
    assert summary["output_tokens_per_chunk"] == 2.5


def test_tokens_that_came_in_one_chunk_have_no_time_per_token() -> None:
    summary = summarise([record(0.0, [0.5], output_tokens=8)], 1.0, {"tpot": 1.0}, is_open_loop=False)
    assert summary["mean_tpot_ms"] is None
    assert summary["request_goodput"] == 1.0, "and keep a limit on it"


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=60))
def test_statistics_are_numpys(latencies: list[float]) -> None:
    summary = summarise([record(0.0, [latency]) for latency in latencies], 1.0, {}, is_open_loop=False)
    for percentile in (90, 95, 99):
        assert summary[f"p{percentile}_e2el_ms"] == pytest.approx(np.percentile(latencies, percentile) * 1000)
    assert summary["mean_e2el_ms"] == pytest.approx(np.mean(latencies) * 1000)
    assert summary["median_e2el_ms"] == pytest.approx(np.median(latencies) * 1000)
    assert summary["std_e2el_ms"] == pytest.approx(np.std(latencies) * 1000, abs=1e-6)


def test_failures_count_apart() -> None:
    records = [
        record(0.0, [0.1]),
        failed(0.0, 0.5, "timeout"),
        failed(0.2, 0.3, "timeout"),
        failed(0, 1, "http_500"),
    ]
    summary = summarise(records, 1.0, {}, is_open_loop=False)
    assert (summary["completed"], summary["failed"]) == (1, 3)
    assert summary["errors_by_kind"] == {"timeout": 2, "http_500": 1}
    assert summary["mean_ttft_ms"] == pytest.approx(100)
    assert summary["max_concurrent_requests"] == 4 - 1, "the first is answered before the third is sent"


def test_nothing_measured_is_none_and_not_zero() -> None:
    summary = summarise([failed(0, 1, "timeout")], 1.0, {"ttft": 1.0}, is_open_loop=False)
    assert summary["mean_ttft_ms"] is None and summary["p99_e2el_ms"] is None
    assert summary["request_throughput"] == 0
    assert summarise([], 0.0, {}, is_open_loop=False)["request_throughput"] is None


def test_goodput_wants_every_limit_kept() -> None:
    fast, slow_start, slow_tokens = record(0, [0.1, 0.2]), record(0, [0.6, 0.7]), record(0, [0.1, 0.9])
    one_token = record(0, [0.1])
    records = [fast, slow_start, slow_tokens, one_token]
    limits = {"ttft": 500.0, "tpot": 300.0}
    assert summarise(records, 2.0, limits, is_open_loop=False)["request_goodput"] == 1.0
    assert summarise(records, 2.0, {"e2el": 750.0}, is_open_loop=False)["request_goodput"] == 1.5


def test_waiting_in_the_client_counts_from_the_intended_arrival() -> None:
    waited = record(1.0, [1.1], intended_s=0.4)
    summary = summarise([waited], 1.0, {"ttft": 200.0}, is_open_loop=True)
    assert summary["mean_client_queue_time_ms"] == pytest.approx(600)
    assert summary["mean_ttft_ms"] == pytest.approx(100)
    assert summary["mean_e2el_including_client_queue_ms"] == pytest.approx(700)
    assert summary["request_goodput"] == 1.0
    assert summary["request_goodput_including_client_queue"] == 0.0


def test_pruning_sums() -> None:
    reports = [
        record(
            0,
            [0.1],
            vtprune={"vision_tokens": 100, "vision_tokens_kept": 20, "kv_tokens": 30, "kv_tokens_kept": 15},
        ),
        record(
            0,
            [0.1],
            vtprune={"vision_tokens": 50, "vision_tokens_kept": 40, "kv_tokens": 50, "kv_tokens_kept": 50},
        ),
    ]
    summary = summarise(reports, 1.0, {}, is_open_loop=False)
    assert (summary["vision_tokens"], summary["vision_tokens_kept"]) == (150, 60)
    assert (summary["kv_tokens"], summary["kv_tokens_kept"]) == (80, 65)
    assert summary["vision_tokens_kept_share"] == 0.4
    assert summary["total_input_tokens_before_pruning"] == 20 + 90
    assert "vision_tokens" not in summarise([record(0, [0.1])], 1.0, {}, is_open_loop=False)


def test_what_lies_above_each_prune_layer_is_summed_too() -> None:
    one = {"kv_tokens": 100, "kv_tokens_kept": 80, "kv_tokens_kept_by_layer": [80, 40, 10]}
    reports = [record(0, [0.1], vtprune=one), record(0, [0.1], vtprune=one), record(0, [0.1])]
    summary = summarise(reports, 1.0, {}, is_open_loop=False)
    assert summary["kv_tokens_kept_by_layer"] == [160, 80, 20]
    assert "kv_tokens_kept_by_layer" not in summarise(reports[2:], 1.0, {}, is_open_loop=False)


def test_peaks() -> None:
    summary = summarise([record(0.0, [0.5, 1.5, 1.6]), record(1.0, [1.7, 2.5])], 3.0, {}, is_open_loop=False)
    assert summary["max_output_tokens_per_s"] == 3
    assert summary["max_concurrent_requests"] == 2


def test_equal_concurrency_recovers_littles_law() -> None:
    # Two slots always busy for 12 s; one setting's requests take 1 s, the other's 2 s, eight of each.
    quick = summarise([record(i, [i + 1.0]) for i in range(8)], 12.0, {}, is_open_loop=False)
    slow = summarise([record(i, [i + 2.0]) for i in range(8)], 12.0, {}, is_open_loop=False)
    at_equal_concurrency([quick, slow])
    assert quick["request_throughput"] == slow["request_throughput"]
    assert quick["request_throughput_at_equal_concurrency"] == pytest.approx(2.0)
    assert slow["request_throughput_at_equal_concurrency"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "text", ["ttft", "ttft:", "ttft:0", "ttft:nan", "ttft:inf", "itl:5", "ttft:1,ttft:2", ""]
)
def test_bad_limits_are_refused(text: str) -> None:
    with pytest.raises(LoadTestError, match="--slo"):
        parse_slo(text)


def test_limits() -> None:
    assert parse_slo("ttft:500, e2el:2e3") == {"ttft": 500.0, "e2el": 2000.0}


STREAM = (
    b": ping\n\n"
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    b'data:{"choices":[{"delta":{"content":"gr\xc3\xbcn"}}]}\r\n\r\n'
    b'event: x\ndata: {"choices":[{"delta":{"content":""}}],\ndata: "x": 1}\n\n'
    b'data: {"choices":[{"delta":{"content":"."},"finish_reason":"stop"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":4,"vtprune":{"kv_tokens":9}}}\n\n'
    b"data: [DONE]\n\n"
)


@settings(deadline=None)
@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_a_stream_reads_the_same_however_it_is_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    stream = ChatStream()
    for start, end in pairwise(edges):
        stream.feed(STREAM[start:end], at=float(end))
    stream.finish()
    assert len(stream.token_times) == 3
    assert stream.finish_reason == "stop"
    assert stream.usage == {"prompt_tokens": 7, "completion_tokens": 4, "vtprune": {"kv_tokens": 9}}
    # Each chunk has the time of the read that completed it.
    ends = [STREAM.index(mark) + len(mark) for mark in (b"\r\n\r\n", b'"x": 1}\n\n', b'"stop"}]}\n\n')]
    assert stream.token_times == [float(min(edge for edge in edges if edge >= end)) for end in ends]


def test_events_keep_their_order_and_lines() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\ndata: b\n\ndata: c") == [b"a\nb"]
    assert parser.feed(b"\n\nid: 1\n\n") == [b"c"]


def chunk(**delta: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("delta", "is_output"),
    [
        ({"content": "a"}, True),
        ({"content": ""}, True),
        ({"role": "assistant", "content": "a"}, True),
        ({"reasoning": "a"}, True),
        ({"tool_calls": [{"index": 0}]}, True),
        ({"role": "assistant", "content": ""}, False),
        ({"role": "assistant"}, False),
        ({"content": None}, False),
        ({}, False),
    ],
)
def test_which_chunks_carry_output(delta: dict[str, Any], is_output: bool) -> None:
    stream = ChatStream()
    stream.feed(chunk(**delta), at=1.0)
    assert stream.token_times == ([1.0] if is_output else [])


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "truncated"),
        (chunk(content="a"), "truncated"),
        (b"data: [DONE]\n\n", "no_tokens"),
        (b"data: {broken\n\n", "bad_stream"),
        (b"data: [1]\n\n", "bad_stream"),
        (b'data: {"choices": [3]}\n\n', "bad_stream"),
        (b'data: {"choices": [{"delta": 5}]}\n\n', "bad_stream"),
        (b'data: {"error": {"message": "out of memory"}}\n\n', "stream_error"),
    ],
)
def test_broken_streams_have_a_kind(data: bytes, kind: str) -> None:
    stream = ChatStream()
    with pytest.raises(StreamError) as caught:
        stream.feed(data, at=0.0)
        stream.finish()
    assert caught.value.kind == kind


EXPOSITION = """\
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{model_name="m",engine="0"} 10.0
# TYPE vllm:prompt_tokens_created gauge
vllm:prompt_tokens_created{engine="0"} 1.7e9
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running 3.0
# TYPE vllm:e2e_seconds histogram
vllm:e2e_seconds_bucket{le="+Inf"} 4.0
vllm:e2e_seconds_count 4.0
vllm:e2e_seconds_sum 2.5
"""


def test_counters_before_and_after() -> None:
    before = parse_counters(EXPOSITION)
    prompt = 'vllm:prompt_tokens_total{engine="0",model_name="m"}'
    assert before == {prompt: 10.0, "vllm:e2e_seconds_count": 4.0, "vllm:e2e_seconds_sum": 2.5}
    after = before | {prompt: 17.0, "new_total": 2.0}
    assert counter_deltas(before, after) == {prompt: 7.0, "new_total": 2.0}
    assert add_counters([{"a": 1.0}, {"a": 2.0, "b": 5.0}]) == {"a": 3.0, "b": 5.0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "0"], "positive"),
        (["--rate", "1,1"], "twice"),
        (["--rate", "fast"], "'fast'"),
        (["--concurrency", "1.5"], "whole number"),
        (["--num-prompts", "0"], "1 or more"),
        (["--num-prompts", "5", "--duration", "5"], "exclude each other"),
        (["--repeat-share", "1"], "--repeat-share"),
        (["--max-error-share", "2"], "--max-error-share"),
        (["--image-size", "0x5"], "--image-size"),
        (["--images", "/nowhere"], "not a folder"),
        (["--extra-body", "[1]"], "JSON object"),
        (["--extra-body", "{"], "not JSON"),
        (["--extra-body", '{"stream": false}'], "stream"),
        (["--header", "X"], "NAME=VALUE"),
        (["--base-url", "localhost:8000"], "http://"),
        (["--output-len", "0"], "--output-len"),
        (["--slo", "itl:3"], "--slo"),
        (["--nonsense"], "--help"),
    ],
)
def test_bad_arguments_get_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1 and "Traceback" not in error
