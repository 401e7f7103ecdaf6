# SPDX-License-Identifier: Apache-2.0
"""Paired statistics, the count of operations, and the bound on speed-up."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from benchmarks import __main__ as short_version
from benchmarks import compare, interleaved, kv_drop, models, roofline, scaling
from benchmarks.arms import parse_arms
from benchmarks.bands import equal_cost, prefill_flops
from benchmarks.interleaved import Block, LoadRounds, TrafficSpec, connected
from benchmarks.kv_drop_engine import EngineSample
from benchmarks.llava import DecoderShape
from benchmarks.qwen import WindowTower, random_qwen2_5_vl
from benchmarks.roofline import MachineLimits, bound
from benchmarks.rounds import Rounds
from benchmarks.servers import PLAIN, PRUNING, RunningServer, sum_in
from tests.benchmarks.conftest import DECODER, TOWER
from tests.conftest import REPOSITORY
from tests.helpers.fake_chat import serve_fake_chat
from vllm_vtprune.kv_drop.ratings import ITERATIONS, Bucket
from vllm_vtprune.kv_drop.relevance import RELEVANCE
from vllm_vtprune.kv_drop.schedule import PruneLayer, check
from vtprune_eval.flops import CostShape, RequestShape, Work, kv_bytes, rating_flops, request_work
from vtprune_loadtest.errors import LoadTestError
from vtprune_loadtest.processes import ServerProcess
from vtprune_loadtest.spread import Spread


def test_a_towers_seconds_are_read_and_a_server_without_one_has_none() -> None:
    name = "vtprune_tower_seconds_sum"
    assert sum_in(f"vtprune_tower_seconds_count 3.0\n{name} 1.25\n", name) == 1.25
    assert sum_in(f'{name}{{pid="1"}} 1\n{name}{{pid="2"}} 2', name) == 3
    assert np.isnan(sum_in("vllm:num_requests_running 0", name))


def block(**fields: float) -> Block:
    names = Block.__dataclass_fields__
    return Block(**{name: fields.get(name, 1.0) for name in names})


def test_ratios_are_taken_within_rounds() -> None:
    """The machine slows down tenfold over the rounds; the ratio does not notice."""
    slow = np.geomspace(1, 10, 9)
    rounds = LoadRounds(["vllm", "off"], 1, 1)
    rounds.blocks["vllm"] = [block(e2el_s=s) for s in slow]
    rounds.blocks["off"] = [block(e2el_s=1.02 * s) for s in slow]
    spread = Spread.of(rounds.ratios("off", "e2el_s"))
    assert spread.median == pytest.approx(1.02) and spread.high - spread.low < 1e-9
    assert spread.rounds == 9


@pytest.mark.parametrize(("rounds", "rank"), [(1, 0), (2, 0), (5, 0), (6, 0), (9, 1), (20, 5), (100, 39)])
def test_confidence_interval_of_the_median(rounds: int, rank: int) -> None:
    """Ranks from tables of the binomial distribution (sign test, 95 %)."""
    values = np.random.default_rng(0).permutation(rounds).astype(float)
    spread = Spread.of(values)
    assert (spread.low, spread.high) == (rank, rounds - 1 - rank)


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = [s.low <= 0 <= s.high for s in (Spread.of(rng.standard_cauchy(25)) for _ in range(2000))]
    assert 0.94 < np.mean(covered) < 0.98


def test_operations_are_those_that_torch_counts(tiny: Path) -> None:
    """Against torch's own counter on transformers' model, which computes the whole attention square."""
    shape = CostShape.of(tiny)
    model = LlavaForConditionalGeneration.from_pretrained(tiny, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        features = model.model.get_image_features(pixel_values=torch.randn(1, 3, 56, 56)).pooler_output[0]
    work = request_work(shape, RequestShape(images=1, text_tokens=0, kept=16, output=1))
    # transformers runs the layer above the feature layer too
    layer = 4 * TOWER.hidden**2 + 2 * TOWER.hidden * TOWER.intermediate
    extra = 2 * 17 * layer + 4 * 17**2 * TOWER.hidden
    # the patch embedding makes no CLS token
    expected = work["tower"].flops - 2 * shape.patch_inputs * TOWER.hidden + extra + work["projector"].flops
    assert counter.get_total_flops() == expected
    assert features.shape == (16, DECODER.hidden)

    tokens = 40
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.model.language_model(torch.zeros(1, tokens, dtype=torch.long))
    prefill = request_work(shape, RequestShape(images=0, text_tokens=tokens, kept=0, output=1))["prefill"]
    head = 2 * DECODER.hidden * DECODER.vocab
    triangle = 4 * shape.q_width * tokens * (tokens + 1) / 2 * DECODER.layers
    square = 4 * shape.q_width * tokens**2 * DECODER.layers
    assert counter.get_total_flops() == prefill.flops - head - triangle + square


def test_a_qwen_s_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    """64 units of 4 patches, in four whole windows."""
    decoder = DecoderShape(hidden=64, intermediate=96, layers=2, heads=4, vocab=300, kv_heads=2)
    tower = WindowTower(hidden=32, intermediate=48, layers=3, heads=2)
    random_qwen2_5_vl(tmp_path, decoder, tower, vision_tokens=64)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager").eval()
    grid, values = torch.tensor([[1, 16, 16]]), torch.randn(256, 1176)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        features = model.model.get_image_features(values, grid).pooler_output[0]
    assert features.shape == (64, 64)
    shape = CostShape.of(tmp_path, 64)
    work = request_work(shape, RequestShape(images=1, text_tokens=0, kept=64, output=1))
    assert counter.get_total_flops() == work["tower"].flops + work["projector"].flops
    with pytest.raises(LoadTestError, match="with the arm `off`"):
        CostShape.of(tmp_path)


@pytest.mark.parametrize("name", ["attention", "no_rope", "last_token", "pagerank"])
def test_ratings_are_counted_as_they_run(name: str) -> None:
    heads, kv_heads, size, tokens, window = 4, 2, 8, 70, 6
    shape = CostShape(0, 0, 0, 0, 0, 32, 64, 2, heads * size, kv_heads * size, 8, 4)
    bucket = Bucket(tokens, torch.tensor([0]), torch.tensor([tokens]), torch.tensor([9]))
    relevance = RELEVANCE[name]
    queries = relevance.queries(window)
    q, k = torch.randn(tokens, heads, size), torch.randn(tokens, kv_heads, size)
    with FlopCounterMode(display=False) as counter:
        relevance.rating(q, k, bucket, queries, 1.0)
    # ranks times weights, a head's size less than the logits, are left out
    flow = ITERATIONS * 2 * heads * tokens**2 if name == "pagerank" else 0
    assert counter.get_total_flops() - flow == rating_flops(shape, name, tokens, window)
    assert rating_flops(shape, "inherited", tokens, window) == 0


def test_decoding_counts_each_step(tiny: Path) -> None:
    shape = CostShape.of(tiny)
    one, three = (
        request_work(shape, RequestShape(images=0, text_tokens=10, kept=0, output=n))["decode"]
        for n in (1, 3)
    )
    assert (one.flops, one.bytes) == (0, 0)
    weights = shape.layers * shape.layer_weights + shape.hidden * shape.vocab
    attention = 4 * shape.q_width * shape.layers * (11 + 12)
    assert three.flops == 2 * 2 * weights + attention
    # keys and values of 11 and 12 tokens are touched (read, or written for the new one), and one written each
    values = 2 * shape.kv_width * shape.layers * (11 + 12 + 2)
    assert three.bytes == 4 * (2 * weights + values)


def test_a_batch_shares_the_weights_and_nothing_else(tiny: Path) -> None:
    shape, request = CostShape.of(tiny), RequestShape(images=1, text_tokens=10, kept=16, output=5)
    alone, together = (request_work(shape, request, batch)["decode"] for batch in (1, 16))
    weights = 4 * (shape.layers * shape.layer_weights + shape.hidden * shape.vocab) * 4
    assert together.flops == alone.flops
    assert alone.bytes - together.bytes == pytest.approx(weights * 15 / 16)


def test_pruning_bounds() -> None:
    shape = CostShape(576, 588, 256, 1024, 7, 1024, 2816, 12, 1024, 1024, 512, 4)
    machine = MachineLimits(peak_flops=1e11, bandwidth=2e10)
    full = RequestShape(images=1, text_tokens=60, kept=576, output=16)
    assert bound(shape, full, full, machine, 4) == 1
    limits = [bound(shape, full, replace(full, kept=kept), machine, 4) for kept in (576, 288, 127, 1)]
    assert limits == sorted(limits)
    assert limits[-1] < 576  # what pruning does not touch bounds it
    stage1 = replace(full, kept=127)
    both = replace(stage1, bands=((4, stage1.prompt / 2),))
    assert bound(shape, full, both, machine, 4) > limits[2]
    nothing_dropped = replace(stage1, bands=((4, stage1.prompt),))
    assert bound(shape, full, nothing_dropped, machine, 4) == pytest.approx(limits[2])
    exit_too = replace(both, bands=(*both.bands, (8, 60)))
    assert bound(shape, full, exit_too, machine, 4) > bound(shape, full, both, machine, 4)


def test_bands_add_up_layer_by_layer() -> None:
    shape = CostShape(576, 588, 256, 1024, 7, 1024, 2816, 12, 1024, 512, 512, 4)
    request = RequestShape(images=1, text_tokens=60, kept=576, output=1, bands=((4, 300), (8, 60)))
    assert kv_bytes(shape, request) == 4 * (636 + 300 + 60) * 2 * 512 * 4

    def one_layer(tokens: float) -> float:
        alone = replace(shape, layers=1)
        return request_work(alone, RequestShape(1, 60, tokens - 60, 1))["prefill"].flops

    head = 2 * shape.hidden * shape.vocab
    expected = 4 * sum(one_layer(tokens) - head for tokens in (636, 300, 60)) + head
    assert request_work(shape, request)["prefill"].flops == expected


def test_the_bound_of_an_arm_counts_its_bands() -> None:
    full = RequestShape(images=1, text_tokens=60, kept=576, output=16)
    counted = {"vision_tokens_kept": 127.0, "kv_tokens_kept": 90.0}
    arms = ("keep0.22", "keep0.22+kv0.5", "keep0.22@pyramid")
    found = [roofline._request(counted, full, 4, arm, 12) for arm in arms]
    assert {request.prompt for request in found} == {187}
    assert [request.bands for request in found] == [
        (),
        ((4, 90.0),),
        ((3, 60 + 64), (6, 60 + 32), (9, 60 + 16)),
    ]


@pytest.mark.parametrize("borders", [1, 2, 3, 4])
def test_more_prune_layers_cost_the_same(borders: int) -> None:
    shape = CostShape(576, 588, 256, 1024, 7, 1024, 2816, 12, 1024, 1024, 512, 4)
    budget = prefill_flops(shape, 67, 576, (PruneLayer(4, 0.5, "vision"),))
    schedule = equal_cost(shape, 67, 576, borders, budget)
    check(schedule)
    assert len(schedule) == borders
    assert prefill_flops(shape, 67, 576, schedule) <= budget
    # a token is a thousandth of the prompt
    assert prefill_flops(shape, 67, 576, schedule) > 0.995 * budget


def test_the_roofline_is_the_slower_of_two() -> None:
    assert Work(flops=10, bytes=1).seconds(peak_flops=5, bandwidth=1) == 2
    assert Work(flops=10, bytes=9).seconds(peak_flops=5, bandwidth=1) == 9


def test_growth_varies_one_axis_at_a_time() -> None:
    base = scaling.Point("", 0)
    for point in scaling.POINTS:
        same = [
            getattr(point, name) == getattr(base, name)
            for name in ("images", "patches", "output_len", "concurrency")
        ]
        assert sum(same) >= 3
    assert {p.value for p in scaling.POINTS if p.axis == "images per prompt"} == {1, 2, 4, 8}


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RunningServer]]:
    """Two fakes under the names of vLLM's server and ours; the first takes twice as long for a token.

    They have no workers that poll once they idle, so blocks need not rest, nor be long.
    """
    monkeypatch.setattr(interleaved, "REST_S", 0.0)
    monkeypatch.setattr(interleaved, "_MIN_BLOCK_S", 0.3)
    with serve_fake_chat() as slow, serve_fake_chat() as fast:
        slow.prefill_s = slow.token_s = 0.02
        fast.prefill_s = fast.token_s = 0.01
        slow.prunes = False
        process: Any = SimpleNamespace(pid=os.getsid(0))
        yield [
            RunningServer(spec, ServerProcess(chat.url, process, Path(os.devnull)))
            for spec, chat in ((PLAIN, slow), (PRUNING, fast))
        ]


def at(server: RunningServer, url: str) -> RunningServer:
    return replace(server, process=replace(server.process, url=url))


def measured(servers: list[RunningServer], runs: int = 1, **options: Any) -> LoadRounds:
    async def run() -> LoadRounds:
        traffic = TrafficSpec(output_len=3, picture_size=(32, 32))
        async with connected(parse_arms("vllm,off"), servers, "fake", traffic) as comparison:
            for _ in range(runs):
                rounds = await comparison.run(2, seconds=0, **options)
            return rounds

    return asyncio.run(run())


def test_a_comparison_end_to_end(servers: list[RunningServer], capsys: pytest.CaptureFixture[str]) -> None:
    rounds = measured(servers, min_rounds=4)
    assert [len(blocks) for blocks in rounds.blocks.values()] == [4, 4]
    assert rounds.requests_per_block % 2 == 0
    assert 0.3 < Spread.of(rounds.ratios("off", "e2el_s")).median < 0.9
    assert np.isnan(rounds.values("vllm", "vision_tokens_kept")).all()
    assert (rounds.values("off", "vision_tokens_kept") == 100).all()

    arms = parse_arms("vllm,off")
    document = compare.as_json(rounds, arms)
    json.dumps(document, allow_nan=False)
    assert document["arms"]["off"]["ratio"]["requests_per_s"]["median"] > 1.2
    lines = compare.table("fake", rounds, arms).splitlines()
    assert lines[3].split()[:2] == ["vllm", "all"] and lines[4].split()[:2] == ["off", "100"]
    assert lines[-1].startswith("plugin loaded and off: end-to-end latency -")

    model = replace(models.demo(), name="fake")
    traffic = {"images": 1, "output_len": 3}
    for arm in document["arms"].values():
        arm["median"]["prompt_tokens"] = 160.0
    shares = roofline.report(model, {"2": document}, traffic, MachineLimits(1e11, 1e10))["2"]
    assert shares["vllm"]["bound"] == shares["vllm"]["share"] == 1
    assert shares["off"]["share"] == pytest.approx(shares["off"]["measured"] / shares["off"]["bound"])
    assert "of the gain" in capsys.readouterr().out


def test_no_picture_is_sent_twice(servers: list[RunningServer]) -> None:
    with serve_fake_chat() as chat:
        both = [at(server, chat.url) for server in servers]
        measured(both, runs=2, min_rounds=2, max_rounds=2)
        pictures = [body["messages"][0]["content"][0]["image_url"]["url"] for body in chat.bodies]
    assert len(pictures) > 8 and len(set(pictures)) == len(pictures)


def test_blocks_are_long_enough_to_be_warm() -> None:
    assert interleaved.block_size(1, lone_request_s=0.2) == 8
    assert interleaved.block_size(4, lone_request_s=0.2) == 32
    assert interleaved.block_size(1, lone_request_s=3.0) == 1
    assert interleaved.block_size(16, lone_request_s=3.0) == 16


def test_some_arms_may_sit_out(servers: list[RunningServer]) -> None:
    rounds = measured(servers, only=("vllm",), min_rounds=1, max_rounds=1)
    assert list(rounds.blocks) == rounds.labels == ["vllm"]


def test_the_short_version_names_arms_that_it_has() -> None:
    for part in short_version.PARTS:
        labels = {arm.label for arm in parse_arms(part.arms)}
        for concurrency, only in part.only.items():
            assert concurrency in part.seconds and set(only) <= labels


def test_a_failing_request_ends_the_comparison(servers: list[RunningServer]) -> None:
    with serve_fake_chat() as chat:
        chat.fail = lambda number: 500
        with pytest.raises(LoadTestError, match="off failed: http_500"):
            measured([servers[0], at(servers[1], chat.url)])


@pytest.mark.parametrize("arguments", [["--concurrency", "0"], ["--arms", "off"], ["--model", "gpt"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(arguments) == 2
    assert capsys.readouterr().err.startswith("python -m benchmarks.compare: ")


def test_another_checkout_is_compared_round_by_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = SimpleNamespace(prune_layer=2)
    compared = kv_drop.arms(model, [1.0, 0.5], "/before")
    assert [(arm.keep, arm.checkout) for arm in compared.values()] == [
        (1.0, ""),
        *((share, checkout) for share in (1.0, 0.5) for checkout in ("", "/before")),
    ]
    rounds: Rounds[EngineSample] = Rounds(list(compared))
    for drift in (1.0, 2.0, 4.0):  # of the machine, from round to round
        for label, arm in compared.items():
            slower = 1.0 if arm.checkout else 1.25
            rounds.blocks[label].append(EngineSample(drift * slower, drift, 100 / drift / slower, 1.0))
    lines = kv_drop.table_against(rounds).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["kv_keep", "1"], ["kv_keep", "0.5"]]
    for line in lines[1:]:
        assert re.findall(r"(\d\.\d{3}) \(", line) == ["1.250", "1.000", "0.800"]
    for arguments, sentence in (
        (["--against", str(tmp_path)], "must be a checkout of vtprune"),
        (["--against", str(REPOSITORY), "--borders", "1,2"], "leave out --borders"),
    ):
        assert kv_drop.main(arguments) != 0
        assert sentence in capsys.readouterr().err
