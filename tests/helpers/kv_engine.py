# SPDX-License-Identifier: Apache-2.0
"""A real engine on a small checkpoint, in this process, with what the scenarios of stage 2 ask of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tests.helpers import model_runner_v2
from tests.reference import Request

# here, since the processes that vLLM starts import this module again
model_runner_v2.install_from_environment()

#: `cuda` has the engines run on a GPU, with CUDA graphs; see `tests.cuda`.
DEVICE = "VTPRUNE_TEST_DEVICE"


def device_options() -> dict[str, Any]:
    """What engines are given beside a scenario's own: nothing on the CPU.

    On a GPU the only backend for float32, and a fixed amount of memory: several engines share the device, and
    vLLM's measuring of what is free does not bear that.
    """
    if os.environ.get(DEVICE) != "cuda":
        return {}
    memory = {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.04}
    return {"enforce_eager": False, "attention_backend": "TRITON_ATTN", **memory}


class Engine:
    """vLLM's `LLM` on a small checkpoint, with what the scenarios ask of it."""

    def __init__(
        self,
        checkpoint: str,
        *,
        prune_layer: int | None = None,
        prune_layers: str = "",
        relevance: str = "attention",
        prune_gate: str = "",
        kv_reuse: bool = False,
        default_preset: str = "off",
        plugin: bool = True,
        **kwargs: Any,
    ):
        from vllm import LLM

        from vllm_vtprune import engine_kwargs

        policy = {
            "prune_layer": prune_layer,
            "prune_layers": prune_layers,
            "relevance": relevance,
            "prune_gate": prune_gate,
            "kv_reuse": kv_reuse,
            "default_preset": default_preset,
        }
        self.llm = LLM(
            checkpoint,
            dtype="float32",
            **{
                "enforce_eager": True,
                "max_num_seqs": 16,
                "max_model_len": 1024,
                "max_num_batched_tokens": 1024,
                "limit_mm_per_prompt": {"image": 4},
                "disable_log_stats": False,
                **device_options(),
                **(engine_kwargs(**policy) if plugin else {}),
                **kwargs,
            },
        )
        self.plugin = plugin
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool

    def prompt(self, request: Request) -> dict[str, Any]:
        from vllm_vtprune import request_kwargs

        tokens = self.llm.get_tokenizer()(request.prompt, add_special_tokens=False).input_ids
        prompt: dict[str, Any] = {"prompt_token_ids": [*tokens, *request.then]}
        if request.images:
            prompt["multi_modal_data"] = {"image": list(request.images)}
            ratio = {"keep_ratio": request.keep_ratio}
            knee = {"aggressiveness": request.aggressiveness}
            if self.plugin:
                prompt["mm_processor_kwargs"] = request_kwargs(**(ratio if request.keep_ratio else knee))[0]
        return prompt

    def params(self, request: Request, **kwargs: Any) -> Any:
        from vllm import SamplingParams

        from vllm_vtprune import request_kwargs

        refused = {} if request.kv_gate else {"kv_gate": "off"}
        if not request.kv_reuse:
            refused["kv_reuse"] = "off"
        extra_args = request_kwargs(
            kv_keep=request.kv_keep, kv_scope=request.kv_scope, first_turn=request.first_turn, **refused
        )[1]
        defaults = {
            "temperature": 0,
            "max_tokens": request.max_tokens,
            "ignore_eos": True,
            "logprobs": 0,
            "extra_args": extra_args if self.plugin else None,
        }
        return SamplingParams(**{**defaults, **kwargs})

    def run(self, requests: Sequence[Request], **kwargs: Any) -> list[dict[str, Any]]:
        """Answers of a batch given all at once."""
        outputs = self.llm.generate(
            [self.prompt(r) for r in requests], [self.params(r, **kwargs) for r in requests], use_tqdm=False
        )
        return [answer(o) for o in outputs]

    def metric(self, name: str) -> float:
        """The value of one of vLLM's own counters."""
        return float(next(m.value for m in self.llm.get_metrics() if m.name == name))

    def blocks(self, request_id: str) -> list[int]:
        """Blocks the request holds, by KV-cache group."""
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return [len(m.req_to_blocks.get(request_id, ())) for m in managers]

    def steps(self) -> Iterator[None]:
        """Run what was added, giving back control after every step."""
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()
            yield

    def add(self, request: Request, request_id: str, **kwargs: Any) -> None:
        self.llm.llm_engine.add_request(request_id, self.prompt(request), self.params(request, **kwargs))

    def drive(
        self, requests: Mapping[str, Request], after: Callable[[int], None] = lambda step: None
    ) -> dict[str, Any]:
        """Answers of a batch given all at once, by id; `after` is called after every step."""
        for request_id, request in requests.items():
            self.add(request, request_id)
        answers: dict[str, Any] = {}
        step = 0
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                if output.finished:
                    answers[output.request_id] = answer(output)
            after(step)
            step += 1
        return answers

    def internal_id(self, request_id: str) -> str:
        """The id the engine made of it: vLLM appends to the ids it is given."""
        return next(i for i in self.scheduler.requests if i.startswith(f"{request_id}-"))

    @property
    def runner(self) -> Any:
        """The model runner; the engine's only rank must run in this process."""
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def is_v2(self) -> bool:
        """Whether it is Model Runner V2, by its class."""
        return any(c.__module__ == "vllm.v1.worker.gpu.model_runner" for c in type(self.runner).__mro__)

    @property
    def drops(self) -> Any:
        """What the worker keeps of each request, by internal id; V2's is in its model state."""
        return (self.runner.model_state if self.is_v2 else self.runner)._drops


def answer(output: Any, index: int = 0) -> dict[str, Any]:
    """One completion as plain values."""
    completion = output.outputs[index]
    ids = list(completion.token_ids)
    logprobs = completion.logprobs and [d[t].logprob for d, t in zip(completion.logprobs, ids, strict=True)]
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "cached": output.num_cached_tokens,
        "tokens": ids,
        "logprobs": logprobs,
        "text": completion.text,
        "finish": completion.finish_reason,
        "gate": ((output.kv_transfer_params or {}).get("vtprune") or {}).get("leaves"),
    }


def refusal(engine: Engine, request: Request, **kwargs: Any) -> str:
    """What `LLM.generate` raises for a request; empty if it answers."""
    from vllm.exceptions import VLLMValidationError

    try:
        engine.run([request], **kwargs)
    except VLLMValidationError as error:
        return str(error)
    return ""
