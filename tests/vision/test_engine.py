# SPDX-License-Identifier: Apache-2.0
"""Stage 1 on the real engine, beside vLLM without the plugin: `LLM` offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig

from tests.conftest import DEMO_MODEL
from tests.helpers.checkpoints import random_llava
from tests.helpers.engine_process import saved_by
from tests.helpers.offline_run import PRUNED, UNPRUNED, pixel_values
from vllm_vtprune.families.base import Item
from vllm_vtprune.vision.encoder import VisionEncoder
from vllm_vtprune.vision.features import everything

pytestmark = pytest.mark.engine


def offline(plugins: str, out: Path, *arguments: str) -> dict[str, Any]:
    # the plugin's engine has processes of its own, as an offline user's; to see vLLM's answers one will do
    env = {"VLLM_PLUGINS": plugins, "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if plugins else "0"}
    return saved_by("tests.helpers.offline_run", str(out), *arguments, out=out, env=env)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return offline("", tmp_path_factory.mktemp("plain") / "out.pt")


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return offline("vtprune", tmp_path_factory.mktemp("plugin") / "out.pt")


def encoded(model: Path) -> list[torch.Tensor]:
    """Our embeddings of the fixed pixels."""
    config = LlavaConfig.from_pretrained(model)
    encoder = VisionEncoder.load(config, str(model), device=torch.device("cpu"), dtype=torch.float32)
    outputs = encoder.encode([Item({"pixel_values": values}) for values in pixel_values()])
    return [embeddings for embeddings, _ in encoder.project([everything(o) for o in outputs])]


def test_unpruned_embeddings_equal_vllms_own(plain: dict[str, Any]) -> None:
    """To 1e-5 of their scale: the demo model's embeddings are far above 1, where float32 steps by 1e-6."""
    for mine, theirs in zip(encoded(DEMO_MODEL), plain["embeddings"], strict=True):
        assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()
        assert (mine - theirs).abs().mean() < 1e-6 * theirs.abs().max()


def test_unpruned_embeddings_of_unit_scale_equal_vllms_own(tmp_path: Path) -> None:
    """To 1e-5, on random weights whose embeddings are of the order of 1, as LLaVA's are."""
    model = random_llava(tmp_path / "model", layers=1, hidden=64, heads=2, kv_heads=2)
    weights = load_file(model / "model.safetensors")
    for name, tensor in weights.items():
        if name.startswith("multi_modal_projector"):
            weights[name] = tensor * 6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    reference = offline("", tmp_path / "out.pt", str(model))
    for mine, theirs in zip(encoded(model), reference, strict=True):
        assert 0.5 < theirs.abs().max() < 5
        assert (mine - theirs).abs().max() < 1e-5


def test_unpruned_answers_equal_vllms_own(plain: dict[str, Any], plugin: dict[str, Any]) -> None:
    for mine, theirs in zip(plugin["results"], plain["results"], strict=False):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["prompt_tokens"] == theirs["prompt_tokens"]
        assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)


def test_each_request_in_a_batch_has_its_own_count(plugin: dict[str, Any]) -> None:
    text = plugin["results"][4]["prompt_tokens"]
    half, most, random, three, again = (r["prompt_tokens"] - text for r in plugin["results"][len(UNPRUNED) :])
    assert 1 <= most < half < 144
    assert random == 36  # a quarter of 144
    assert half < three < 3 * 144 + 1
    assert again == half
    results = plugin["results"][len(UNPRUNED) :]
    assert results[0]["tokens"] == results[4]["tokens"]
    assert len(PRUNED) == len(results)


def test_the_engine_holds_no_second_tower(plain: dict[str, Any], plugin: dict[str, Any]) -> None:
    assert any(name.startswith("vision_tower") for name in plain["parameters"])
    assert [n for n in plugin["parameters"] if not n.startswith("language_model")] == []
