# SPDX-License-Identifier: Apache-2.0
"""The start-up check on vLLM's real configuration, before any engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import DEMO_MODEL
from tests.helpers.checkpoints import edit_config
from tests.helpers.family_processor import processor_of
from tests.helpers.kv_config import config
from vllm_vtprune.context import plugin_context
from vllm_vtprune.vision.processor import PrunedProcessor


@pytest.mark.parametrize(
    "policy,sentence",
    [
        ({"encoder_device": "cuda:99"}, "encoder_device is 'cuda:99', which this machine does not have"),
        ({"encoder_device": "gpu"}, "encoder_device is 'gpu': use auto, cpu"),
        ({"encoder_device": "xpu"}, "encoder_device is 'xpu'"),
        ({"encoder_dtype": "int7"}, "encoder_dtype is 'int7': use auto, float32"),
    ],
)
def test_an_encoder_that_cannot_run_is_refused(policy: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        config(DEMO_MODEL, policy=policy)


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector"])
def test_a_checkpoint_without_a_tower_or_a_projector_is_refused(tmp_path: Path, part: str) -> None:
    for path in DEMO_MODEL.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if part not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"holds no {part}.* weights"):
        config(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="lacks safetensors files"):
        config(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="'cuda', which this machine does not have: use auto or cpu"):
        config(DEMO_MODEL, policy={"encoder_device": "cuda"})


@pytest.mark.parametrize("least,said", [(143, False), (144, True), (500, True)])
def test_a_minimum_above_an_images_tokens_is_told(
    least: int, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm_vtprune"):
        config(DEMO_MODEL, policy={"min_tokens": least})
    assert (f"min_tokens is {least}, and an image has 144 vision tokens" in caplog.text) is said


def test_a_checkpoint_that_is_not_pruned_goes_back_to_vllm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With its own processor, if nothing was asked for; a prune layer or a default preset is refused."""
    for path in DEMO_MODEL.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    edit_config(tmp_path, {"vision_feature_layer": [-2, -3]})
    with caplog.at_level(logging.WARNING, logger="vllm_vtprune"):
        built = config(tmp_path, policy={"prune_layer": None})
    assert "one feature layer" in caplog.text and "It is served as by vLLM alone." in caplog.text
    assert not plugin_context(built.model_config).prunes
    assert built.scheduler_config.scheduler_cls is None
    assert "vtprune" not in str(built.parallel_config.worker_cls)
    assert not isinstance(processor_of(tmp_path), PrunedProcessor)
    for asked in ({}, {"prune_layer": None, "default_preset": "light"}):
        with pytest.raises(ValueError, match="one feature layer"):
            config(tmp_path, policy=asked)
