# SPDX-License-Identifier: Apache-2.0
"""A band: consecutive decoder layers that see the same tokens, compiled as one piece.

The batch changes its length between bands, so each is compiled on its own
(`vllm.compilation.decorators.support_torch_compile`); `vllm.model_executor.models.gemma3n` compiles two
halves of a decoder likewise.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from functools import cache
from typing import Any, cast

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.sequence import IntermediateTensors


class Band(nn.Module):
    """Some of a decoder's layers, and its final norm where they are the last.

    The layers have vLLM's common signature: positions, hidden states and residual to the latter two.
    """

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        layers: Iterable[nn.Module],
        norms: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__()
        # tuples, so that the layers' weights keep the one name they have in the checkpoint
        self.layers = tuple(layers)
        self.norms = tuple(norms)


def _forward(
    self: Any,
    positions: Tensor,
    hidden_states: Tensor,
    residual: Tensor | None = None,
    deepstack: IntermediateTensors | None = None,
) -> tuple[Tensor, Tensor]:
    for index, layer in enumerate(self.layers):
        hidden_states, residual = layer(positions, hidden_states, residual)
        # as `vllm.model_executor.models.qwen3_vl.Qwen3LLMModel.forward`: level i is added after layer i
        if deepstack is not None and index < len(deepstack):
            hidden_states = hidden_states + deepstack[f"deepstack_input_embeds_{index}"]
    for norm in self.norms:
        hidden_states, residual = norm(hidden_states, residual)
    return hidden_states, residual  # type: ignore[return-value]


@cache
def band_class(index: int) -> type[Band]:
    """The class of the band of that index: one class and one code object each.

    vLLM files a compiled artefact under its forward function's qualified name and first line
    (`_model_hash_key` in `vllm.compilation.decorators`) and drops the guards that would tell two bands apart.

    Args:
        index: 0 for the lowest band.
    """
    name = f"Band{index}"
    code = _forward.__code__.replace(co_name=f"forward_{index}", co_qualname=f"{name}.forward")
    forward = types.FunctionType(code, globals(), "forward", _forward.__defaults__)
    forward.__annotations__ = dict(_forward.__annotations__)
    forward.__qualname__ = f"{name}.forward"
    cls = type(name, (Band,), {"forward": forward, "__module__": __name__})
    # M-RoPE positions are [3, rows]
    dims = {"positions": -1, "hidden_states": 0, "residual": 0, "deepstack": 0}
    return cast(type[Band], support_torch_compile(cls, dynamic_arg_dims=dims))  # type: ignore[call-overload]
