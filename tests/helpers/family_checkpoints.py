# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of the families, of true structure: what vLLM and transformers load like any other.

    python -m tests.helpers.family_checkpoints OUT [NAME ...]

One token per byte and the special tokens. The weights are larger than usual, so that attention is far from
uniform and a wrong position or row shows in the tokens; head sizes of tower and decoder differ. With
`published` a checkpoint has the tiles, patches and pixel limits of the published models, and as many vision
tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tests.helpers.checkpoint_llava import llava_next, llava_onevision, llava_siglip
from tests.helpers.checkpoint_qwen import qwen2_5_vl, qwen3_5, qwen3_vl, qwen3_vl_moe
from tests.helpers.checkpoint_tiles import internvl, internvl_chat, mistral3

CHECKPOINTS: dict[str, Callable[..., Path]] = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "llava_siglip": llava_siglip,
    "qwen3_5": qwen3_5,
    "internvl": internvl,
    "internvl_chat": internvl_chat,
    "mistral3": mistral3,
}

if __name__ == "__main__":
    for chosen in sys.argv[2:] or CHECKPOINTS:
        print(CHECKPOINTS[chosen](Path(sys.argv[1]) / chosen))
