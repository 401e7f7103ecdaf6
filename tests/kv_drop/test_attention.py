# SPDX-License-Identifier: Apache-2.0
"""The metadata builder above a prune layer, made as vLLM makes builders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.v1.attention.backend import subclass_attention_backend
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.utils import AttentionGroup

from tests.helpers.checkpoints import random_llava
from tests.helpers.kv_config import config
from vllm_vtprune.kv_drop.hooks.attention import dropping_backend


class WideBuilder(CPUAttentionMetadataBuilder):
    """As a backend's that wants to know how wide block tables are."""

    requires_block_table_width = True
    supports_update_block_table = True

    def __init__(self, *args: Any, block_table_width: int) -> None:
        super().__init__(*args)
        self.width = block_table_width


@pytest.mark.parametrize("gated", [False, True])
def test_a_builder_is_given_what_its_backend_asks_for(tmp_path: Path, gated: bool) -> None:
    """And copies no other group's metadata where a gate may have it made again."""
    vllm_config = config(random_llava(tmp_path, layers=2), policy={"prune_layer": 1})
    state = SimpleNamespace(gated=gated)
    layer: Any = SimpleNamespace(kv_drop_state=state)
    vllm_config.compilation_config.static_forward_context["layer"] = layer
    backend = dropping_backend(subclass_attention_backend("Wide", CPUAttentionBackend, WideBuilder))
    spec = FullAttentionSpec(block_size=32, num_kv_heads=4, head_size=32, dtype=torch.float32)
    group = AttentionGroup(backend, ["layer"], spec, 0)
    with set_current_vllm_config(vllm_config):
        group.create_metadata_builders(vllm_config, torch.device("cpu"), kernel_block_size=32)
    builder: Any = group.get_metadata_builder()
    assert builder.width == 1024 // 32
    assert builder._state is state
    assert builder.supports_update_block_table is not gated
