# SPDX-License-Identifier: Apache-2.0
"""One tower per process and model, built on first use."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, cast

import torch
from transformers import LlavaConfig

from vllm_vtprune.engine_config import plugin_context
from vllm_vtprune.vision.encoder import VisionEncoder
from vllm_vtprune.vision.feature_cache import FeatureCache
from vllm_vtprune.vision.tower_service import TowerService

if TYPE_CHECKING:
    from vllm.config import ModelConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_services: dict[tuple[str, ...], TowerService] = {}
_lock = threading.Lock()


def tower_service(model_config: ModelConfig) -> TowerService:
    """The process's tower for this model; loads it the first time.

    Raises:
        CheckpointError: tower or projector cannot be loaded from the checkpoint.
        ValueError: `encoder_device` or `encoder_dtype` names none torch knows.
    """
    context = plugin_context(model_config)
    policy = context.policy
    device = _device(policy.encoder_device)
    # vLLM has resolved the model's dtype to torch's by the time a processor exists
    model_dtype = cast(torch.dtype, model_config.dtype)
    dtype = _dtype(policy.encoder_dtype, model_dtype)
    key = (
        model_config.model,
        str(model_config.revision),
        str(device),
        str(dtype),
        str(context.dummy_weights),
    )
    with _lock:
        service = _services.get(key)
        if service is None:
            encoder = VisionEncoder.load(
                cast(LlavaConfig, model_config.hf_config),
                model_config.model,
                device=device,
                dtype=dtype,
                revision=model_config.revision,
                download_dir=context.download_dir,
                dummy=context.dummy_weights,
            )
            service = _services[key] = TowerService(
                encoder,
                FeatureCache(int(policy.feature_cache_gb * 2**30)),
                max_batch=policy.encoder_batch,
                threads=policy.encoder_threads,
            )
        return service


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"encoder_device is {name!r}: use auto, cpu, or a device such as cuda:0.") from error


def _dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    if name == "auto":
        return model_dtype
    if name not in _DTYPES:
        raise ValueError(f"encoder_dtype is {name!r}: use auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]
