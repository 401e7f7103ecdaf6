# SPDX-License-Identifier: Apache-2.0
"""An operator's server: two API processes, a key, a policy from file, environment and flags; its shutdown."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import MODEL_NAME, LiveServer, start_server, stop_server
from tests.helpers.client import CHAT, chat_body, metric
from tests.helpers.pictures import data_url, scene
from vllm_vtprune.contract import LEVEL_HEADER

pytestmark = pytest.mark.engine

KEY = {"Authorization": "Bearer a-key"}
POLICY = """\
default_preset: balanced
max_aggressiveness: 0.6
min_tokens: 7
methods: [inflection, topk]
max_images: 2
max_body_mb: 50
auto_calm_s: 0.5
"""
#: The variable of `tests.helpers.server_under_load`, which sets this process up for a server when imported.
LOAD_FILE = "TEST_LOAD_FILE"
IDLE, OVERLOADED = {"waiting": 0}, {"waiting": 50, "kv_use": 0.99}


def tell_load(path: Path, load: dict[str, float]) -> None:
    """Replace the file at once: the server reads it meanwhile."""
    path.with_suffix(".new").write_text(json.dumps(load))
    path.with_suffix(".new").replace(path)


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("operator")
    (folder / "policy.yaml").write_text(POLICY)
    tell_load(folder / "load.json", IDLE)
    live = start_server(
        folder / "server.log",
        "serve",
        *("--vtprune-config", str(folder / "policy.yaml")),
        *("--vtprune-max-body-mb", "1"),
        *("--vtprune-max-image-megapixels", "2"),
        *("--api-server-count", "2"),
        *("--max-num-batched-tokens", "160"),
        module="tests.helpers.server_under_load",
        env={
            "VLLM_API_KEY": "a-key",
            "VTPRUNE_MIN_KEEP_RATIO": "0.2",
            "VTPRUNE_MAX_IMAGES": "3",
            LOAD_FILE: str(folder / "load.json"),
        },
    )
    yield live
    stop_server(live)


@pytest.fixture(scope="module")
def client(operated: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=operated.url, headers=KEY, timeout=60) as client:
        yield client


def chat(client: httpx.Client, *images: Any, **fields: Any) -> httpx.Response:
    return client.post(CHAT, json=chat_body(*(images or (scene(),)), **fields))


def sentence(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


def test_flag_over_environment_over_file(client: httpx.Client) -> None:
    policy, limits = (client.get("/vtprune/config").json()[part] for part in ("policy", "limits"))
    assert (limits["max_images"], limits["max_body_mb"], limits["max_image_megapixels"]) == (3, 1, 2)
    assert policy["default_preset"] == "balanced"  # file
    assert policy["min_keep_ratio"] == 0.2  # environment
    assert "50 MiB" not in (text := sentence(chat(client, "data:," + "A" * 2**20), 413)) and "1 MiB" in text
    assert "3" in sentence(chat(client, *[scene()] * 4))  # environment over file


def test_the_default_preset_and_its_floor(client: httpx.Client) -> None:
    assert 7 <= int(chat(client).headers["X-VTPrune-Vision-Tokens-Kept"]) < 144
    least = chat(client, vtprune={"aggressiveness": 0.6})
    assert int(least.headers["X-VTPrune-Vision-Tokens-Kept"]) >= 7


def test_caps_are_named(client: httpx.Client) -> None:
    assert "0.6" in sentence(chat(client, vtprune={"aggressiveness": 0.7}))
    assert "0.2" in sentence(chat(client, vtprune={"keep_ratio": 0.1}))
    assert "topk" in sentence(chat(client, vtprune={"method": "random"}))
    assert "pixels" in sentence(chat(client, scene().resize((2000, 1500))))


def test_only_presets_within_the_caps_are_models(client: httpx.Client) -> None:
    names = [card["id"] for card in client.get("/v1/models").json()["data"]]
    # nothing asked for means balanced here, so the name for pruning nothing is listed too
    within = ("off", "light", "balanced", "auto")
    assert names == [MODEL_NAME, *(f"{MODEL_NAME}{by}{p}" for by in (":", "--") for p in within)]
    assert chat(client, model=f"{MODEL_NAME}:off").headers["X-VTPrune-Vision-Tokens-Kept"] == "144"
    assert chat(client, model=f"{MODEL_NAME}:aggressive").status_code == 404


@pytest.mark.parametrize("path", ["/health", "/metrics", "/version", "/openapi.json", "/ping"])
def test_probes_need_no_key(operated: LiveServer, path: str) -> None:
    assert httpx.get(operated.url + path, timeout=30).status_code == 200


@pytest.mark.parametrize(
    "method,path",
    [
        ("GET", "/v1/models"),
        ("POST", CHAT),
        ("POST", "/v1/responses"),
        ("POST", "/v1/messages"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/invocations"),
        ("GET", "/vtprune/config"),
        ("POST", "/vtprune/explain"),
        ("POST", "//tokenize"),
        ("POST", "/tokenize/"),
        ("POST", "/nothing"),
    ],
)
@pytest.mark.parametrize("key", [{}, {"Authorization": "Bearer another"}, {"Authorization": "a-key"}])
def test_everything_else_does(operated: LiveServer, method: str, path: str, key: dict[str, str]) -> None:
    response = httpx.request(method, operated.url + path, headers=key, json={}, timeout=30)
    assert response.status_code == 401


def test_counters_of_both_processes_add_up(operated: LiveServer, client: httpx.Client) -> None:
    names = ("vision_tokens", "vision_tokens_kept", "kv_tokens", "kv_tokens_kept")
    before = {name: metric(operated.url, f"vtprune_{name}_total") for name in names}

    def one(index: int) -> dict[str, int]:
        # a connection each, so that both processes get some
        response = httpx.post(
            operated.url + CHAT,
            json=chat_body(scene(index), model=f"{MODEL_NAME}:{('off', 'light', 'balanced')[index % 3]}"),
            headers=KEY,
            timeout=120,
        )
        usage: dict[str, int] = response.json()["usage"]["vtprune"]
        return usage

    with ThreadPoolExecutor(6) as pool:
        usages = list(pool.map(one, range(24)))
    grown = {name: metric(operated.url, f"vtprune_{name}_total") - before[name] for name in names}
    assert grown == {name: sum(usage[name] for usage in usages) for name in names}


def test_a_prompt_longer_than_a_step_is_served_whole(operated: LiveServer, client: httpx.Client) -> None:
    before = metric(operated.url, "vtprune_requests_unpruned_total", '"too_long"')
    response = chat(client, vtprune={"preset": "off", "kv_keep": 0.5})
    usage = response.json()["usage"]["vtprune"]
    assert usage["kv_tokens_kept"] == usage["kv_tokens"] > 144
    assert metric(operated.url, "vtprune_requests_unpruned_total", '"too_long"') == before + 1
    fits = chat(client, vtprune={"keep_ratio": 0.5, "kv_keep": 0.5}).json()["usage"]["vtprune"]
    assert fits["kv_tokens_kept"] < fits["kv_tokens"]


def auto_answers(operated: LiveServer, level: str) -> httpx.Response:
    """Ask with `auto`, a connection each so that both processes get some, until each is at that level."""
    deadline = time.monotonic() + 60
    alike = 0
    while True:
        response = httpx.post(
            operated.url + CHAT,
            json=chat_body(scene()),
            headers=KEY | {"X-VTPrune-Preset": "auto"},
            timeout=60,
        )
        assert response.status_code == 200, response.text
        assert response.headers[LEVEL_HEADER] in ("off", "light", "balanced")
        alike = alike + 1 if response.headers[LEVEL_HEADER] == level else 0
        if alike == 8:
            return response
        assert time.monotonic() < deadline, f"auto stays at {response.headers[LEVEL_HEADER]}"


def test_auto_follows_the_load_and_says_which_preset_it_was(
    operated: LiveServer, client: httpx.Client
) -> None:
    load_file = Path(operated.log).parent / "load.json"
    requests = "vtprune_auto_requests_total"
    before = metric(operated.url, requests, '"balanced"')
    kept = "X-VTPrune-Vision-Tokens-Kept"
    assert auto_answers(operated, "off").headers[kept] == "144"
    tell_load(load_file, OVERLOADED)
    pruned = auto_answers(operated, "balanced")
    named = chat(client, vtprune={"preset": "balanced"})
    assert pruned.headers[kept] == named.headers[kept] != "144"
    assert LEVEL_HEADER not in named.headers
    assert metric(operated.url, requests, '"balanced"') >= before + 8
    assert metric(operated.url, "vtprune_auto_level") == 2
    assert metric(operated.url, "vtprune_auto_pressure") == pytest.approx(50 / 8)
    assert metric(operated.url, "vtprune_auto_moves_total", '"up"') >= 4
    # what cannot stand a dropped prompt is served, whatever the load
    answered = chat(client, vtprune={"preset": "auto"}, prompt_logprobs=1, max_tokens=1)
    assert answered.status_code == 200, answered.text
    usage = answered.json()["usage"]["vtprune"]
    assert usage["kv_tokens_kept"] == usage["kv_tokens"] and usage["vision_tokens_kept"] < 144
    tell_load(load_file, IDLE)
    assert auto_answers(operated, "off").headers[kept] == "144"


def test_explain_obeys_the_policy(client: httpx.Client) -> None:
    body = {"image_url": data_url(scene()), "vtprune": {"aggressiveness": 0.9}}
    assert "0.6" in sentence(client.post("/vtprune/explain", json=body))


def test_told_to_stop_it_finishes_what_it_began(operated: LiveServer) -> None:
    """Last: the server is gone afterwards."""
    begun = threading.Event()
    answers: list[Any] = []

    def stream() -> None:
        body = chat_body(scene(), stream=True, max_tokens=300, min_tokens=300, ignore_eos=True)
        with httpx.stream("POST", operated.url + CHAT, json=body, headers=KEY, timeout=120) as response:
            events = []
            for line in response.iter_lines():
                events.append(line)
                begun.set()
            answers.append([line for line in events if line])

    reader = threading.Thread(target=stream)
    reader.start()
    assert begun.wait(60)
    operated.process.send_signal(signal.SIGTERM)
    reader.join(90)
    assert answers, "the stream broke off without its end"
    assert answers[0][-1] == "data: [DONE]"
    finished = [json.loads(line.removeprefix("data: ")) for line in answers[0] if line.startswith("data: {")]
    assert finished[-1]["choices"][0]["finish_reason"] == "length"
    assert operated.process.wait(90) == 0
    log = Path(operated.log).read_text(errors="replace")
    assert "Traceback" not in log
    time.sleep(0.2)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{operated.url}/health", timeout=5)
