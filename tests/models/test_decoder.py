# SPDX-License-Identifier: Apache-2.0
"""Stage 2 in decoders other than Llama, on the real engine, beside the plain reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.helpers.checkpoints import random_llava
from tests.helpers.kv_cases import decoder_cases
from tests.reference import Reference

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

#: `model_type` -> the class vLLM builds for it.
DECODERS = {"mistral": "MistralModel", "qwen2": "Qwen2Model", "qwen3": "Qwen3Model"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoders")
    for seed, decoder in enumerate(DECODERS):
        random_llava(
            folder / decoder, decoder=decoder, layers=6, heads=4, kv_heads=2, weight_scale=5.0, seed=seed
        )
    return folder


@pytest.fixture(scope="module")
def found(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("out") / "out.pt"
    process = subprocess.run(
        [sys.executable, "-m", "tests.helpers.kv_run", "decoders", str(checkpoints), str(out)],
        env={
            **os.environ,
            "VLLM_PLUGINS": "vtprune",
            "VLLM_CPU_CI_ENV": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        },
        cwd=REPOSITORY,
        capture_output=True,
        timeout=850,
    )
    assert process.returncode == 0, process.stderr.decode(errors="replace")[-4000:]
    result: dict[str, Any] = torch.load(out, weights_only=False)
    return result


@pytest.mark.parametrize("decoder", DECODERS)
def test_each_decoder_answers_as_the_reference(
    found: dict[str, Any], checkpoints: Path, decoder: str
) -> None:
    reference = Reference(checkpoints / decoder, prune_layer=2)
    for request, mine in zip(decoder_cases(), found[decoder]["batch"], strict=True):
        theirs = reference.judge(request, mine["tokens"])
        assert mine["tokens"] == theirs.token_ids, request
        assert mine["logprobs"] == pytest.approx(theirs.logprobs, abs=1e-4), request


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_decoder_is_vllms_own_in_two_compiled_bands(found: dict[str, Any], decoder: str) -> None:
    name, bands = found[decoder]["bands"]
    assert name == DECODERS[decoder]
    assert bands == [("Band0", 2, True), ("Band1", 4, True)]
