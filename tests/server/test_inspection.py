# SPDX-License-Identifier: Apache-2.0
"""`/vtprune/config` and `/vtprune/explain`."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from PIL import Image

from tests.conftest import DEMO_MODEL, MODEL_NAME
from tests.helpers.client import chat_body, metric, post
from tests.helpers.pictures import data_url, noise, scene
from vllm_vtprune.fingerprint import fingerprint
from vtprune_eval.flops import CostShape
from vtprune_server.limits import ServerLimits
from vtprune_server.options import OperatorSettings

pytestmark = pytest.mark.engine

N = 144


def explain(
    server: str,
    image: Image.Image,
    headers: Any = None,
    client: httpx.Client | None = None,
    **settings: Any,
) -> dict[str, Any]:
    body = {"image_url": data_url(image), "vtprune": settings}
    response = post(server, body, headers, path="/vtprune/explain", client=client)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_config_tells_policy_and_model(server: str) -> None:
    config = httpx.get(f"{server}/vtprune/config", timeout=30).json()
    model = config["model"]
    assert model["id"] == MODEL_NAME
    assert model["architecture"] == "LlavaForConditionalGeneration"
    assert model["grid"] == [model["image_size"] // model["patch_size"]] * 2
    assert model["grid"][0] * model["grid"][1] == model["vision_tokens_per_image"] == N
    assert model["prune_layer"] == config["policy"]["prune_layer"]
    assert model["prune_layer"] is None or 1 <= model["prune_layer"] < model["decoder_layers"]
    assert config["policy"]["default_preset"] in config["presets"]
    assert model["default_method"] in config["methods"]
    assert model["presets_calibrated"] is True
    assert "inflection" in config["methods"] and config["reads_question"] == ["cdpruner"]
    assert config["auto"]["levels"] == ["off", "light", "balanced"]
    assert model["weights"] == fingerprint(str(DEMO_MODEL))
    shape, whole = CostShape.of_decoder(model["decoder"]), CostShape.of(DEMO_MODEL)
    assert shape.layer_weights == whole.layer_weights
    assert (shape.layers, shape.kv_width, shape.element) == (whole.layers, whole.kv_width, whole.element)
    assert config["versions"]["vllm"] == "0.32.0"
    assert config["policy"].keys() | config["limits"].keys() == OperatorSettings.model_fields.keys()
    assert config["limits"] == ServerLimits().model_dump(mode="json")


SETTINGS: list[dict[str, Any]] = [
    {},
    {"aggressiveness": 0.5},
    {"aggressiveness": 1},
    {"preset": "balanced"},
    {"keep_ratio": 0.3},
    {"aggressiveness": 0.4, "method": "divprune"},
    {"keep_ratio": 0.2, "method": "prumerge"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_it_explains_what_serving_does(server: str, settings: dict[str, Any]) -> None:
    told = explain(server, scene(), **settings)
    served = post(server, chat_body(scene(), vtprune=settings)).json()["usage"]["vtprune"]
    assert told["vision_tokens"] == served["vision_tokens"] == N
    assert told["vision_tokens_kept"] == served["vision_tokens_kept"]
    # methods that merge add tokens that stand for several patches; all others keep patches as they are
    if settings.get("method") != "prumerge":
        assert sum(told["kept"]) == served["vision_tokens_kept"]
    assert {k: told["settings"][k] for k in settings} == settings


def test_the_curve_and_its_cut(server: str) -> None:
    told = explain(server, scene(), aggressiveness=0.5)
    scores, order, curve, cut = told["scores"], told["order"], told["curve"], told["cut"]
    assert len(scores) == len(curve) == len(told["kept"]) == N
    assert sorted(order) == list(range(N))
    assert [scores[i] for i in order] == sorted(scores, reverse=True)
    low, high = min(scores), max(scores)
    assert curve == pytest.approx([(scores[i] - low) / (high - low) for i in order], abs=1e-6)
    # the knee: the point of the normalised curve farthest below the chord
    objective = [y + k / (N - 1) for k, y in enumerate(curve)]
    assert cut == min(range(N), key=lambda k: (objective[k], k)) + 1
    assert {i for i in range(N) if told["kept"][i]} == set(order[:cut])


@pytest.mark.parametrize("settings", [{}, {"keep_ratio": 0.5}])
def test_no_cut_where_no_inflection_point_decides(server: str, settings: dict[str, Any]) -> None:
    assert explain(server, scene(), **settings)["cut"] is None


def test_a_header_wins(server: str) -> None:
    told = explain(server, scene(), {"X-VTPrune-Keep-Ratio": "0.25"}, preset="balanced")
    assert told["vision_tokens_kept"] == N // 4
    assert told["settings"]["keep_ratio"] == 0.25


@pytest.mark.parametrize(
    "size,crop",
    [((168, 168), (0, 0, 1, 1)), ((400, 200), (0.25, 0, 0.5, 1)), ((100, 400), (0, 0.375, 1, 0.25))],
)
def test_the_part_of_the_picture_the_grid_covers(server: str, size: Any, crop: Any) -> None:
    told = explain(server, noise(1).resize(size))
    assert told["image_size"] == list(size)
    assert [told["crop"][k] for k in ("left", "top", "width", "height")] == pytest.approx(crop, abs=0.01)


def test_the_tower_runs_once_for_both(server: str) -> None:
    image = noise(20260)
    before = metric(server, "vtprune_tower_batch_size_sum")
    with httpx.Client() as client:  # each API process has a tower
        explain(server, image, client=client, aggressiveness=0.5)
        assert metric(server, "vtprune_tower_batch_size_sum") == before + 1
        post(server, chat_body(image, vtprune={"aggressiveness": 0.3}), client=client)
        explain(server, image, client=client, aggressiveness=0.7)
    assert metric(server, "vtprune_tower_batch_size_sum") == before + 1


@pytest.mark.parametrize(
    "body,param",
    [
        ({"image_url": "data:image/png;base64,AAAA"}, "image_url"),
        ({"image_url": "http://127.0.0.1/x.png"}, "image_url"),
        ({"image_url": ""}, "body.image_url"),
        ({}, "body.image_url"),
        ({"image_url": data_url(scene()), "vtprune": {"nope": 1}}, "vtprune.nope"),
        ({"image_url": data_url(scene()), "vtprune": {"aggressiveness": 2}}, "vtprune.aggressiveness"),
    ],
)
def test_bad_input_is_named(server: str, body: Any, param: str) -> None:
    response = post(server, body, path="/vtprune/explain")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_it_explains_a_question_as_serving_reads_it(server: str) -> None:
    settings = {"method": "cdpruner", "keep_ratio": 0.2}

    def kept(question: str) -> list[bool]:
        body = {"image_url": data_url(scene()), "vtprune": settings, "question": question}
        told: list[bool] = post(server, body, path="/vtprune/explain").json()["kept"]
        return told

    chosen = [kept(q) for q in ("what color is the circle ?", "how many red squares are there ?", "")]
    assert [sum(kept_of) for kept_of in chosen] == [29] * 3
    assert chosen[0] != chosen[1] and kept("  what color is the  circle ?") == chosen[0]
    plain = explain(server, scene(), **settings)
    assert plain["kept"] == chosen[2], "without a question the score decides"
