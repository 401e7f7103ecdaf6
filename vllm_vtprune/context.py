# SPDX-License-Identifier: Apache-2.0
"""What the start-up check found out, for every part of the plugin, in every process.

vLLM's multimodal processor sees the `ModelConfig` alone, so the context is attached to that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_vtprune.policy import PrunePolicy

if TYPE_CHECKING:
    from vllm.config import ModelConfig

_ATTRIBUTE = "vtprune_context"


@dataclass(frozen=True)
class PluginContext:
    """What travels with `ModelConfig` to whoever needs it (pickled to the engine's processes).

    Attributes:
        policy: the operator's settings.
        dummy_weights: vLLM runs with `--load-format dummy`.
        download_dir: where the hub client keeps files.
        prunes: whether the checkpoint is one that the plugin prunes; else vLLM's own class serves it.
        encoder_device: where this process's tower runs; None: as the policy says.
        first_process: whether this is the first API process, or the only one.
        video_gpu_gb: what the operator sets aside for videos decoded on the GPU, towers apart.
        special_ids: the tokenizer's special tokens, the image placeholder aside; empty without a prune layer.
    """

    policy: PrunePolicy = field(default_factory=PrunePolicy)
    dummy_weights: bool = False
    download_dir: str | None = None
    prunes: bool = True
    encoder_device: str | None = None
    first_process: bool = True
    video_gpu_gb: float | None = None
    special_ids: frozenset[int] = frozenset()


def attach_context(model_config: ModelConfig, context: PluginContext) -> None:
    """Hand the context to all who are given this model configuration."""
    setattr(model_config, _ATTRIBUTE, context)


def has_context(model_config: ModelConfig) -> bool:
    """Whether the start-up check has run for this model: it is one of the plugin's."""
    return isinstance(getattr(model_config, _ATTRIBUTE, None), PluginContext)


def plugin_context(model_config: ModelConfig) -> PluginContext:
    """The context attached at start-up; the defaults where the check has not run (processor-only use)."""
    context = getattr(model_config, _ATTRIBUTE, None)
    return context if isinstance(context, PluginContext) else PluginContext()
