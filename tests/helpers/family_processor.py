# SPDX-License-Identifier: Apache-2.0
"""The multimodal processor that vLLM builds for a checkpoint, with the plugin loaded and no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.model_inspection import inspect_here


def processor_of(folder: Path, **options: Any) -> Any:
    """For up to 16 pictures a prompt; `options` are vLLM's engine arguments."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.plugins import load_general_plugins
    from vllm.tokenizers import get_tokenizer

    inspect_here()
    load_general_plugins()
    given: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 2048,
        "limit_mm_per_prompt": {"image": 16},
        "trust_remote_code": True,  # InternVL's chat format brings its configuration class along
        **options,
    }
    config = EngineArgs(str(folder), **given).create_engine_config()
    return MULTIMODAL_REGISTRY.create_processor(config.model_config, tokenizer=get_tokenizer(str(folder)))


def placeholder_of(processor: Any, images: int = 1) -> str:
    """A prompt about so many pictures, by the checkpoint's chat template."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    text: str = processor.info.get_tokenizer().apply_chat_template(messages, tokenize=False)
    return text
