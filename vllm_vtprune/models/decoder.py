# SPDX-License-Identifier: Apache-2.0
"""Any full-attention decoder of vLLM in bands, with prune layers between them.

vLLM builds its own decoder; `split` then changes that instance's class, so that weights, quantisation and all
else stay the family's, and only its forward pass is ours: band by band, fewer tokens above each prune layer.
Hooks: the attributes `layers`, `norm` and `embed_input_ids` that vLLM's decoder models share (`LlamaModel`,
`Qwen2Model`, `Qwen3MoeModel` and what derives from them), and `do_not_compile` of
`vllm.compilation.decorators.support_torch_compile`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    get_tp_group,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.sequence import IntermediateTensors

from vllm_vtprune.errors import UnsupportedConfigError
from vllm_vtprune.kv_drop.bands import KVDropBands
from vllm_vtprune.kv_drop.gate import Gate, leaves, load, text_states
from vllm_vtprune.kv_drop.hooks.attention import adopt_layer
from vllm_vtprune.kv_drop.hooks.config import kv_drop_config
from vllm_vtprune.kv_drop.relevance import RELEVANCE, PrunedPrompts, Relevance, costliest, keep, rate
from vllm_vtprune.models.band import band_class
from vllm_vtprune.models.recording import Recorder


@dataclasses.dataclass
class Border:
    """A prune layer, as the forward pass knows it.

    Attributes:
        relevance: how tokens are rated here.
        queries: how many of a prompt's last tokens rate it.
        recorder: queries and keys of the layer below; None where nothing is rated anew.
        names_above: names of the attention layers of the band above.
    """

    relevance: Relevance
    queries: int
    recorder: Recorder | None
    names_above: list[str]

    def rate(self, prompts: PrunedPrompts) -> Tensor:
        """How relevant each row of the batch is, [rows] in float32; equal on all tensor-parallel ranks."""
        recorder = cast(Recorder, self.recorder)
        ranks = get_tensor_model_parallel_world_size()
        return rate(
            recorder.query[: prompts.rows],
            recorder.key[: prompts.rows],
            prompts,
            relevance=self.relevance,
            queries=self.queries,
            total_heads=recorder.query.shape[1] * ranks,
            scale=recorder.scale,
            all_reduce=tensor_model_parallel_all_reduce if ranks > 1 else None,
        )


class Buffers:
    """Memory of fixed address for what crosses from one compiled band into the next.

    With CUDA graphs the outputs of a band's last graph lie in memory that vLLM gives to the next graph
    captured (`weak_ref_tensors` in `vllm.compilation.cuda_graph`), and the graphs of the band above read the
    addresses they were captured with; Gemma3n bridges its halves likewise. M-RoPE positions cross by a buffer
    always: a compiled band knows the row stride of the ones it first saw, vLLM's own are made with one that
    differs from their length ([dims, max_tokens + 1], `vllm.v1.worker.gpu.mm.rope`), and the guard that would
    tell of another is dropped.
    """

    def __init__(self, max_tokens: int, device: torch.device, graphs: bool) -> None:
        self._max_tokens, self._device, self._graphs = max_tokens, device, graphs
        self._held: dict[tuple[int, str], Tensor] = {}
        self._positions: Tensor | None = None

    def hold(self, border: int, **tensors: Tensor) -> list[Tensor]:
        """The tensors, [rows, hidden] each, as the band above this border reads them.

        Neighbouring borders take turns at two sets: a band may write its outputs over its inputs.
        """
        if not self._graphs:
            return list(tensors.values())
        return [self._copy((border % 2, name), tensor) for name, tensor in tensors.items()]

    def _copy(self, key: tuple[int, str], tensor: Tensor) -> Tensor:
        # made in the first dummy run, which comes before vLLM measures memory and captures graphs
        if key not in self._held:
            self._held[key] = tensor.new_zeros(self._max_tokens, tensor.shape[1])
        return self._held[key][: len(tensor)].copy_(tensor)

    def positions(self, positions: Tensor) -> Tensor:
        """Positions as the bands above the first read them, [rows] or [dims, rows]."""
        if positions.ndim == 1:
            return positions
        if self._positions is None:
            self._positions = positions.new_zeros(len(positions), self._max_tokens + 1)
        return self._positions[:, : positions.shape[1]].copy_(positions)


@cache
def dropping(base: type[nn.Module]) -> type[nn.Module]:
    """The decoder's class with a forward pass in bands. One class per base."""

    class DroppingDecoder(base):  # type: ignore[misc, valid-type]
        """The decoder vLLM built; what `split` gave it is in the attributes below."""

        kv_drop: KVDropBands
        bands: nn.ModuleList
        borders: tuple[Border, ...]
        buffers: Buffers
        limits: dict[str, int]

        def forward(
            self,
            input_ids: Tensor | None,
            positions: Tensor,
            intermediate_tensors: IntermediateTensors | None = None,
            inputs_embeds: Tensor | None = None,
            deepstack_input_embeds: IntermediateTensors | None = None,
        ) -> Tensor:
            """Hidden states of every row, [rows, hidden]; zeros where a token left at a prune layer.

            No row that left is ever sampled from: a prompt's last token always stays.
            """
            if inputs_embeds is None:
                embedded: Tensor = self.embed_input_ids(input_ids)
                (inputs_embeds,) = self.buffers.hold(-1, hidden=embedded)
            context = get_forward_context()
            # without attention metadata it is a dummy run, and the present step is the last one's
            dummy = not context.attn_metadata
            x, residual = self.bands[0](positions, inputs_embeds, None, deepstack_input_embeds)
            stayed: Tensor | None = None
            scores: Tensor | None = None
            if dummy and self.kv_drop.profiling and not _capturing():
                self._profile_ratings()
            for index, border in enumerate(self.borders):
                if not dummy and index == self.kv_drop.gate_at and self.kv_drop.undecided:
                    metadata = self.kv_drop.decide(self._leaves(x, residual))
                    context = _with_metadata(context, metadata)
                prompts = None if dummy else self.kv_drop.bands[index].prompts
                if prompts is not None:
                    if border.recorder is not None and prompts.buckets:
                        scores = border.rate(prompts)
                    if prompts.cuts:
                        protected = prompts.protected if stayed is None else prompts.protected[stayed]
                        rows = keep(scores, protected, prompts)
                        self.kv_drop.bands[index].remember(rows)
                        x, residual, positions = x[rows], residual[rows], positions[..., rows]
                        stayed = rows if stayed is None else stayed[rows]
                        scores = None if scores is None else scores[rows]
                if stayed is not None:
                    context = _of_fewer_rows(context, border.names_above, len(stayed))
                else:
                    x, residual = self.buffers.hold(index, hidden=x, residual=residual)
                with override_forward_context(context):
                    x, residual = self.bands[index + 1](self.buffers.positions(positions), x, residual)
            if stayed is None:
                whole: Tensor = x
                return whole
            spread: Tensor = x.new_zeros(len(inputs_embeds), x.shape[1]).index_copy_(0, stayed, x)
            return spread

        def _leaves(self, x: Tensor, residual: Tensor) -> list[bool]:
            """What the gate decides on the step's prompts; equal on all tensor-parallel ranks.

            The host has to know, since the shapes of all that follows depend on it: one synchronisation in
            a step with such a prompt.

            Args:
                x: output of the layer below the gate's prune layer, [rows, hidden].
                residual: what it is still to be added to, [rows, hidden].
            """
            gate = cast(Gate, self.kv_drop.gate)
            texts = [slice(case.end - case.behind, case.end) for case in self.kv_drop.undecided]
            states = torch.stack([text_states(x[text].float() + residual[text].float()) for text in texts])
            decided = leaves(gate(states)).int()
            if get_tensor_model_parallel_world_size() > 1:
                decided = get_tp_group().broadcast(decided, src=0)
            return [bool(leaving) for leaving in decided.tolist()]

        def _profile_ratings(self) -> None:
            """Rate the costliest batch, once, so that vLLM's memory profile has seen it.

            Nothing is pruned in a dummy run; what is above keeps all rows, which is its costliest, too.
            """
            self.kv_drop.profiling = False
            for border in self.borders:
                if border.recorder is not None:
                    prompts = costliest(
                        **self.limits, queries=border.queries, device=border.recorder.query.device
                    )
                    keep(border.rate(prompts), prompts.protected, prompts)

    return DroppingDecoder


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _with_metadata(context: ForwardContext, metadata: dict[str, Any]) -> ForwardContext:
    """The forward context with other attention metadata for some layers."""
    if not metadata:
        return context
    before = cast(dict[str, Any], context.attn_metadata)
    return dataclasses.replace(context, attn_metadata={**before, **metadata})


def _of_fewer_rows(context: ForwardContext, names: list[str], rows: int) -> ForwardContext:
    """The forward context of a band whose batch lost rows: no graph was captured for it."""
    slots = cast(dict[str, Tensor], context.slot_mapping)
    return dataclasses.replace(
        context,
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        batch_descriptor=None,
        slot_mapping={**slots, **{name: slots[name][:rows] for name in names if name in slots}},
    )


def split(decoder: nn.Module, vllm_config: VllmConfig) -> None:
    """Cut a decoder that vLLM built into bands, before its weights are loaded.

    The model runners find the present step at the decoder's `kv_drop`.

    Args:
        decoder: the model with the layers, e.g. `LlamaModel`, not the one with the head.
        vllm_config: the engine's.

    Raises:
        UnsupportedConfigError: a decoder that is not built as vLLM's full-attention decoders are.
    """
    model: Any = decoder
    layers = list(getattr(model, "layers", ()))
    attentions = [_attention(layer) for layer in layers]
    if not layers or None in attentions or not hasattr(model, "norm"):
        raise UnsupportedConfigError(
            f"vtprune: prune_layer cannot be used with {type(model).__name__}, whose layers are not those of "
            "a decoder with full attention: leave prune_layer out."
        )
    drop = kv_drop_config(vllm_config)
    scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
    max_tokens = scheduler.max_num_batched_tokens
    device = cast(torch.device, vllm_config.device_config.device)
    dtype = cast(torch.dtype, vllm_config.model_config.dtype)
    edges = [0, *drop.prune_layers, len(layers)]
    state = KVDropBands(
        len(drop.prune_layers),
        scheduler.max_num_seqs,
        max_tokens,
        device,
        gate=None if drop.gate is None else load(drop.gate_file),
        gate_at=drop.gate,
    )
    bands, borders = [], []
    for index, (first, last) in enumerate(itertools.pairwise(edges)):
        norms = [model.norm] if last == len(layers) else []
        with set_model_tag(f"band_{index}"):
            band = band_class(index)(
                vllm_config=vllm_config, prefix=f"band_{index}", layers=layers[first:last], norms=norms
            )
        bands.append(band)
        if index == 0:
            continue
        for attention in attentions[first:last]:
            adopt_layer(attention, state.bands[index - 1])
        relevance = RELEVANCE[drop.relevance_at(index - 1)]
        recorder = None
        # at an exit the protected tokens are all that goes on
        if not relevance.inherits and drop.schedule[index - 1].share > 0:
            recorder = Recorder(
                layers[first - 1],
                attentions[first - 1],
                rotary=relevance.rotary,
                max_tokens=max_tokens,
                dtype=dtype,
                device=device,
            )
        names = [attention.layer_name for attention in attentions[first:last]]
        borders.append(Border(relevance, relevance.queries(drop.window), recorder, names))
    graphs = device.type == "cuda" and compilation.cudagraph_mode != CUDAGraphMode.NONE
    model.kv_drop, model.borders = state, tuple(borders)
    # children, since vLLM looks for compiled ones (`has_compiled_submodule` in
    # `vllm.v1.worker.gpu.cudagraph_utils`); they have none of their own, so no weight gets a second name
    model.bands = nn.ModuleList(bands)
    model.buffers = Buffers(max_tokens, device, graphs)
    model.limits = {
        "rows": max_tokens,
        "max_requests": scheduler.max_num_seqs,
        "longest": drop.longest_prompt,
    }
    model.do_not_compile = True
    model.__class__ = dropping(cast(Hashable, type(model)))


def _attention(layer: nn.Module) -> Any:
    """The layer's `Attention`; None if it has none, or several."""
    found = [module for module in layer.modules() if isinstance(module, Attention)]
    return found[0] if len(found) == 1 else None
