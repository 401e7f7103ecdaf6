# SPDX-License-Identifier: Apache-2.0
"""Presets by model name."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.conftest import MODEL_NAME
from tests.helpers.client import CHAT, chat_body, messages_body, post
from tests.helpers.pictures import data_url, scene

pytestmark = pytest.mark.engine

BALANCED = f"{MODEL_NAME}:balanced"


def kept(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    return int(response.headers["X-VTPrune-Vision-Tokens-Kept"])


@pytest.fixture(scope="module")
def by_preset(server: str) -> dict[str, int]:
    """Tokens kept of the scene under each preset, asked for by header."""
    presets = ("off", "light", "balanced", "aggressive")
    return {p: kept(post(server, chat_body(scene()), {"X-VTPrune-Preset": p})) for p in presets}


def test_the_names_are_listed(server: str) -> None:
    names = [card["id"] for card in httpx.get(f"{server}/v1/models").json()["data"]]
    presets = ("light", "balanced", "aggressive", "auto")
    assert names == [MODEL_NAME, *(f"{MODEL_NAME}{by}{p}" for by in (":", "--") for p in presets)]


def test_asking_for_a_name_applies_its_preset(server: str, by_preset: dict[str, int]) -> None:
    assert by_preset["off"] > by_preset["balanced"] >= by_preset["aggressive"]
    for preset in ("light", "balanced", "aggressive"):
        for separator in (":", "--"):
            response = post(server, chat_body(scene(), model=f"{MODEL_NAME}{separator}{preset}"))
            assert kept(response) == by_preset[preset]


def test_header_over_body_over_name(server: str, by_preset: dict[str, int]) -> None:
    body = chat_body(scene(), model=f"{MODEL_NAME}:aggressive", vtprune={"preset": "balanced"})
    assert kept(post(server, body)) == by_preset["balanced"]
    assert kept(post(server, body, {"X-VTPrune-Preset": "off"})) == by_preset["off"]
    # field by field: the name's preset holds for what header and body leave open
    method = post(server, chat_body(scene(), model=BALANCED), {"X-VTPrune-Method": "random"})
    assert kept(method) == by_preset["balanced"]


PICTURE = data_url(scene())
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions/batch": {"messages": [chat_body(scene())["messages"]], "max_tokens": 2},
    "/v1/messages": messages_body(scene(), "what ?", max_tokens=2),
    "/v1/responses": {
        "max_output_tokens": 2,
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": PICTURE}]}],
    },
    "/tokenize": {"messages": chat_body(scene())["messages"]},
    "/invocations": {"messages": chat_body(scene())["messages"], "max_tokens": 2},
}


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_takes_the_names(server: str, by_preset: dict[str, int], path: str) -> None:
    assert kept(post(server, {**ROUTES[path], "model": BALANCED}, path=path)) == by_preset["balanced"]


def test_a_preset_drops_in_the_decoder_at_the_first_turn_alone(server: str) -> None:
    """On every route that holds conversations; what a request names itself holds at every turn."""
    later = [{"role": "assistant", "content": "red"}, {"role": "user", "content": "and its shape ?"}]
    for path in (CHAT, "/v1/messages", "/v1/responses", "/invocations"):
        body = {**(chat_body(scene()) if path == CHAT else ROUTES[path]), "model": BALANCED}
        key = "input" if "input" in body else "messages"
        first = post(server, body, path=path)
        second = post(server, {**body, key: [*body[key], *later]}, path=path)
        assert kept(first) == kept(second), path
        for response, drops in ((first, True), (second, False)):
            below, above = (int(response.headers[f"X-VTPrune-KV-Tokens{end}"]) for end in ("", "-Kept"))
            assert (above < below) == drops, path
        asked = post(server, {**body, key: [*body[key], *later]}, {"X-VTPrune-KV-Keep": "0.5"}, path=path)
        assert int(asked.headers["X-VTPrune-KV-Tokens-Kept"]) < int(asked.headers["X-VTPrune-KV-Tokens"])
    # an answer that the model is to continue is not an earlier one
    body = chat_body(scene(), model=BALANCED, add_generation_prompt=False, continue_final_message=True)
    continued = post(server, {**body, "messages": [*body["messages"], later[0]]})
    assert int(continued.headers["X-VTPrune-KV-Tokens-Kept"]) < int(continued.headers["X-VTPrune-KV-Tokens"])


@pytest.mark.parametrize(
    "name",
    [f"{MODEL_NAME}:nope", f"{MODEL_NAME}:", f"{MODEL_NAME}-balanced", "other:balanced", f"{BALANCED}:off"],
)
def test_any_other_name_is_vllms_404(server: str, name: str) -> None:
    response = post(server, chat_body(scene(), model=name), path=CHAT)
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"
