# SPDX-License-Identifier: Apache-2.0
"""A load test that would mislead says so: caches that answer for the server, a server that does not prune."""

import json
from pathlib import Path

import pytest

from tests.helpers.fake_chat import FakeChat
from tests.helpers.loadtest_runs import pictures
from tests.helpers.loadtest_runs import run as run_with_seed
from vtprune_loadtest.__main__ import main
from vtprune_loadtest.caches import cache_use
from vtprune_loadtest.record import RequestRecord, Role

SMALL = ["--image-size", "32", "--output-len", "2", "--warmup", "1", "--num-prompts", "6", "--no-plots"]


def run(fake: FakeChat, *arguments: str) -> int:
    return main(["--base-url", fake.url, *SMALL, *arguments])


def test_pictures_differ_from_run_to_run_unless_a_seed_is_given(fake: FakeChat) -> None:
    assert run(fake) == run(fake) == 0
    sent = [picture for body in fake.bodies for picture in pictures(body)]
    assert len(set(sent)) == len(sent) == 14
    fake.reset()
    assert run(fake, "--seed", "5") == run(fake, "--seed", "5") == 0
    sent = [picture for body in fake.bodies for picture in pictures(body)]
    assert len(set(sent)) == 7 and sorted(sent[:7]) == sorted(sent[7:])


def test_the_seed_of_a_run_can_be_asked_for_again(fake: FakeChat, tmp_path: Path) -> None:
    assert run(fake, "--result-dir", str(tmp_path)) == 0
    seed = json.loads((tmp_path / "result.json").read_text())["arguments"]["seed"]
    first = sorted(picture for body in fake.bodies for picture in pictures(body))
    fake.reset()
    assert run(fake, "--seed", str(seed)) == 0
    assert sorted(picture for body in fake.bodies for picture in pictures(body)) == first


def test_cache_hits_nobody_asked_for_are_a_note_and_in_the_json(
    fake: FakeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.counts_caches = True
    _, document, _ = run_with_seed(fake, tmp_path, "--num-prompts", "10", "--concurrency", "1")
    use = document["load_points"][0]["cache_use"]
    assert (use["pictures_sent"], use["picture_cache_hits"], use["beyond_what_was_asked"]) == (10, 0, False)
    assert "caches" not in capsys.readouterr().out
    _, document, _ = run_with_seed(fake, tmp_path, "--num-prompts", "10", "--concurrency", "1")
    use = document["load_points"][0]["cache_use"]
    assert (use["picture_cache_hits"], use["beyond_what_was_asked"]) == (10, True)
    assert any("caches answered more than was asked for" in note for note in document["notes"])
    assert "it had 10 already" in " ".join(capsys.readouterr().out.split())


def test_cache_hits_that_were_asked_for_are_no_surprise(fake: FakeChat, tmp_path: Path) -> None:
    fake.counts_caches = True
    repeats = ["--num-prompts", "20", "--concurrency", "1", "--repeat-share", "0.5"]
    _, document, _ = run_with_seed(fake, tmp_path, *repeats)
    use = document["load_points"][0]["cache_use"]
    assert use["picture_cache_hits"] == use["pictures_repeated"] == 10
    assert not use["beyond_what_was_asked"]


def record(images: int = 1, repeated: int = 0) -> RequestRecord:
    return RequestRecord("r", "off", Role.MEASURED, 0, 0, images, repeated, 1, 0.0, 0.0)


@pytest.mark.parametrize(("hits", "beyond"), [(0, False), (400, False), (800, True), (10_000, True)])
def test_a_prefix_longer_than_a_chat_templates_is_beyond(hits: int, beyond: bool) -> None:
    counters = {
        'vllm:prefix_cache_hits_total{engine="0"}': float(hits),
        'vllm:prefix_cache_queries_total{engine="0"}': 10_000.0,
    }
    use = cache_use(counters, [record() for _ in range(10)])
    assert use is not None and use["beyond_what_was_asked"] is beyond
    asked = cache_use(counters, [record(repeated=1) for _ in range(10)])
    assert asked is not None and not asked["beyond_what_was_asked"]


def test_a_server_without_such_counters_tells_nothing() -> None:
    assert cache_use({"other_total": 3.0}, [record()]) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sweep", "off,balanced"],
        ["--sweep-header", "X-VTPrune-Keep-Ratio=1,0.22"],
        ["--header", "X-VTPrune-Preset=balanced"],
        ["--extra-body", '{"vtprune": {"preset": "balanced"}}'],
    ],
)
@pytest.mark.parametrize("warmup", ["0", "1"])
def test_a_sweep_against_a_server_that_does_not_prune_stops(
    arguments: list[str], warmup: str, fake: FakeChat, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.prunes = False
    assert run(fake, *arguments, "--warmup", warmup) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert f"{fake.url} is not a vtprune server" in output.err and "vtprune serve" in output.err
    assert not any(pictures(body) for body in fake.bodies if isinstance(body["messages"][0]["content"], list))


def test_a_page_for_every_path_is_no_vtprune_server(
    fake: FakeChat, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.prunes, fake.answers_everything = False, True
    assert run(fake, "--sweep", "off,balanced") == 2
    assert "is not a vtprune server" in capsys.readouterr().err


def test_a_vtprune_server_behind_a_proxy_is_known_by_its_answers(fake: FakeChat) -> None:
    fake.hides_config = True
    assert run(fake, "--sweep", "off,balanced") == 0


def test_other_headers_may_be_swept_on_any_server(fake: FakeChat) -> None:
    fake.prunes = False
    assert run(fake, "--sweep-header", "X-Team=a,b") == 0
    assert run(fake) == 0
