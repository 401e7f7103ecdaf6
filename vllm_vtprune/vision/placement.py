# SPDX-License-Identifier: Apache-2.0
"""Where a process's tower is: on which device, in which precision, here or in a process of its own."""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING, cast

import torch

from vllm_vtprune.context import plugin_context
from vllm_vtprune.errors import PolicyError
from vllm_vtprune.vision.service import VisionService
from vllm_vtprune.vision.shared.client import SharedTower, tower_folder
from vllm_vtprune.vision.shared.process import Recipe

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_vtprune.context import PluginContext
    from vllm_vtprune.policy import PrunePolicy

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_services: dict[tuple[str, ...], VisionService | SharedTower] = {}
_services_lock = threading.Lock()


def vision_service(model_config: ModelConfig) -> VisionService | SharedTower:
    """The process's tower for this model, or its access to a shared one; loads it the first time.

    Raises:
        CheckpointError: tower or projector cannot be loaded from the checkpoint.
        TowerLostError: a shared tower's process ended before it could serve.
        PolicyError: `encoder_device` or `encoder_dtype` names none that this machine or torch has.
    """
    context = plugin_context(model_config)
    policy = context.policy
    device = _device(context.encoder_device or policy.encoder_device)
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
    with _services_lock:
        service = _services.get(key)
        if service is None:
            recipe = Recipe(
                model_config.hf_config,
                model_config.model,
                {
                    "device": device,
                    "dtype": dtype,
                    "revision": model_config.revision,
                    "download_dir": context.download_dir,
                    "dummy": context.dummy_weights,
                    "graphs": policy.encoder_batch if policy.encoder_graphs else 0,
                },
                cache_bytes=int(policy.feature_cache_gb * 2**30),
                cache_on_host=policy.feature_cache_on == "host",
                max_batch=policy.encoder_batch,
                threads=policy.encoder_threads,
            )
            service = _services[key] = (
                _shared(key, recipe, context) if policy.shares_tower else recipe.service()
            )
        return service


def _shared(key: tuple[str, ...], recipe: Recipe, context: PluginContext) -> SharedTower:
    # another model's tower is another process
    model = hashlib.blake2b(repr(key).encode(), digest_size=4).hexdigest()
    name = f"{recipe.load['device'].type}{recipe.load['device'].index or ''}-{model}"
    return SharedTower(tower_folder(), name, recipe, first=context.first_process)


def check_encoder(policy: PrunePolicy, model_config: ModelConfig) -> tuple[torch.device, torch.dtype]:
    """The tower's device and precision, before an engine starts; refuses what `vision_service` would.

    Raises:
        PolicyError: `encoder_device` or `encoder_dtype` names none that this machine or torch has.
    """
    return _device(policy.encoder_device), _dtype(policy.encoder_dtype, cast(torch.dtype, model_config.dtype))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            # asked of the driver, without a context of CUDA's in a process that is yet to fork
            there = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
        else:
            there = torch.empty(0, device=device).device.type == device.type
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise PolicyError(
            f"encoder_device is {name!r}: use auto, cpu, or a device such as cuda:0."
        ) from error
    if not there:
        raise PolicyError(f"encoder_device is {name!r}, which this machine does not have: use auto or cpu.")
    return device


def _dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    if name == "auto":
        return model_dtype
    if name not in _DTYPES:
        raise PolicyError(f"encoder_dtype is {name!r}: use auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]
