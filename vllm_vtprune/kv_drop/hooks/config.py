# SPDX-License-Identifier: Apache-2.0
"""Stage 2 at start-up: what it refuses, which classes of vLLM it has replaced, and what every process reads.

Without a prune layer none of this runs and vLLM is as it ships.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_vtprune.context import plugin_context
from vllm_vtprune.errors import UnsupportedConfigError
from vllm_vtprune.kv_drop.gate import read_facts
from vllm_vtprune.kv_drop.hooks.request_check import install_request_check
from vllm_vtprune.kv_drop.plan import KVDropConfig
from vllm_vtprune.kv_drop.schedule import ScheduleError, band_groups, band_sizes, resolve
from vllm_vtprune.policy import PrunePolicy

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger(__name__)

_SCHEDULER = "vllm_vtprune.kv_drop.hooks.scheduler.build_scheduler"
_WORKER = "vllm_vtprune.kv_drop.hooks.worker.KVDropWorker"
#: `model_type` of the decoders whose layers the plugin can run in bands: full attention in every layer.
DECODERS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
)


def recommended_prune_layer(layers: int) -> int:
    """The documented recommendation: about a quarter of the depth, dividing it, and no earlier than 3.

    vLLM cuts the decoder into KV-cache groups as large as the smaller half. A K that divides the depth leaves
    no group partly empty, and one near a quarter makes four groups, each of which costs a block table and a
    metadata build per step. At layers 1 and 2 the ratings were worse than chance where it was measured
    (docs/evaluation.md).

    Args:
        layers: decoder layers, at least 2.
    """
    divisors = [k for k in range(3, layers // 2 + 1) if layers % k == 0]
    if not divisors:
        return min(max(3, round(layers / 4)), layers - 1)
    return min(divisors, key=lambda k: (abs(k - layers / 4), -k))


def install(vllm_config: VllmConfig, policy: PrunePolicy) -> None:
    """Check the configuration and have vLLM build our scheduler and worker.

    Called by the configuration hook (`PruneConfig`) with a policy that `with_schedule` resolved, before vLLM
    resolves which scheduler and worker it wants. Idempotent.

    Raises:
        UnsupportedConfigError: a bad prune layer, or a feature stage 2 does not work with.
    """
    layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    layer, *above = [prune_layer.layer for prune_layer in policy.schedule]
    if not 1 <= layer < layers:
        raise UnsupportedConfigError(
            f"vtprune: prune_layer must be 1 to {layers - 1} for this model's {layers} decoder layers, "
            f"not {layer}; {recommended_prune_layer(layers)} is recommended."
        )
    levels = deepstack_levels(vllm_config.model_config)
    if layer < levels:
        raise UnsupportedConfigError(
            f"vtprune: prune_layer must be at least {levels} for this model, which adds visual features "
            f"after each of its first {levels} decoder layers, not {layer}."
        )
    groups, empty = band_groups(band_sizes(layers, [layer, *above]))
    if empty > 0:
        logger.warning(
            "vtprune: prune layers %s of %d cut the KV cache into %d groups of layers, of which %.0f %% stay "
            "empty. Prune layers at multiples of one number that divides %d waste nothing.",
            ", ".join(map(str, [layer, *above])),
            layers,
            sum(groups),
            100 * empty / (1 + empty),
            layers,
        )
    problem = _problem(vllm_config, policy)
    if problem is not None:
        raise UnsupportedConfigError(f"vtprune: prune_layer cannot be used with {problem}.")
    problem = _reuse_problem(vllm_config, policy) if policy.kv_reuse else None
    if problem is not None:
        raise UnsupportedConfigError(f"vtprune: kv_reuse cannot be used with {problem}.")
    # left unset, vLLM would turn them on by itself (`VllmConfig._maybe_enable_breakable_cudagraph`)
    os.environ.setdefault("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    vllm_config.scheduler_config.scheduler_cls = _SCHEDULER
    vllm_config.parallel_config.worker_cls = _WORKER
    install_request_check()


def with_schedule(
    policy: PrunePolicy,
    model_config: ModelConfig,
    *,
    dummy_weights: bool = False,
    download_dir: str | None = None,
) -> PrunePolicy:
    """The policy with its prune layers written out, where it names a schedule or a file.

    What is compiled is filed under the configuration's text, so it has to say all of it.

    Args:
        policy: the operator's.
        model_config: of the model that is served.
        dummy_weights: the model's weights are made up, so that they cannot be another's.
        download_dir: where the hub client keeps files.

    Raises:
        UnsupportedConfigError: a schedule that cannot be read, or cannot work with this model, or was
            calibrated for another.
    """
    name = policy.named_schedule
    if not name:
        return _with_gate(policy, model_config, dummy_weights, download_dir)
    where = "prune_schedule" if policy.prune_schedule.strip() else "prune_layers"
    try:
        if policy.prune_schedule.strip() and not name.endswith(".json"):
            raise ScheduleError(f"{name} is no JSON file, as `vtprune calibrate` writes; see --prune-layers")
        schedule = resolve(name, model_config.hf_text_config.num_hidden_layers)
    except ScheduleError as error:
        raise UnsupportedConfigError(f"vtprune: {where}: {error}.") from error
    if schedule.weights is not None and not dummy_weights:
        _refuse_other_weights(
            f"{name} was calibrated",
            schedule.weights,
            model_config,
            download_dir,
            "run `vtprune calibrate` for this model, or give prune layers by --prune-layers",
        )
    brought = {
        "prune_gate": schedule.gate,
        "relevance": schedule.relevance and ",".join(schedule.relevance),
        "window": schedule.window,
        "preset_aggressiveness": ",".join(
            f"{preset}={value:g}" for preset, value in schedule.presets.items()
        ),
    }
    # what the operator says is stronger
    own = {key for key in brought if getattr(policy, key) != PrunePolicy.model_fields[key].default}
    taken = {key: value for key, value in brought.items() if value and key not in own}
    if schedule.deviation:
        logger.info(
            "vtprune: the schedule %s is %s here, within %.2f of the published curve.",
            name,
            schedule,
            schedule.deviation,
        )
    if schedule.gate and "prune_gate" not in own and policy.kv_reuse:
        raise UnsupportedConfigError(
            f"vtprune: kv_reuse cannot be used with a gate, and {name} names one: leave kv_reuse out."
        )
    written = PrunePolicy(
        **{**policy.model_dump(), **taken, "prune_layers": str(schedule), "prune_schedule": ""}
    )
    return _with_gate(written, model_config, dummy_weights, download_dir)


def _with_gate(
    policy: PrunePolicy, model_config: ModelConfig, dummy_weights: bool, download_dir: str | None
) -> PrunePolicy:
    """The policy with the gate's prune layer written before its file, so that every process knows it."""
    path = policy.gate[1] if policy.gate is not None else policy.prune_gate.strip()
    if not path:
        return policy
    try:
        facts = read_facts(path)
    except ScheduleError as error:
        raise UnsupportedConfigError(f"vtprune: prune_gate: {error}.") from error
    text = model_config.hf_text_config
    if (facts.layers, facts.hidden) != (text.num_hidden_layers, text.hidden_size):
        raise UnsupportedConfigError(
            f"vtprune: prune_gate: {path} is for a decoder of {facts.layers} layers and width "
            f"{facts.hidden}, and this one has {text.num_hidden_layers} and {text.hidden_size}."
        )
    layers = [prune_layer.layer for prune_layer in policy.schedule]
    if facts.layer not in layers:
        raise UnsupportedConfigError(
            f"vtprune: prune_gate: {path} decides at layer {facts.layer}, and the prune layers are "
            f"{', '.join(map(str, layers))}: add {facts.layer}:vision=1 to --prune-layers."
        )
    if not dummy_weights:
        advice = "run `vtprune calibrate --gate` for this model, or leave --prune-gate out"
        _refuse_other_weights(f"{path} was trained", facts.weights, model_config, download_dir, advice)
    # workers may run elsewhere
    written = f"{facts.layer}={Path(path).resolve()}"
    return PrunePolicy(**{**policy.model_dump(), "prune_gate": written})


def _refuse_other_weights(
    what: str, wanted: str, model_config: ModelConfig, download_dir: str | None, advice: str
) -> None:
    from vllm_vtprune.fingerprint import fingerprint

    weights = fingerprint(model_config.model, revision=model_config.revision, download_dir=download_dir)
    if weights != wanted:
        raise UnsupportedConfigError(
            f"vtprune: {what} for a model with the weights {wanted}, and {model_config.model} has {weights}: "
            f"{advice}."
        )


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
    gate_layer, gate_file = policy.gate or (None, "")
    layers = [prune_layer.layer for prune_layer in policy.schedule]
    return KVDropConfig(
        schedule=policy.schedule,
        window=policy.window,
        longest_prompt=longest_whole_prompt(vllm_config),
        special_ids=context.special_ids,
        default=policy.default_settings.kv,
        relevance=policy.relevances,
        gate=None if gate_layer is None else layers.index(gate_layer),
        gate_file=gate_file,
        reuse_block=vllm_config.cache_config.block_size if policy.kv_reuse else 0,
    )


def deepstack_levels(model_config: ModelConfig) -> int:
    """After how many of the first decoder layers visual features are added (Qwen3-VL); 0 for most models."""
    vision = getattr(model_config.hf_config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


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
    """The tokenizer's special tokens, the placeholders aside; the config's own without a tokenizer."""
    hf_config, text = model_config.hf_config, model_config.hf_text_config
    if model_config.skip_tokenizer_init:
        named = (getattr(text, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
        ids = {i for i in named if isinstance(i, int)}
    else:
        from vllm.tokenizers import cached_tokenizer_from_config

        ids = set(cached_tokenizer_from_config(model_config).all_special_ids)
    # the name of old LLaVA configurations, and the one of all others
    names = ("image_token_index", "image_token_id", "video_token_id")
    return frozenset(ids - {getattr(hf_config, name, None) for name in names})


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


def _reuse_problem(vllm_config: VllmConfig, policy: PrunePolicy) -> str | None:
    """The first thing that keeps later turns from going on, as the end of a sentence; None where all fits."""
    cache, events = vllm_config.cache_config, vllm_config.kv_events_config
    wrong = {
        "an exit, a share of 0, among the prune layers: its counts cannot be whole blocks": any(
            prune_layer.share == 0 for prune_layer in policy.schedule
        ),
        "the prefix cache off; leave out --no-enable-prefix-caching": not cache.enable_prefix_caching,
        "a prefix match unit; leave out --prefix-match-unit": cache.prefix_match_unit is not None,
        # what is published is not the hash of the tokens that an event would name
        "KV-cache events; leave out --kv-events-config": (
            events is not None and events.enable_kv_cache_events
        ),
    }
    return next((sentence for sentence, is_wrong in wrong.items() if is_wrong), None)
