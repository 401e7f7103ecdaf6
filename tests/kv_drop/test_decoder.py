# SPDX-License-Identifier: Apache-2.0
"""A decoder in bands as vLLM builds and loads it, without an engine: what vLLM finds in it, its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import CompilationMode, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.parallel_state import ensure_model_parallel_initialized, init_distributed_environment
from vllm.model_executor.model_loader import get_model
from vllm.v1.worker.gpu.cudagraph_utils import has_compiled_submodule

from tests.helpers.checkpoints import random_llava
from tests.helpers.kv_config import config


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One checkpoint, loaded without a prune layer and with two, as it is and to be compiled."""
    folder = tmp_path_factory.mktemp("decoder")
    checkpoint: Path = random_llava(folder / "llava", layers=6, heads=4, kv_heads=2)
    # the tower does not run here, and vLLM 0.33's quick_gelu asks for a kernel that 0.32's CPU build has not
    written = json.loads((checkpoint / "config.json").read_text())
    written["vision_config"]["hidden_act"] = "gelu"
    (checkpoint / "config.json").write_text(json.dumps(written))
    made = {}
    patch = pytest.MonkeyPatch()
    # as vLLM's runners for the CPU do (`_set_torch_accelerator_to_noop`)
    patch.setattr(torch.accelerator, "empty_cache", lambda: None)
    try:
        for name, layers, eager in [("whole", "", False), ("bands", "2,4", False), ("eager", "2,4", True)]:
            policy = {"prune_layer": None, "prune_layers": layers}
            built = config(checkpoint, policy=policy, dtype="float32", enforce_eager=eager)
            with set_current_vllm_config(built):
                init_distributed_environment(1, 0, f"file://{folder}/meet", 0, "gloo")
                ensure_model_parallel_initialized(1, 1)
                made[name] = get_model(vllm_config=built)
            assert (built.compilation_config.mode == CompilationMode.NONE) is eager
        yield made
    finally:
        cleanup_dist_env_and_memory()
        patch.undo()


def test_vllm_finds_the_compiled_bands(models: dict[str, Any]) -> None:
    """Without that its V2 captures no piecewise graphs."""
    assert has_compiled_submodule(models["whole"]) and has_compiled_submodule(models["bands"])
    assert not has_compiled_submodule(models["eager"])
    decoder = models["bands"].language_model.model
    assert [len(band.layers) for band in decoder.bands] == [2, 2, 2]
    assert decoder.do_not_compile, "its forward pass is Python"


@pytest.mark.parametrize("name", ["bands", "eager"])
def test_weights_are_loaded_under_the_names_that_they_have_without_bands(
    models: dict[str, Any], name: str
) -> None:
    split, whole = models[name], models["whole"]
    ours, vllms = (dict(m.named_parameters(remove_duplicate=False)) for m in (split, whole))
    assert ours.keys() == vllms.keys()
    assert all(torch.equal(ours[key], vllms[key]) for key in ours)
    assert split.state_dict().keys() == whole.state_dict().keys()
    # what vLLM's loaders, sleep and exchange of weights walk over
    assert not [key for key, module in split.named_modules() if ".bands" in key and [*module.parameters()]]
    assert not [key for key, _ in split.named_buffers() if "language_model.model.bands" in key]
