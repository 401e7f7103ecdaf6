# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2's CUDA graphs acted out on the CPU: FULL ones of decode batches, and piecewise ones.

A replay of a full graph runs the forward pass once more with the very objects it was captured with: dummy
metadata, padded batch. Only what lies in tensors that were written in place is of the present step, which is
what a CUDA graph is. CPU attention plans its threads on the host; that plan alone is made anew, from those
same tensors. A replay of a band's piecewise graphs runs the band with the tensors of its capture, whatever it
is given, and gives the capture's outputs; attention, which stands between the pieces, sees the present step.

Not acted out: the graphs' memory, the metadata of CUDA's attention backends.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager

SIZES = [1, 2, 4, 8, 16]
#: Beside those, for batches that hold prompts.
MIXED_SIZES = [32, 128, 512, 1024]


class ActedGraph:
    """In the place of a `torch.cuda.CUDAGraph`.

    Attributes:
        replays: how often it was replayed.
    """

    def __init__(self, forward: Any, runner: Any) -> None:
        self.forward, self.runner, self.replays = forward, runner, 0

    def replay(self) -> None:
        if any(band.prompts is not None for band in self.runner.model.kv_drop.bands):
            raise RuntimeError("a graph was replayed in a step that prunes a prompt")
        self.replays += 1
        metadata = inspect.getclosurevars(self.forward).nonlocals["attn_metadata"]
        for one in {id(m): m for m in metadata.values()}.values():
            one.plan_again(one)
        self.forward(CUDAGraphMode.NONE)


class ActedBand(nn.Module):
    """A compiled band whose piecewise graphs are acted out, as `vllm.compilation.cuda_graph` replays them.

    All graphs share a pool, and vLLM keeps no hold on a graph's outputs (`weak_ref_tensors`): what the band
    below gave lies in memory that this band's graphs write.

    Attributes:
        replays: how often they were replayed.
    """

    def __init__(self, band: nn.Module, below: ActedBand | None) -> None:
        super().__init__()
        self.band, self.replays = band, 0
        self._below = () if below is None else (below,)  # no child of this one
        self._captured: dict[int, tuple[Any, Any]] = {}

    def forward(self, *args: Any) -> Any:
        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return self.band(*args)
        size = context.batch_descriptor.num_tokens
        if size not in self._captured:
            self._captured[size] = args, self.band(*args)
            return self._captured[size][1]
        self.replays += 1
        for below in self._below:
            for tensor in below._captured[size][1]:
                tensor.fill_(1.0)
        then, outputs = self._captured[size]
        for output, value in zip(outputs, self.band(*then), strict=True):
            output.copy_(value)
        return outputs


class ActedGraphs:
    """An engine's V2 runner with acted graphs for decode batches of up to 16.

    Args:
        runner: the engine's.
        piecewise: graphs of the bands too, for batches that hold prompts; they must be compiled.
    """

    def __init__(self, runner: Any, *, piecewise: bool = False) -> None:
        self._runner = runner
        _remember_how_to_plan()
        type(current_platform).get_global_graph_pool = classmethod(lambda cls: None)
        CudaGraphManager.capture = _capture  # type: ignore[method-assign]
        compilation = runner.vllm_config.compilation_config
        mode = CUDAGraphMode.FULL_AND_PIECEWISE if piecewise else CUDAGraphMode.FULL_DECODE_ONLY
        sizes = SIZES + MIXED_SIZES if piecewise else SIZES
        compilation.cudagraph_mode = mode
        compilation.cudagraph_capture_sizes = sizes
        compilation.max_cudagraph_capture_size = sizes[-1]
        self.bands: list[ActedBand] = []
        if piecewise:
            decoder = runner.model.language_model.model
            for index, band in enumerate(decoder.bands):
                self.bands.append(ActedBand(band, self.bands[-1] if self.bands else None))
                decoder.bands[index] = self.bands[-1]
        self.manager = runner.cudagraph_manager = ModelCudaGraphManager(
            runner.vllm_config, runner.device, mode, 1
        )
        self.manager.acted_runner = runner
        self.capture()

    @property
    def replays(self) -> int:
        """How often any of them was replayed."""
        return sum(graph.replays for graph in self.manager.graphs.values())

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture all of them anew."""
        r = self._runner
        self.manager.graphs.clear()
        for band in self.bands:
            band._captured.clear()
        self.manager.capture(
            r.model, r.model_state, r.input_buffers, None, r.block_tables, r.attn_groups, r.kv_cache_config
        )


def _capture(self: Any, create_forward_fn: Any, progress_bar_desc: str = "") -> None:
    """`CudaGraphManager.capture`, as it calls the function, without a device."""
    for desc in self._capture_descs.get(CUDAGraphMode.PIECEWISE, ()):
        forward = create_forward_fn(desc, warmup=True)
        forward(CUDAGraphMode.NONE)
        forward(CUDAGraphMode.PIECEWISE)
    for desc in self._capture_descs[CUDAGraphMode.FULL]:
        create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
        forward = create_forward_fn(desc, warmup=False)
        forward(CUDAGraphMode.NONE)
        self.graphs[desc] = ActedGraph(forward, self.acted_runner)
    self._graphs_captured = True


def _remember_how_to_plan() -> None:
    build = cpu_attn.CPUAttentionMetadataBuilder.build

    def remembering(self: Any, *args: Any, **kwargs: Any) -> Any:
        metadata: Any = build(self, *args, **kwargs)

        def plan_again(m: Any) -> None:
            m.scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(m.seq_lens),
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                seq_lens=m.seq_lens,
                dtype=self.dtype,
                query_start_loc=m.query_start_loc,
                causal=m.causal,
                sliding_window_size=self.window_size,
                isa=self.isa,
                enable_kv_split=False,
                dynamic_causal=None,
                kv_cache_dtype=self.kv_cache_dtype,
            )

        metadata.plan_again = plan_again
        return metadata

    cpu_attn.CPUAttentionMetadataBuilder.build = remembering
