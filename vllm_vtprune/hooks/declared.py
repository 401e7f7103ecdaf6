# SPDX-License-Identifier: Apache-2.0
"""What no parser sees: methods that we replace on vLLM's objects, private names that we read, assumed orders.

Kinds: "replace" puts something of ours in the place of a method, class or attribute; "read" uses a private
name; "order" assumes what vLLM does before, after or with what we give it.
"""

from __future__ import annotations

from vllm_vtprune.hooks.uses import Use

_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner."
_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner."
_BATCH_V1 = "vllm.v1.worker.gpu_input_batch:InputBatch."
_REQUEST_V1 = "vllm.v1.worker.gpu_input_batch:CachedRequestState."
_BATCH_V2 = "vllm.v1.worker.gpu.input_batch:InputBatch."
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager."
_POOL = "vllm.v1.core.block_pool:BlockPool."
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler."
_RENDERER = "vllm.renderers.base:BaseRenderer."
_MULTIMODAL = "vllm.model_executor.models.interfaces:SupportsMultiModal."
_PROCESSOR = "vllm.multimodal.processing:BaseMultiModalProcessor."
_ENGINE = "vllm.v1.engine.core:EngineCoreProc."
_METADATA = "vllm.v1.attention.backend:CommonAttentionMetadata."
_CHAT_ROUTE = "vllm.entrypoints.openai.chat_completion.api_router:create_chat_completion"
_CHAT = "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat."
_MESSAGES = "vllm.entrypoints.anthropic.serving:"

#: Our file -> (symbol, kind, what is relied on).
_BY_FILE: dict[str, list[tuple[str, str, str]]] = {
    "vllm_vtprune/plugin.py": [
        (
            "vllm.config.vllm:VllmConfig.try_verify_and_update_config",
            "order",
            "runs once, before scheduler and worker classes are resolved",
        ),
    ],
    "vllm_vtprune/context.py": [
        (
            "vllm.config.model:ModelConfig",
            "replace",
            "an attribute of ours survives pickling to every process",
        ),
    ],
    "vllm_vtprune/error_text.py": [
        (
            "vllm.v1.structured_output:StructuredOutputManager._create_grammar",
            "order",
            "logs an error's text",
        ),
        (_ENGINE + "_handle_request_preproc_error", "order", "logs an error's text"),
    ],
    "vllm_vtprune/kv_drop/step.py": [
        (_METADATA + "_num_computed_tokens_cache", "replace", "reset, as it caches what compaction changes"),
        (_METADATA + "_token_to_req_indices_cache", "replace", "reset, as it caches what compaction changes"),
    ],
    "vllm_vtprune/kv_drop/hooks/attention.py": [
        (
            "vllm.model_executor.layers.attention.attention:Attention.attn_backend",
            "replace",
            "our subclass of the backend builds the metadata of the layers above",
        ),
        (
            "vllm.v1.attention.backend:AttentionMetadataBuilder.supports_update_block_table",
            "replace",
            "off above a gate, where metadata is made again",
        ),
        (
            "vllm.model_executor.layers.attention.attention:Attention.get_attn_backend",
            "order",
            "asked after the model was built",
        ),
    ],
    "vllm_vtprune/kv_drop/hooks/cache.py": [
        ("vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered", "read", "registers a spec"),
        (_MANAGER + "num_cached_block", "read", "blocks of a request that are published"),
        (
            _POOL + "cache_full_blocks",
            "order",
            "reads no more of a request than `NamedBlocks` has, where there are no KV-cache events",
        ),
    ],
    "vllm_vtprune/kv_drop/hooks/reuse.py": [
        (_POOL + "get_cached_block", "read", "finds blocks by names of ours"),
        *((_MANAGER + name, "read", "") for name in ("block_pool", "kv_cache_group_id")),
        ("vllm.v1.request:Request.block_hashes", "read", "each of all tokens up to a block's end"),
    ],
    "vllm_vtprune/kv_drop/hooks/request_check.py": [
        (
            "vllm.platforms.interface:Platform.validate_request",
            "replace",
            "sees every request before the engine",
        ),
        (
            "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
            "order",
            "calls `validate_request` and lets its errors through",
        ),
    ],
    "vllm_vtprune/kv_drop/hooks/runner_v1.py": [
        (_V1 + "_prepare_inputs", "replace", "the runner's class is ours after `init_device`"),
        (_V1 + "_update_states", "replace", "appends a step's blocks to those a request holds"),
        *((_V1 + name, "read", "") for name in ("input_batch", "requests", "kv_cache_config", "get_model")),
        *(
            (_BATCH_V1 + name, "read", "")
            for name in ("req_ids", "num_computed_tokens_cpu", "block_table", "req_id_to_index")
        ),
        (
            "vllm.v1.worker.block_table:BlockTable.num_blocks_per_row",
            "replace",
            "the step's own blocks are in it; lowered for a request that returned some",
        ),
        ("vllm.v1.worker.block_table:BlockTable.append_row", "order", "writes behind `num_blocks_per_row`"),
        *(
            (_REQUEST_V1 + name, "read", "")
            for name in ("prompt_token_ids", "mm_features", "sampling_params")
        ),
        (_REQUEST_V1 + "block_ids", "replace", "shortened for a request that returned blocks"),
    ],
    "vllm_vtprune/kv_drop/hooks/runner_v2.py": [
        (_V2 + "add_requests", "order", "removes a request's state before it adds it"),
        (_V2 + "finish_requests", "order", "removes preempted requests as it does finished ones"),
        *(
            (_BATCH_V2 + name, "read", "")
            for name in ("req_ids", "num_scheduled_tokens", "num_computed_tokens_np", "idx_mapping_np")
        ),
    ],
    "vllm_vtprune/kv_drop/hooks/worker.py": [
        (_V2 + "model_state", "read", ""),
        (_V2 + "block_tables", "read", ""),
        (
            "vllm.v1.worker.gpu.block_table:BlockTables.num_blocks",
            "replace",
            "the step's own blocks are in it; lowered for a request that returned some",
        ),
        (
            "vllm.v1.worker.gpu.block_table:BlockTables.append_block_ids",
            "order",
            "writes behind `num_blocks`",
        ),
        (_V2 + "req_states", "read", ""),
        ("vllm.v1.worker.gpu.states:RequestState.req_id_to_index", "read", ""),
    ],
    "vllm_vtprune/kv_drop/hooks/exits.py": [
        ("vllm.v1.core.sched.output:SchedulerOutput", "replace", "an attribute of ours survives pickling"),
        ("vllm.v1.outputs:ModelRunnerOutput", "replace", "an attribute of ours survives pickling"),
    ],
    "vllm_vtprune/kv_drop/hooks/failures.py": [
        ("vllm.v1.outputs:ModelRunnerOutput", "replace", "an attribute of ours survives pickling"),
        ("vllm.v1.worker.gpu.async_utils:AsyncOutput.model_runner_output", "read", ""),
        ("vllm.v1.worker.gpu_model_runner:AsyncGPUModelRunnerOutput._model_runner_output", "read", ""),
    ],
    "vllm_vtprune/kv_drop/hooks/config.py": [
        (
            "vllm.config.vllm:VllmConfig._maybe_enable_breakable_cudagraph",
            "order",
            "runs after the start-up check, and reads the environment",
        ),
    ],
    "vllm_vtprune/kv_drop/hooks/scheduler.py": [
        (_SCHEDULER + "schedule", "order", "what follows when `_reserve_prefill_lookahead` says 0"),
        (_SCHEDULER + "_update_request_as_session", "order", "takes the next chunk's sampling parameters"),
        (
            "vllm.v1.core.sched.output:NewRequestData.mm_features",
            "replace",
            "the pictures that `strip_covered_mm_data` leaves out",
        ),
        (_SCHEDULER + "encoder_cache_mismatch_reqs", "replace", "`update_from_output` fails whom it names"),
        ("vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.single_type_managers", "read", ""),
        *(
            ("vllm.v1.core.kv_cache_manager:KVCacheManager." + name, "read", "")
            for name in ("prefix_cache_lookup_enabled", "create_kv_cache_blocks", "evict_blocks")
        ),
        (
            _SCHEDULER + "update_from_output",
            "order",
            "tells the first of what `_free_request` returns with a request's last output",
        ),
    ],
    "vllm_vtprune/models/pruned.py": [
        (_MULTIMODAL + "_mark_tower_model", "replace", "every class builds its tower in it"),
        (_MULTIMODAL + "embed_multimodal", "replace", "what an item's fields become"),
        (
            "vllm.model_executor.models.interfaces:SupportsMRoPE.get_mrope_input_positions",
            "replace",
            "positions of a whole prompt",
        ),
    ],
    "vllm_vtprune/models/qwen_vl.py": [
        ("vllm.model_executor.models.qwen3_vl:mrope_positions_factor", "replace", "sizes the rotary table"),
    ],
    "vllm_vtprune/models/decoder.py": [
        *(
            (f"vllm.model_executor.models.{model}.forward", "replace", "the decoder's class is ours")
            for model in ("llama:LlamaModel", "qwen2:Qwen2Model", "qwen3_moe:Qwen3MoeModel")
        ),
        (
            "vllm.v1.worker.gpu.cudagraph_utils:has_compiled_submodule",
            "order",
            "finds compiled bands among the model's modules",
        ),
    ],
    "vllm_vtprune/vision/keys.py": [
        (_PROCESSOR + "_get_mm_hashes", "read", "the key of an item that a trusted id names"),
        (_PROCESSOR + "_get_cache_missing_processor_kwargs", "read", "which keyword arguments are whose"),
    ],
    "vllm_vtprune/vision/preprocessing.py": [
        (_PROCESSOR + "_apply_hf_processor_main", "read", "preprocesses without a prompt"),
        (_PROCESSOR + "_get_mm_fields_config", "read", "takes the fields apart by item"),
        (_PROCESSOR + "_get_prompt_updates", "read", "tells an item's places"),
    ],
    "vllm_vtprune/vision/processor.py": [
        (_PROCESSOR + "_cached_apply_hf_processor", "order", "uses the cache unless an item passes through"),
        (
            "vllm.multimodal.cache.base:BaseMultiModalProcessorCache.is_cached_item",
            "order",
            "what it says holds until the prompt's items are merged",
        ),
    ],
    "vtprune_server/plugin.py": [
        (
            "vllm.entrypoints.serve.middleware.register:init_entrypoints_middleware",
            "order",
            "runs before ours, which therefore lie inside vLLM's",
        ),
        (
            "vllm.entrypoints.launchers.api_server.app_state:init_app_state",
            "order",
            "sets the renderer and the models' handler before endpoint plugins get the state",
        ),
        (
            "vllm.entrypoints.generate.api_router:init_generate_state",
            "order",
            "every handler that streams lies in the application's state",
        ),
    ],
    "vtprune_server/routes.py": [
        (_CHAT_ROUTE, "order", "parameters `request` and `raw_request`; what the handler returns"),
    ],
    "vtprune_server/responses.py": [
        (
            "vllm.entrypoints.serve.utils.api_utils:with_cancellation",
            "order",
            "what a handler returns when its client went away",
        ),
    ],
    "vtprune_server/renderer.py": [
        ("vllm.renderers.online_renderer:OnlineRenderer", "replace", "the renderer's class is ours"),
        (
            _PROCESSOR + "_apply_prompt_updates",
            "order",
            "AssertionError for an image whose place was cut off",
        ),
    ],
    "vtprune_server/earlier_answers.py": [
        (
            "vllm.entrypoints.openai.responses.utils:_construct_message_from_response_item",
            "order",
            "takes the text of an earlier answer's first part",
        ),
    ],
    "vtprune_server/first_turn.py": [
        (
            "vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat",
            "order",
            "fills in the template with `build_chat_params` and what it is given, and tokenises by "
            "`build_tok_params`",
        ),
        (_RENDERER + "tokenize_prompt_async", "read", ""),
    ],
    "vtprune_server/middleware/drain.py": [
        ("vllm.engine.protocol:EngineClient.shutdown", "replace", "waits for requests in flight"),
        ("vllm.entrypoints.launchers.launcher:serve_http", "order", "calls `shutdown` on SIGTERM"),
    ],
    "vtprune_server/media.py": [
        (
            "vllm.connections:HTTPConnection._async_client",
            "replace",
            "a client that refuses private addresses",
        ),
        ("vllm.multimodal.media.image:ImageMediaIO.load_bytes", "order", "first words of vLLM's refusals"),
    ],
    "vtprune_server/client_errors.py": [
        (
            "vllm.entrypoints.generate.base.serving:GenerateBaseServing.create_streaming_error_response",
            "replace",
            "what a stream says of an error",
        ),
        (_CHAT + "chat_completion_stream_generator", "order", "ends a stream that failed"),
        (
            "vllm.entrypoints.serve.engine.serving:BaseServing.create_error_response",
            "replace",
            "makes the errors of 0.33's chat streams",
        ),
        (_MESSAGES + "sanitize_message", "replace", "the text of an error in a messages stream"),
        (_MESSAGES + "AnthropicServingMessages.create_messages", "replace", ""),
        (_MESSAGES + "AnthropicServingMessages.count_tokens", "replace", ""),
        (
            "vllm.entrypoints.serve.exception_handling.register:init_exception_handler",
            "order",
            "ValueError, TypeError and OverflowError are 400 with their text",
        ),
    ],
    "vllm_vtprune/weight_updates.py": [
        (
            "vllm.v1.worker.gpu_worker:Worker.reload_weights",
            "replace",
            "refused, as the tower would keep the old weights",
        ),
        (
            "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc",
            "replace",
            "the same in the front end; its routes for trainers all go through it",
        ),
    ],
    "vtprune_server/engine_load.py": [
        ("vllm.v1.engine.async_llm:AsyncLLM.logger_manager", "read", "told of every step"),
        ("vllm.v1.metrics.loggers:StatLoggerManager.stat_loggers", "read", "ours is one of them"),
        (
            "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
            "order",
            "one API process alone is told of a step",
        ),
    ],
    "vtprune_server/prefetch.py": [
        (_RENDERER + "_process_multimodal_async", "replace", "runs the tower first"),
        (_RENDERER + "_process_multimodal", "read", ""),
        (_RENDERER + "_mm_executor", "read", ""),
    ],
    "vtprune_server/gate.py": [
        (
            "vllm.v1.engine.async_llm:AsyncLLM.generate",
            "replace",
            "takes what a gate decided out of the last output",
        ),
        ("vllm.outputs:RequestOutput.kv_transfer_params", "replace", "the chat route sends it on"),
    ],
    "vtprune_server/resend.py": [
        (
            "vllm.v1.engine.async_llm:AsyncLLM.generate",
            "replace",
            "sends a request again whose image was lost",
        ),
        (_ENGINE + "_handle_mm_cache_miss", "order", "an output with finish_reason 'error' and no tokens"),
    ],
}

DECLARED = [
    Use(symbol, kind, where, why) for where, entries in _BY_FILE.items() for symbol, kind, why in entries
]
