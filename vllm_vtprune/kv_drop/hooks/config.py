# SPDX-License-Identifier: Apache-2.0
"""Stage 2 at start-up: what it refuses, which classes of vLLM it has replaced, and what every process reads.

Without a prune layer none of this runs and vLLM is as it ships.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm_vtprune.context import plugin_context
from vllm_vtprune.errors import UnsupportedConfigError
from vllm_vtprune.kv_drop.hooks.request_check import install_request_check
from vllm_vtprune.kv_drop.plan import KVDropConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from vllm_vtprune.policy import PrunePolicy

_SCHEDULER = "vllm_vtprune.kv_drop.hooks.scheduler.build_scheduler"
_WORKER = "vllm_vtprune.kv_drop.hooks.worker.KVDropWorker"
#: `model_type` of the decoders whose layers the plugin can run in two halves.
DECODERS = ("llama",)


def recommended_prune_layer(layers: int) -> int:
    """The documented recommendation: about a quarter of the depth, dividing it.

    vLLM cuts the decoder into KV-cache groups as large as the smaller half. A K that divides the depth leaves
    no group partly empty, and one near a quarter makes four groups, each of which costs a block table and a
    metadata build per step.

    Args:
        layers: decoder layers, at least 2.
    """
    divisors = [k for k in range(1, layers // 2 + 1) if layers % k == 0]
    return min(divisors, key=lambda k: (abs(k - layers / 4), -k))


def install(vllm_config: VllmConfig, policy: PrunePolicy) -> None:
    """Check the configuration and have vLLM build our scheduler and worker.

    Called by the configuration hook (`LlavaPruneConfig`), before vLLM resolves which scheduler and worker it
    wants. Idempotent.

    Raises:
        UnsupportedConfigError: a bad prune layer, or a feature stage 2 does not work with.
    """
    layers, layer = vllm_config.model_config.hf_text_config.num_hidden_layers, policy.prune_layer or 0
    if not 1 <= layer < layers:
        raise UnsupportedConfigError(
            f"vtprune: prune_layer must be 1 to {layers - 1} for this model's {layers} decoder layers, "
            f"not {layer}; {recommended_prune_layer(layers)} is recommended."
        )
    problem = _problem(vllm_config, policy)
    if problem is not None:
        raise UnsupportedConfigError(f"vtprune: prune_layer cannot be used with {problem}.")
    # left unset, vLLM would turn them on by itself (`VllmConfig._maybe_enable_breakable_cudagraph`)
    os.environ.setdefault("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    vllm_config.scheduler_config.scheduler_cls = _SCHEDULER
    vllm_config.parallel_config.worker_cls = _WORKER
    install_request_check()


def kv_drop_config(vllm_config: VllmConfig) -> KVDropConfig:
    """What the operator fixed, as every process reads it from the same `VllmConfig`.

    Raises:
        UnsupportedConfigError: the plugin's configuration hook has not seen this configuration.
    """
    context = plugin_context(vllm_config.model_config)
    policy = context.policy
    if policy.prune_layer is None:
        raise UnsupportedConfigError(
            "vtprune: the engine runs the second stage's classes, but its model configuration carries no "
            "prune_layer; leave --scheduler-cls and --worker-cls to the plugin."
        )
    return KVDropConfig(
        prune_layer=policy.prune_layer,
        window=policy.window,
        longest_prompt=longest_whole_prompt(vllm_config),
        special_ids=context.special_ids,
        default=policy.default_settings.kv,
        relevance=policy.relevance,
    )


def longest_whole_prompt(vllm_config: VllmConfig) -> int:
    """Tokens of the longest prompt that a step can take whole.

    Beside a full batch of decoding requests, one token each, so that a pruned prompt at the head of the queue
    need not wait for them to finish; but half the step's budget at least.
    """
    scheduler = vllm_config.scheduler_config
    budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    longest = max(budget - scheduler.max_num_seqs + 1, budget // 2)
    if scheduler.long_prefill_token_threshold > 0:
        longest = min(longest, scheduler.long_prefill_token_threshold)
    return longest


def special_token_ids(model_config: ModelConfig) -> frozenset[int]:
    """The tokenizer's special tokens, the image placeholder aside; the config's own without a tokenizer."""
    hf_config, text = model_config.hf_config, model_config.hf_text_config
    if model_config.skip_tokenizer_init:
        named = (getattr(text, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
        ids = {i for i in named if isinstance(i, int)}
    else:
        from vllm.tokenizers import cached_tokenizer_from_config

        ids = set(cached_tokenizer_from_config(model_config).all_special_ids)
    return frozenset(ids - {hf_config.image_token_index})


def _problem(vllm_config: VllmConfig, policy: PrunePolicy) -> str | None:
    """The first thing that does not fit, as the end of a sentence; None where all fits."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    text = model.hf_text_config
    if text.model_type not in DECODERS:
        return f"a {text.model_type} decoder; the supported ones are {', '.join(DECODERS)}"
    from vllm import envs
    from vllm.platforms import current_platform

    wrong = {
        "a sliding-window decoder": bool(getattr(text, "sliding_window", None)),
        "pipeline parallelism; set --pipeline-parallel-size 1": parallel.pipeline_parallel_size > 1,
        "context parallelism; set --decode-context-parallel-size and --prefill-context-parallel-size 1": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "microbatching; leave out --enable-dbo and --ubatch-size": parallel.use_ubatching,
        "speculative decoding; leave out --speculative-config": vllm_config.speculative_config is not None,
        "LoRA adapters; leave out --enable-lora": vllm_config.lora_config is not None,
        "KV transfer; leave out --kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "encoder-cache transfer; leave out --ec-transfer-config": vllm_config.ec_transfer_config is not None,
        # they replay a batch without the model's Python, which rates and drops
        "breakable CUDA graphs; leave out VLLM_USE_BREAKABLE_CUDAGRAPH=1": (
            envs.VLLM_USE_BREAKABLE_CUDAGRAPH and not model.enforce_eager
        ),
        "fast prefill; leave out --kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        "a single KV-cache group; leave out --disable-hybrid-kv-cache-manager": bool(
            scheduler.disable_hybrid_kv_cache_manager
        ),
        "a scheduler class of your own; leave out --scheduler-cls": scheduler.scheduler_cls
        not in (None, _SCHEDULER),
        "a worker class of your own; leave out --worker-cls": parallel.worker_cls not in ("auto", _WORKER),
        "a pooling model; leave out --runner pooling": model.runner_type != "generate",
        f"the {current_platform.device_name} platform; it runs on CUDA and on the CPU": not (
            current_platform.is_cuda() or current_platform.is_cpu()
        ),
        f"a window of {policy.window}, which no prompt of this model exceeds; choose a smaller window": (
            policy.window >= model.max_model_len
        ),
    }
    return next((sentence for sentence, is_wrong in wrong.items() if is_wrong), None)
