# SPDX-License-Identifier: Apache-2.0
"""Makes room for the vision towers inside the operator's ``gpu_memory_utilization``, and places them.

vLLM gives all of that memory to the engine and knows nothing of what API processes hold. Its one seam for
them is `MultiModalConfig.mm_ipc_gpu_memory_gb`: `vllm.multimodal.gpu_ipc_memory.reserve_mm_ipc_gpu_memory`
takes it off the KV cache of each GPU (`Worker.determine_available_memory`). It is meant for videos decoded on
the GPU, whose semaphore (`maybe_init_mm_gpu_ipc_pool`) would count the towers' share as its own, so each API
process sets that back to the operator's value (`restore_video_pool`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.transformers_utils.config import get_hf_image_processor_config

from vllm_vtprune.vision.memory import (
    GIB,
    TowerMemory,
    TowerShape,
    device_index,
    most_on_one_device,
    tower_memory,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

    from vllm_vtprune.families.base import Family
    from vllm_vtprune.policy import PrunePolicy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TowerPlace:
    """Where this process's tower runs, and what its GPU has to spare for towers.

    Attributes:
        device: torch's name of it.
        memory: of the fullest GPU; None where no GPU is used.
        video_gpu_gb: what the operator had set aside for videos.
    """

    device: str
    memory: TowerMemory | None = None
    video_gpu_gb: float = 0.0


def place_tower(
    vllm_config: VllmConfig, policy: PrunePolicy, family: Family, device: torch.device, dtype: torch.dtype
) -> TowerPlace:
    """Choose this process's GPU, set the towers' memory aside, and log the sum in one line.

    Args:
        vllm_config: changed in place (`mm_ipc_gpu_memory_gb`).
        policy: the operator's.
        family: the model's adapter.
        device: the policy's; a GPU without a number is chosen here.
        dtype: the tower's precision.
    """
    mm_config = vllm_config.model_config.get_multimodal_config()
    video = mm_config.mm_ipc_gpu_memory_gb
    if device.type != "cuda":
        return TowerPlace(str(device), None, video)
    parallel = vllm_config.parallel_config
    processes = parallel._api_process_count
    if device.index is None:
        layout = _layout(parallel, torch.cuda.device_count())
        index = device_index(parallel._api_process_rank, **layout)
        towers = most_on_one_device(processes, **layout)
    else:
        index, towers = device.index, processes
    towers = 1 if policy.shares_tower else towers
    memory = tower_memory(
        TowerShape.of(
            family,
            largest_image_pixels(vllm_config.model_config),
            videos=mm_config.get_limit_per_prompt("video") > 0,
        ),
        processes=towers,
        batch=policy.encoder_batch,
        bytes_per_value=dtype.itemsize,
        # with a shared tower, selection is the API processes' and on the CPU
        threads=1 if policy.shares_tower else 2,
        graphs=policy.encoder_graphs,
        cache_bytes=int(policy.feature_cache_gb * GIB) if policy.feature_cache_on == "device" else 0,
    )
    # with kv_cache_memory_bytes the operator counts the memory by hand, and vLLM would take it off that
    by_hand = vllm_config.cache_config.kv_cache_memory_bytes is not None
    if not by_hand:
        mm_config.mm_ipc_gpu_memory_gb = video + memory.total / GIB
    if processes == 1 or parallel._api_process_rank < 0:
        logger.info(
            "vtprune: vision towers take %s of each GPU, %s.",
            memory,
            "beside the KV cache of the size you set"
            if by_hand
            else "set aside from the KV cache, so that --gpu-memory-utilization holds for all processes",
        )
    return TowerPlace(f"cuda:{index}", memory, video)


def restore_video_pool(
    model_config: ModelConfig, parallel_config: ParallelConfig, video_gpu_gb: float
) -> None:
    """Give vLLM's semaphore for videos the operator's size again; called in an API process at start."""
    from vllm.multimodal.gpu_ipc_memory import maybe_init_mm_gpu_ipc_pool

    if model_config.get_multimodal_config().mm_ipc_gpu_memory_gb != video_gpu_gb:
        maybe_init_mm_gpu_ipc_pool(video_gpu_gb, parallel_config._api_process_count)


def largest_image_pixels(model_config: ModelConfig) -> int | None:
    """Pixels to which the image processor brings the largest picture; None where nobody says."""
    given = model_config.get_multimodal_config().mm_processor_kwargs or {}
    published = get_hf_image_processor_config(model_config.model, revision=model_config.revision)
    return pixels_of(given) or pixels_of(given.get("images_kwargs")) or pixels_of(published)


def pixels_of(settings: Any) -> int | None:
    """`max_pixels`, or `size.longest_edge`, as Qwen's image processors take them."""
    if not isinstance(settings, Mapping):
        return None
    size = settings.get("size")
    edge = size.get("longest_edge") if isinstance(size, Mapping) else None
    pixels = settings.get("max_pixels") or edge
    return int(pixels) if pixels else None


def _layout(parallel: ParallelConfig, devices: int) -> dict[str, int]:
    """How data-parallel ranks lie on this machine's GPUs; arguments of `device_index`."""
    per_replica = min(parallel.world_size, devices)
    replicas = max(parallel.data_parallel_size_local, 1)
    # one rank of several on this machine, each with a front end of its own
    own = (parallel.data_parallel_rank_local or 0) if replicas == 1 else 0
    return {"devices": devices, "replicas": replicas, "per_replica": per_replica, "first": own * per_replica}
