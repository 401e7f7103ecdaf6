# SPDX-License-Identifier: Apache-2.0
"""Llama for vLLM in two halves, with the prune layer between them.

The layers are `vllm.model_executor.models.llama`'s own; layer K-1 also returns the queries and keys that rate
the prompt's tokens. Each half is compiled on its own (`support_torch_compile`), since the batch changes its
length between them; `vllm.model_executor.models.gemma3n` compiles two halves of a decoder likewise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
)
from vllm.sequence import IntermediateTensors

from vllm_vtprune.kv_drop.hooks.attention import adopt_layer
from vllm_vtprune.kv_drop.hooks.config import kv_drop_config
from vllm_vtprune.kv_drop.relevance import RELEVANCE, PrunedPrompts, kept_rows
from vllm_vtprune.kv_drop.step import KVDropState


class RatingLlamaAttention(LlamaAttention):
    """`LlamaAttention` that also returns its queries and keys.

    Attributes:
        rate_rotary: return them after rotary embedding; before it otherwise.
    """

    rate_rotary = True

    def forward(  # type: ignore[override]
        self, positions: Tensor, hidden_states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`LlamaAttention.forward`; output, queries [rows, heads * size], keys [rows, kv_heads * size]."""
        qkv, _ = self.qkv_proj(hidden_states)
        plain_q, plain_k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if not self.rate_rotary:
            # vLLM's rotary embedding may write in place
            plain_q, plain_k = plain_q.clone(), plain_k.clone()
            q, k = self.rotary_emb(positions, plain_q.clone(), plain_k.clone())
        else:
            q, k = self.rotary_emb(positions, plain_q, plain_k)
            plain_q, plain_k = q, k
        output, _ = self.o_proj(self.attn(q, k, v))
        return output, plain_q, plain_k


class RatingLlamaDecoderLayer(LlamaDecoderLayer):
    """Decoder layer K-1: `LlamaDecoderLayer` that also returns queries and keys."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=RatingLlamaAttention)

    def forward(  # type: ignore[override]
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`LlamaDecoderLayer.forward`; hidden states, residual, queries, keys."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states, q, k = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual, q, k


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden_states": 0})
class LayersBelow(nn.Module):
    """Layers 0 to K-1."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layers: Iterable[nn.Module]) -> None:
        super().__init__()
        # a tuple, so that the layers' weights keep the one name they have in the checkpoint
        self.layers = tuple(layers)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Hidden states, residual, and layer K-1's queries and keys, each [rows, ...]."""
        residual = None
        for layer in self.layers[:-1]:
            hidden_states, residual = layer(positions, hidden_states, residual)
        below: tuple[Tensor, ...] = self.layers[-1](positions, hidden_states, residual)
        return below


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden_states": 0, "residual": 0})
class LayersAbove(nn.Module):
    """Layers of index K and more, and the final norm."""

    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", layers: Iterable[nn.Module], norm: nn.Module
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.norms = (norm,)

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor) -> Tensor:
        """Normed hidden states, [rows, hidden]."""
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        hidden_states, _ = self.norms[0](hidden_states, residual)
        return hidden_states


class KVDropLlamaModel(nn.Module):
    """`vllm.model_executor.models.llama.LlamaModel` whose upper layers see the kept tokens only.

    Attributes:
        kv_drop: the present step, written by the model runner before each forward pass.
    """

    hf_to_vllm_mapper = LlamaModel.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        drop = kv_drop_config(vllm_config)
        self.config = config
        self.relevance = RELEVANCE[drop.relevance]
        self.queries = self.relevance.queries(drop.window)

        def layer(prefix: str) -> nn.Module:
            rates = extract_layer_index(prefix) == drop.prune_layer - 1
            return (RatingLlamaDecoderLayer if rates else LlamaDecoderLayer)(vllm_config, prefix)

        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers, layer, prefix=f"{prefix}.layers"
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rating = cast(RatingLlamaAttention, self.layers[drop.prune_layer - 1].self_attn)
        self.rating.rate_rotary = self.relevance.rotary
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )
        with set_model_tag("layers_below"):
            self.below = LayersBelow(
                vllm_config=vllm_config, prefix=f"{prefix}.below", layers=self.layers[: drop.prune_layer]
            )
        with set_model_tag("layers_above"):
            self.above = LayersAbove(
                vllm_config=vllm_config,
                prefix=f"{prefix}.above",
                layers=self.layers[drop.prune_layer :],
                norm=self.norm,
            )
        scheduler = vllm_config.scheduler_config
        device = cast(torch.device, vllm_config.device_config.device)
        self.kv_drop = KVDropState(scheduler.max_num_seqs, scheduler.max_num_batched_tokens, device)
        self.bridge: Tensor | None = None
        if device.type == "cuda" and vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            shape = (2, scheduler.max_num_batched_tokens, config.hidden_size)
            dtype = cast(torch.dtype, vllm_config.model_config.dtype)
            self.bridge = torch.zeros(shape, dtype=dtype, device=device)
        attention = [cast(LlamaAttention, layer.self_attn).attn for layer in self.layers[drop.prune_layer :]]
        for layer_above in attention:
            adopt_layer(layer_above, self.kv_drop)
        self.names_above = [layer_above.layer_name for layer_above in attention]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Token embeddings, [rows, hidden]."""
        embeddings: Tensor = self.embed_tokens(input_ids)
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of every row, [rows, hidden]; zeros where a token left at the prune layer.

        No row that left is ever sampled from: a prompt's last token always stays.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("A forward pass needs input_ids or inputs_embeds.")
            inputs_embeds = self.embed_input_ids(input_ids)
        hidden_states, residual, q, k = self.below(positions, inputs_embeds)
        hidden_states, residual = self._cross(hidden_states, residual)
        context = get_forward_context()
        prompts = self.kv_drop.prompts
        # without attention metadata it is a dummy run, and the present step is the last one's
        if prompts is None or not context.attn_metadata:
            normed: Tensor = self.above(positions, hidden_states, residual)
            return normed

        rows = self._kept_rows(q, k, prompts)
        with override_forward_context(self._context_above(context, len(rows))):
            kept = self.above(positions[rows], hidden_states[rows], residual[rows])
        output: Tensor = kept.new_zeros(hidden_states.shape).index_copy_(0, rows, kept)
        return output

    def _cross(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """With CUDA graphs, copies in buffers of fixed address, which the graphs of the layers above read.

        The outputs of the last graph below lie in memory that vLLM gives to the next graph captured
        (`weak_ref_tensors` in `vllm.compilation.cuda_graph`); Gemma3n bridges its halves likewise.
        """
        if self.bridge is None:
            return hidden_states, residual
        n = len(hidden_states)
        return self.bridge[0, :n].copy_(hidden_states), self.bridge[1, :n].copy_(residual)

    def _context_above(self, context: ForwardContext, rows: int) -> ForwardContext:
        """The forward context of a batch that lost rows: no graph was captured for it."""
        slots = cast(dict[str, Tensor], context.slot_mapping)
        above = {name: slots[name][:rows] for name in self.names_above if name in slots}
        return dataclasses.replace(
            context,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            batch_descriptor=None,
            slot_mapping={**slots, **above},
        )

    def _kept_rows(self, q: Tensor, k: Tensor, prompts: PrunedPrompts) -> Tensor:
        attention = self.rating
        parallel = get_tensor_model_parallel_world_size() > 1
        rows = kept_rows(
            q.view(-1, attention.num_heads, attention.head_dim),
            k.view(-1, attention.num_kv_heads, attention.head_dim),
            prompts,
            queries=self.queries,
            total_heads=attention.total_num_heads,
            scale=attention.scaling,
            all_reduce=tensor_model_parallel_all_reduce if parallel else None,
        )
        self.kv_drop.remember(rows)
        return rows

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As `LlamaModel.load_weights`."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


class KVDropLlamaForCausalLM(LlamaForCausalLM):
    """`vllm.model_executor.models.llama.LlamaForCausalLM` around `KVDropLlamaModel`."""

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = LlamaDecoderLayer
    ) -> KVDropLlamaModel:
        return KVDropLlamaModel(vllm_config=vllm_config, prefix=prefix)
