# SPDX-License-Identifier: Apache-2.0
"""Which architectures are pruned, by which adapter and which class in the engine. Imported when chosen."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

from vllm_vtprune.errors import CheckpointError
from vllm_vtprune.families.base import Family


@dataclass(frozen=True, slots=True)
class Entry:
    """One architecture, as `architectures` in config.json names it.

    Attributes:
        family: "module:class" of the adapter, in `vllm_vtprune.families`.
        model: "module:class" of the class that vLLM's registry is given, in `vllm_vtprune.models`.
    """

    family: str
    model: str

    def load_family(self) -> type[Family]:
        """The adapter's class."""
        module, name = self.family.split(":")
        return cast(type[Family], getattr(import_module(f"vllm_vtprune.families.{module}"), name))


ARCHITECTURES: dict[str, Entry] = {
    "LlavaForConditionalGeneration": Entry("llava:Llava", "llava:PrunedLlava"),
    "LlavaNextForConditionalGeneration": Entry("anyres:LlavaNext", "anyres:PrunedLlavaNext"),
    "LlavaOnevisionForConditionalGeneration": Entry("anyres:LlavaOnevision", "anyres:PrunedLlavaOnevision"),
    "Qwen2_5_VLForConditionalGeneration": Entry("qwen_vl:Qwen2_5VL", "qwen_vl:PrunedQwen2_5VL"),
    "Qwen3VLForConditionalGeneration": Entry("qwen_vl:Qwen3VL", "qwen_vl:PrunedQwen3VL"),
    "Qwen3VLMoeForConditionalGeneration": Entry("qwen_vl:Qwen3VL", "qwen_vl:PrunedQwen3VLMoe"),
    "Qwen3_5ForConditionalGeneration": Entry("qwen_vl:Qwen3_5", "qwen_vl:PrunedQwen3_5"),
    "Qwen3_5MoeForConditionalGeneration": Entry("qwen_vl:Qwen3_5", "qwen_vl:PrunedQwen3_5Moe"),
    "InternVLForConditionalGeneration": Entry("internvl:InternVL", "internvl:PrunedInternVL"),
    "InternVLChatModel": Entry("internvl:InternVLChat", "internvl:PrunedInternVLChat"),
    "Mistral3ForConditionalGeneration": Entry("mistral:Mistral3", "mistral:PrunedMistral3"),
}


#: What is served by vLLM alone, as every other architecture is, and why.
REFUSED: dict[str, str] = {
    "Gemma3ForConditionalGeneration": "its 256 tokens a picture attend both ways in some layers",
    "Gemma4ForConditionalGeneration": "its 280 tokens a picture attend both ways in some layers",
    "PixtralForConditionalGeneration": "prompts in Mistral's own format come with their placeholders; serve "
    "the checkpoint's Hugging Face format",
}


def family_of(config: Any) -> Family:
    """The adapter for a checkpoint's configuration, checked.

    Raises:
        CheckpointError: the architecture is not in `ARCHITECTURES`, or its adapter refuses the configuration.
    """
    names = list(getattr(config, "architectures", None) or ())
    entry = next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), None)
    if entry is None:
        name = names[0] if names else "model without an architecture"
        why = f" ({REFUSED[name]})" if name in REFUSED else ""
        raise CheckpointError(f"vtprune prunes no {name}{why}; it prunes {', '.join(ARCHITECTURES)}.")
    family = entry.load_family()(config)
    family.check()
    return family
