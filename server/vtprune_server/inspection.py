# SPDX-License-Identifier: Apache-2.0
"""`GET /vtprune/config` and `POST /vtprune/explain`: what this server does, and why these tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, Field
from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from vllm_vtprune import demo_model
from vllm_vtprune.context import plugin_context
from vllm_vtprune.errors import SettingsError
from vllm_vtprune.fingerprint import cached_fingerprint
from vllm_vtprune.selection.registry import get_method
from vllm_vtprune.settings import Controls
from vllm_vtprune.vision.explain import Explanation, explain
from vllm_vtprune.vision.features import servable_scores
from vllm_vtprune.vision.processor import PrunedProcessor
from vtprune_server.context import current_request, refusal
from vtprune_server.limits import ServerLimits
from vtprune_server.question import with_question
from vtprune_server.routes import HEADER_PARAMETERS, VTPRUNE_SCHEMA, prune_headers


class ExplainRequest(BaseModel):
    """An image and the settings to explain."""

    image_url: str = Field(min_length=1, description="A data: URL, or one the server may fetch.")
    vtprune: Any = Field(None, json_schema_extra=VTPRUNE_SCHEMA)
    question: str = Field("", description="What is asked of it, for a method that reads the question.")


@dataclass(frozen=True)
class ExplainResponse(Explanation):
    """An explanation, and the settings it was made with."""

    settings: dict[str, Any]


def attach_inspection_routes(app: FastAPI) -> None:
    """Add both routes."""
    app.add_api_route("/vtprune/config", show_config, methods=["GET"], tags=["vtprune"])
    app.add_api_route(
        "/vtprune/explain",
        explain_image,
        methods=["POST"],
        tags=["vtprune"],
        dependencies=[Depends(prune_headers)],
        openapi_extra=HEADER_PARAMETERS,
    )


async def show_config(raw_request: Request) -> dict[str, Any]:
    """The effective policy, the model's facts and the versions."""
    state = raw_request.app.state
    processor = _processor(state)
    model_config = state.engine_client.model_config
    hf_config = model_config.hf_config
    context = plugin_context(model_config)
    tower, family = processor.vision, processor.family
    grid = family.unpruned_grid()
    vision, text = hf_config.vision_config, model_config.hf_text_config
    return {
        "policy": context.policy.model_dump(mode="json"),
        "model": {
            "id": state.openai_serving_models.model_name(),
            "demo": demo_model.embedded(model_config.model) is not None,
            "architecture": hf_config.architectures[0],
            # null where they depend on the picture
            "vision_tokens_per_image": family.places(),
            "grid": None if grid is None else list(grid),
            "image_size": getattr(vision, "image_size", None),
            "patch_size": vision.patch_size,
            # what is pruned; of the rest all tokens stay
            "modalities": list(family.modalities),
            "scores": list(servable_scores(family)),
            "default_score": family.default_score,
            "default_method": family.default_method,
            # the shares that the presets are named for were measured on the demo model's tower alone
            "presets_calibrated": model_config.model == str(demo_model.FOLDER),
            "decoder_layers": text.num_hidden_layers,
            "decoder": _decoder(model_config),
            "weights": await asyncio.to_thread(_weights, model_config),
            "prune_layer": context.policy.prune_layer,
            "prune_gate": None if context.policy.gate is None else context.policy.gate[0],
            "prune_layers": [dataclasses.asdict(prune_layer) for prune_layer in context.policy.schedule],
            "encoder_device": str(tower.device),
            "encoder_dtype": str(tower.dtype).removeprefix("torch."),
        },
        "limits": _limits(model_config),
        "presets": {name: dataclasses.asdict(preset) for name, preset in context.policy.presets.items()},
        "auto": {"level": state.vtprune_auto.level, "levels": list(state.vtprune_auto.levels)},
        "methods": list(context.policy.methods),
        "reads_question": [name for name in context.policy.methods if get_method(name).reads_question],
        "versions": _versions(),
    }


async def explain_image(request: ExplainRequest, raw_request: Request) -> ExplainResponse:
    """Score an image's vision tokens and show which stay, without generating anything."""
    state = raw_request.app.state
    processor = _processor(state)
    model_config = state.engine_client.model_config
    context = current_request.get()
    try:
        controls = Controls.from_mapping(request.vtprune)
        if context is not None:
            controls = context.headers.over(controls)
        level = state.vtprune_auto.level if hasattr(state, "vtprune_auto") else None
        settings = plugin_context(model_config).policy.resolve(controls, level)
    except SettingsError as error:
        raise refusal(error) from error
    settings = with_question(settings, request.question)
    mm_config = model_config.multimodal_config
    # as vLLM's chat parser loads it: the same URLs are refused, the same pixels decoded
    connector = MEDIA_CONNECTOR_REGISTRY.load(
        envs.VLLM_MEDIA_CONNECTOR,
        media_io_kwargs=mm_config.media_io_kwargs,
        allowed_local_media_path=model_config.allowed_local_media_path,
        allowed_media_domains=model_config.allowed_media_domains,
    )
    image = await connector.fetch_image_async(request.image_url)
    explanation = await asyncio.to_thread(
        explain, processor, image, settings.vision, mm_config.media_io_kwargs
    )
    return ExplainResponse(**dataclasses.asdict(explanation), settings=settings.as_dict())


def _processor(state: Any) -> PrunedProcessor:
    processor = state.engine_client.renderer.mm_processor
    if not isinstance(processor, PrunedProcessor):
        raise VLLMValidationError("This server's model takes no images that vtprune prunes.")
    return processor


def _decoder(model_config: Any) -> dict[str, int]:
    """What of the decoder decides its cost, as `vtprune_eval.flops.CostShape` names it."""
    text = model_config.hf_text_config
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    # of a mixture of experts, the part that a token passes
    experts = getattr(text, "num_experts_per_tok", None)
    per_expert = getattr(text, "moe_intermediate_size", None)
    return {
        "hidden": text.hidden_size,
        "intermediate": experts * per_expert if experts and per_expert else text.intermediate_size,
        "layers": text.num_hidden_layers,
        "q_width": heads * head,
        "kv_width": (getattr(text, "num_key_value_heads", None) or heads) * head,
        "vocab": text.vocab_size,
        "element": model_config.dtype.itemsize,
    }


def _weights(model_config: Any) -> str | None:
    """The fingerprint that schedules name their model by; None for made-up weights."""
    context = plugin_context(model_config)
    if context.dummy_weights:
        return None
    return cached_fingerprint(model_config.model, model_config.revision, context.download_dir)


def _limits(model_config: Any) -> dict[str, Any]:
    """The limits in force: what vLLM enforces is asked of vLLM, whose own flag or variable may have won."""
    limits = ServerLimits.from_environ(os.environ).model_dump(mode="json")
    return {
        **limits,
        "max_images": model_config.multimodal_config.get_limit_per_prompt("image"),
        "max_image_megapixels": envs.VLLM_MAX_IMAGE_PIXELS / 1e6,
        "media_domains": list(model_config.allowed_media_domains or ()),
    }


def _versions() -> dict[str, str]:
    import torch
    import transformers
    from vllm.version import __version__ as vllm_version

    from vllm_vtprune import __version__

    return {
        "vtprune": __version__,
        "vllm": vllm_version,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
