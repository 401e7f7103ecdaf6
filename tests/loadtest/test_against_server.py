# SPDX-License-Identifier: Apache-2.0
"""The load tester over real HTTP, against a small chat server that behaves exactly as told."""

import hashlib
import io
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.fake_chat import KEPT, PROMPT_TOKENS, FakeChat
from tests.helpers.loadtest_runs import pictures, presets, run
from vtprune_loadtest.__main__ import main


def test_sweep_is_balanced_and_reads_pruning_from_the_usage(fake: FakeChat, tmp_path: Path) -> None:
    status, document, lines = run(
        fake,
        tmp_path,
        "--sweep",
        "off,light,balanced",
        "--num-prompts",
        "6",
        "--concurrency",
        "2",
        "--warmup",
        "1",
    )
    assert status == 0
    assert Counter(presets(fake)) == {"off": 7, "light": 7, "balanced": 7}
    order = [
        line["setting"] for line in sorted(lines, key=lambda line: int(line["request_id"].split("-")[-1]))
    ]
    for start in range(0, 21, 3):
        assert set(order[start : start + 3]) == {"off", "light", "balanced"}, (
            "a block holds every setting once"
        )
    assert order != order[:3] * 7, "blocks are shuffled"
    assert Counter(line["role"] for line in lines) == {"warmup": 3, "measured": 18}
    for entry in document["results"]:
        kept = KEPT[entry["setting"]]
        assert (entry["completed"], entry["failed"]) == (6, 0)
        assert (entry["vision_tokens"], entry["vision_tokens_kept"]) == (600, 6 * kept)
        assert entry["vision_tokens_kept_share"] == kept / 100
        assert entry["total_output_tokens"] == 18
        assert entry["total_input_tokens"] == 6 * PROMPT_TOKENS
        assert entry["total_input_tokens_before_pruning"] == 6 * (PROMPT_TOKENS + 100 - kept)
        assert "kv_tokens" not in entry
    assert document["load_points"][0]["server_metrics"] == {"vllm:generation_tokens_total": 54.0}
    assert any("took turns" in note for note in document["notes"])


def test_blocks_measure_one_setting_at_a_time(fake: FakeChat, tmp_path: Path) -> None:
    arguments = ["--sweep", "off,aggressive", "--interleave", "blocks", "--rounds", "3", "--num-prompts", "7"]
    status, document, lines = run(fake, tmp_path, *arguments, "--concurrency", "2")
    assert status == 0
    by_phase: dict[int, set[str]] = {}
    spans: dict[int, list[float]] = {}
    for line in lines:
        by_phase.setdefault(line["phase"], set()).add(line["setting"])
        spans.setdefault(line["phase"], []).extend((line["sent_s"], line["done_s"]))
    assert len(by_phase) == 6
    assert all(len(settings) == 1 for settings in by_phase.values())
    assert all(max(spans[i]) <= min(spans[i + 1]) for i in range(5)), (
        "a phase starts after the last has drained"
    )
    assert all(len(by_phase[i] | by_phase[i + 1]) == 2 for i in (0, 2, 4)), (
        "each round has every setting once"
    )
    for entry in document["results"]:
        assert [phase["completed"] for phase in entry["phases"]] == [2, 2, 3]
        duration = sum(phase["duration"] for phase in entry["phases"])
        assert entry["duration"] == pytest.approx(duration)
        assert entry["request_throughput"] == pytest.approx(7 / duration)
        assert entry["server_metrics"] == {"vllm:generation_tokens_total": 21.0}


def test_latencies_leave_out_the_role_chunk(fake: FakeChat, tmp_path: Path) -> None:
    fake.prefill_s, fake.token_s = 0.08, 0.02
    _, document, lines = run(fake, tmp_path, "--num-prompts", "3", "--concurrency", "1", "--output-len", "6")
    for line in lines:
        # A timer fires early by its granularity of 1 ms at most, so the lower bounds are safe.
        assert line["ttft_ms"] >= 79
        assert len(line["itl_ms"]) == 5
        assert line["e2el_ms"] >= 79 + 5 * 19
        assert line["e2el_ms"] == pytest.approx(line["ttft_ms"] + sum(line["itl_ms"]), abs=0.01)
        assert line["tpot_ms"] == pytest.approx(sum(line["itl_ms"]) / 5, abs=0.01)
    assert document["results"][0]["mean_ttft_ms"] >= 79


def test_cap_makes_requests_wait_in_the_client(fake: FakeChat, tmp_path: Path) -> None:
    fake.prefill_s = 0.05
    arguments = ["--rate", "100", "--concurrency", "2", "--num-prompts", "12", "--arrivals", "constant"]
    _, document, lines = run(fake, tmp_path, *arguments, "--slo", "e2el:10000,ttft:10000")
    entry = document["results"][0]
    assert fake.peak <= 2
    assert entry["max_concurrent_requests"] == 2
    # 12 requests of 50 ms through 2 slots need 300 ms, and the last one arrives after 120 ms.
    assert max(line["client_queue_time_ms"] for line in lines) > 100
    assert entry["mean_e2el_including_client_queue_ms"] == pytest.approx(
        entry["mean_e2el_ms"] + entry["mean_client_queue_time_ms"]
    )
    assert entry["request_goodput"] == entry["request_throughput"]
    intended = sorted(line["intended_s"] for line in lines)
    assert intended[-1] - intended[0] == pytest.approx(11 / 100, abs=1e-5)


def test_duration_and_ramp(fake: FakeChat, tmp_path: Path) -> None:
    fake.prefill_s = 0.02
    status, document, lines = run(fake, tmp_path, "--duration", "0.5", "--ramp", "0.3", "--concurrency", "3")
    assert status == 0
    ramp = [line for line in lines if line["role"] == "ramp"]
    measured = [line for line in lines if line["role"] == "measured"]
    assert ramp and measured
    due = [line["intended_s"] for line in measured]
    assert max(due) - min(due) <= 0.5
    assert min(due) - min(line["intended_s"] for line in ramp) >= 0.3 - 1e-3
    assert document["results"][0]["completed"] == len(measured)
    assert document["results"][0]["duration"] >= 0.49


def test_request_contents(fake: FakeChat, tmp_path: Path) -> None:
    arguments = [
        "--sweep",
        "off,light",
        "--num-prompts",
        "20",
        "--images-per-prompt",
        "1-3",
        "--output-len",
        "1-9",
    ]
    run(
        fake,
        tmp_path,
        *arguments,
        "--prompt-words",
        "4",
        "--extra-body",
        '{"top_k": 1}',
        "--header",
        "X-Team=a",
    )
    sent = [hashlib.sha256(picture).digest() for body in fake.bodies for picture in pictures(body)]
    assert len(sent) > 40 and len(set(sent)) == len(sent), "all pictures are distinct"
    assert len({body["messages"][0]["content"][-1]["text"] for body in fake.bodies}) > 30
    lengths: dict[str | None, list[tuple[int, int]]] = {"off": [], "light": []}
    for preset, body in zip(presets(fake), fake.bodies, strict=True):
        lengths[preset].append((body["max_tokens"], len(pictures(body))))
    assert sorted(lengths["off"]) == sorted(lengths["light"]), (
        "settings get the same lengths and picture counts"
    )
    assert {images for _, images in lengths["off"]} == {1, 2, 3}
    first = fake.bodies[0]
    assert (first["top_k"], first["ignore_eos"], first["stream_options"]) == (
        1,
        True,
        {"include_usage": True},
    )
    assert fake.headers[0]["x-team"] == "a"


def test_pictures_of_a_folder(fake: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        Image.new("RGB", (8, 8), (number * 40, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    folder = ["--images", str(tmp_path)]
    assert run(fake, tmp_path / "out", *folder, "--num-prompts", "3")[0] == 0
    files = {(tmp_path / f"{number}.png").read_bytes() for number in range(3)}
    assert {picture for body in fake.bodies for picture in pictures(body)} == files
    assert main(["--base-url", fake.url, *folder, "--num-prompts", "4", "--warmup", "0"]) == 2
    assert "3 distinct pictures" in capsys.readouterr().err
    assert run(fake, tmp_path / "out", *folder, "--num-prompts", "12", "--repeat-share", "0.75")[0] == 0


def test_result_has_the_keys_of_vllm_bench_serve(fake: FakeChat, tmp_path: Path) -> None:
    rates = [
        "--rate",
        "100,200",
        "--num-prompts",
        "6",
        "--slo",
        "ttft:1000,tpot:1000,e2el:1000",
        "--sweep",
        "off,light",
    ]
    _, document, _ = run(fake, tmp_path, *rates, plots=True)
    assert len(document["results"]) == 4
    for name in ("throughput", "latency_request_rate"):
        with Image.open(tmp_path / f"{name}.png") as plot:
            assert plot.width > 400
    keys = set(document["results"][0])
    metrics = ("ttft", "tpot", "itl", "e2el", "client_queue_time", "e2el_including_client_queue")
    statistics = {
        f"{name}_{metric}_ms" for metric in metrics for name in ("mean", "median", "std", "p90", "p95", "p99")
    }
    names = {
        "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts",
        "request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed",
        "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
        "output_throughput", "total_token_throughput", "max_output_tokens_per_s", "max_concurrent_requests",
    }  # fmt: skip
    assert statistics | names <= keys
    vllm = find_spec("vllm")
    if vllm is None or vllm.origin is None:
        pytest.skip("vLLM is not installed: nothing to compare the names with")
    source = (Path(vllm.origin).parent / "benchmarks" / "serve.py").read_text()
    missing = [name for name in names if f'"{name}"' not in source]
    assert not missing, "vLLM writes no such keys"


def test_rates_in_terms_of_the_capacity_and_the_levels_of_auto(
    fake: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.prefill_s = 0.02
    status, document, lines = run(
        fake,
        tmp_path,
        *("--sweep", "off,auto", "--interleave", "blocks", "--rounds", "1", "--num-prompts", "6"),
        *("--rate", "0.5x,2x"),
    )
    assert status == 0
    first, *points = document["load_points"]
    assert (first["request_rate"], first["max_concurrency"]) == ("inf", 16)
    (alone,) = (e for e in document["results"] if e["request_rate"] == "inf")
    assert alone["setting"] == "off" and alone["completed"] == 6
    capacity = alone["request_throughput"]
    assert [p["request_rate"] for p in points] == pytest.approx([0.5 * capacity, 2 * capacity], rel=1e-3)
    assert "(0.5 times capacity)" in points[0]["load"]
    autos = [e for e in document["results"] if e["setting"] == "auto"]
    assert [sum(e["levels"].values()) for e in autos] == [6, 6]
    assert set(autos[0]["levels"]) == {"off", "balanced"}
    assert {line.get("level") for line in lines if line["setting"] == "off"} == {None}
    assert "auto was off 50.0%, balanced 50.0% of the answers" in capsys.readouterr().out


def test_smaller_pictures_are_an_arm_of_their_own(fake: FakeChat, tmp_path: Path) -> None:
    status, document, _ = run(
        fake, tmp_path, *("--sweep", "off,downscale0.25", "--num-prompts", "3", "--image-format", "png")
    )
    assert status == 0
    assert presets(fake) == ["off"] * 6, "both ask for no pruning"
    sizes = [Image.open(io.BytesIO(data)).size for body in fake.bodies for data in pictures(body)]
    assert Counter(sizes) == {(32, 32): 3, (16, 16): 3}
    assert {e["setting"]: e["picture_pixels"] for e in document["results"]} == {
        "off": 1.0,
        "downscale0.25": 0.25,
    }


@pytest.mark.parametrize("preset", ["downscale", "downscale0", "downscale1", "downscalex"])
def test_a_share_of_the_pixels_lies_between_0_and_1(
    fake: FakeChat, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--base-url", fake.url, "--sweep", f"off,{preset}"]) == 2
    assert "like downscale0.22" in capsys.readouterr().err and not fake.bodies


def test_a_tower_of_one_size_takes_no_smaller_pictures(
    fake: FakeChat, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.tokens_per_image = 144
    assert main(["--base-url", fake.url, "--sweep", "off,downscale0.25", "--num-prompts", "2"]) == 2
    assert "one size, 144 tokens" in capsys.readouterr().err and not fake.bodies
