# SPDX-License-Identifier: Apache-2.0
"""The configuration that a checkpoint in InternVL's chat format brings along: `checkpoint_tiles` copies it.

Fields as in the published checkpoints' `configuration_internvl_chat.py`, those that vLLM reads.
"""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig


class InternVisionConfig(PreTrainedConfig):  # type: ignore[misc,unused-ignore]
    """The tower's; every published checkpoint names the rest."""

    model_type = "intern_vit_6b"

    def __init__(
        self,
        num_channels: int = 3,
        hidden_act: str = "gelu",
        norm_type: str = "layer_norm",
        initializer_factor: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_channels = num_channels
        self.hidden_act = hidden_act
        self.norm_type = norm_type
        self.initializer_factor = initializer_factor


class InternVLChatConfig(PreTrainedConfig):  # type: ignore[misc,unused-ignore]
    """The whole model's. As in the published class, there is none without its parts."""

    model_type = "internvl_chat"
    has_no_defaults_at_init = True

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        llm_config: dict[str, Any] | None = None,
        select_layer: int = -1,
        dynamic_image_size: bool = True,
        use_thumbnail: bool = True,
        ps_version: str = "v2",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        assert vision_config is not None and llm_config is not None
        self.vision_config = InternVisionConfig(**vision_config)
        self.llm_config = CONFIG_MAPPING[llm_config["model_type"]](**llm_config)
        self.select_layer = select_layer
        self.dynamic_image_size = dynamic_image_size
        self.use_thumbnail = use_thumbnail
        self.ps_version = ps_version
