# SPDX-License-Identifier: Apache-2.0
"""What the vision tower takes of a GPU beside the engine, and which GPU a process's tower runs on.

Pure arithmetic: nothing here touches a device. The tower lives in the API process, whose memory vLLM does not
see when it fills ``gpu_memory_utilization`` with weights and KV cache; the sum computed here is what the
start-up check has it set aside (`MultiModalConfig.mm_ipc_gpu_memory_gb`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, SiglipVisionConfig

from vllm_vtprune.families.base import Family

GIB = 2**30
#: A process's CUDA context with torch's and cuBLAS's kernels, before the first tensor.
CONTEXT_BYTES = GIB // 2
#: cuBLAS's workspace of one thread, on Hopper the largest (`torch.backends.cuda`, CUBLAS_WORKSPACE_CONFIG).
WORKSPACE_BYTES = 32 * 2**20
#: Patches that one picture of a pass may have; a larger one counts as several.
PATCHES_PER_IMAGE = 1024
#: Patches of a video that a pass takes; a longer one takes several.
VIDEO_PATCHES = 16 * PATCHES_PER_IMAGE
#: Pixels of the largest picture where neither operator nor checkpoint says: as Qwen2.5-VL is published.
LARGEST_IMAGE_PIXELS = 12_845_056
#: What torch's caching allocator holds of a pass beyond what is in use at its peak.
_ALLOCATOR = 1.1
#: Elements of the attention matrices that are held at once, as `vision.attention` bounds them.
_ATTENTION_ELEMENTS = 2**26


@dataclass(frozen=True)
class TowerShape:
    """What decides how much memory a tower needs.

    Attributes:
        parameters: of tower and projector.
        hidden: width of the tower's states.
        intermediate: width of its feed-forward layers.
        heads: attention heads.
        layers: layers that run.
        view_patches: patches that attend to each other in the largest view.
        image_patches: patches of every picture; None where they depend on it.
        largest_image: patches of the largest picture, or of a video's pass.
        output: values that the cache holds for a patch.
        embedding: values that the engine is given for a patch.
        whole_matrix: attention is read from a layer's whole matrix (`families.fixed_tower`), and not in parts
            of it (`vision.attention`).
        captures: its passes can be captured as CUDA graphs.
        reads: a pass that requests usually want reads attention.
    """

    parameters: int
    hidden: int
    intermediate: int
    heads: int
    layers: int
    view_patches: int
    image_patches: int | None
    largest_image: int
    output: int
    embedding: int
    whole_matrix: bool
    captures: bool
    reads: bool

    @staticmethod
    def of(family: Family, image_pixels: int | None = None, *, videos: bool = False) -> TowerShape:
        """The shape of a checked family's tower; its modules are built without memory.

        Args:
            family: the model's adapter.
            image_pixels: the largest picture after preprocessing, where the tower takes any size.
            videos: whether they may be asked for.
        """
        config, vision = family.config, family.config.vision_config
        with torch.device("meta"):
            modules = family.build()
        hidden = int(vision.hidden_size)
        layers = sum(1 for name, _ in modules.named_modules() if _is_layer(name))
        patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
        side = getattr(vision, "image_size", None)
        side = side if side is None or isinstance(side, int) else side[0]
        merge = _patches_per_unit(config)
        largest = (image_pixels or LARGEST_IMAGE_PIXELS) // patch**2
        image: int | None = None
        if family.places() is not None and side is not None:
            image = largest = (side // patch) ** 2 + 1
        elif side is not None:  # tiles
            largest = _most_tiles(config) * ((side // patch) ** 2 + 1)
        view = largest if side is None else (side // patch) ** 2 + 1
        if videos and "video" in family.modalities:
            largest = max(largest, VIDEO_PATCHES)
        embedding = -(-family.embed_width() // merge)
        return TowerShape(
            parameters=sum(p.numel() for p in modules.parameters()),
            hidden=hidden,
            intermediate=int(vision.intermediate_size),
            heads=int(getattr(vision, "num_attention_heads", 0) or vision.num_heads),
            layers=layers,
            view_patches=view,
            image_patches=image,
            largest_image=largest,
            output=max(hidden, embedding),
            embedding=embedding,
            whole_matrix=isinstance(vision, CLIPVisionConfig | SiglipVisionConfig),
            captures=family.captures,
            reads=any(family.usual_outputs()),
        )

    def pass_patches(self, batch: int) -> int:
        """Patches in the largest pass of up to `batch` pictures, as `vision.service` fills one."""
        if self.image_patches is None:
            return max(batch * PATCHES_PER_IMAGE, self.largest_image)
        size = -(-self.image_patches // PATCHES_PER_IMAGE)
        return max(batch // size, 1) * self.image_patches

    def pass_bytes(self, batch: int, bytes_per_value: int) -> int:
        """Bytes of the largest pass at its peak, its results and their projection among them.

        An upper bound: every optional output wanted, and nothing dropped. Not in it: methods that compare
        every unit with every other, which take another 8 bytes x units^2 of a picture for themselves.
        """
        return self._peak(self.pass_patches(batch), bytes_per_value, reads=True)

    def graph_bytes(self, batch: int, bytes_per_value: int) -> int:
        """Bytes that captured passes hold for good (`vision.captured`): a pool, the input and the results.

        The pool is the largest graph's; the others are captured into the same memory, and no other pass can
        use it. 0 for a tower that is not captured, or without a batch.
        """
        if not self.captures or not batch:
            return 0
        patches, b = batch * self.view_patches, bytes_per_value
        held = patches * 2 * self.hidden * b * (1 + self.reads)
        return self._peak(patches, b, reads=self.reads) + int(_ALLOCATOR * held) + WORKSPACE_BYTES

    def _peak(self, patches: int, b: int, *, reads: bool) -> int:
        # residual and normed states, then either queries, keys and values with their rotated copies (float32)
        # and the result, or the feed-forward layer's gate, values and product
        layer = max(6 * self.hidden * b + 8 * self.hidden, 2 * self.hidden * b + 3 * self.intermediate * b)
        # a layer's queries and keys in float32, and its matrix, scaled and softmaxed
        views = -(-patches // self.view_patches)
        matrix = views * self.heads * self.view_patches**2
        matrix = matrix if self.whole_matrix else min(matrix, _ATTENTION_ELEMENTS)
        reading = 8 * self.hidden * patches + 2 * 4 * matrix if reads else 0
        results = (self.output + self.embedding) * b
        pixels = self.hidden * b  # a patch's pixels are fewer than its states
        return int(_ALLOCATOR * (patches * (layer + results + pixels) + reading))


@dataclass(frozen=True)
class TowerMemory:
    """Bytes of one device that towers take.

    Attributes:
        processes: processes with a tower on the device.
        context: of each, for CUDA.
        weights: of each, tower and projector.
        workspaces: of each, for the threads that compute.
        largest_pass: of each.
        graphs: of each, captured passes; 0 where none are.
        cache: of each, tower outputs kept on the device; 0 where they are kept on the host.
    """

    processes: int
    context: int
    weights: int
    workspaces: int
    largest_pass: int
    graphs: int
    cache: int

    @property
    def per_process(self) -> int:
        """Bytes of one process."""
        return self.context + self.weights + self.workspaces + self.largest_pass + self.graphs + self.cache

    @property
    def total(self) -> int:
        """Bytes of the device."""
        return self.processes * self.per_process

    def __str__(self) -> str:
        parts = {
            "context": self.context,
            "weights": self.weights,
            "workspaces": self.workspaces,
            "largest pass": self.largest_pass,
            "graphs": self.graphs,
            "cache": self.cache,
        }
        named = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        return f"{self.total / GIB:.2f} GiB = {self.processes} x ({named})"


def tower_memory(
    shape: TowerShape,
    *,
    processes: int,
    batch: int,
    bytes_per_value: int,
    cache_bytes: int = 0,
    threads: int = 2,
    graphs: bool = True,
) -> TowerMemory:
    """What the towers on one device take.

    Args:
        shape: the tower's.
        processes: processes with a tower there; 0 takes nothing.
        batch: most pictures in one pass (`encoder_batch`).
        bytes_per_value: of the tower's precision.
        cache_bytes: of each process's cache on the device.
        threads: that compute on the device: the tower's, and vLLM's of the processor, which selects.
        graphs: passes are captured as CUDA graphs, where they can be.
    """
    return TowerMemory(
        processes=processes,
        context=CONTEXT_BYTES,
        weights=shape.parameters * bytes_per_value,
        workspaces=threads * WORKSPACE_BYTES,
        largest_pass=shape.pass_bytes(batch, bytes_per_value),
        graphs=shape.graph_bytes(batch if graphs else 0, bytes_per_value),
        cache=cache_bytes,
    )


def device_index(
    api_rank: int, *, devices: int, replicas: int = 1, per_replica: int = 1, first: int = 0
) -> int:
    """The local GPU on which an API process runs its tower.

    API processes go round the local data-parallel replicas, and within one round its GPUs, which is how vLLM
    numbers them (`Worker.init_device`: local data-parallel rank x GPUs of a rank + local rank).

    Args:
        api_rank: of the API process; below 0 for the process that starts them.
        devices: GPUs that the process sees.
        replicas: data-parallel ranks on this machine that share the API processes.
        per_replica: GPUs of one.
        first: the first replica's first GPU.
    """
    turn, replica = divmod(max(api_rank, 0), max(replicas, 1))
    return (first + replica * per_replica + turn % max(per_replica, 1)) % devices


def most_on_one_device(api_processes: int, **layout: int) -> int:
    """Towers on the fullest GPU; arguments as `device_index`."""
    return max(Counter(device_index(rank, **layout) for rank in range(api_processes)).values())


def _is_layer(name: str) -> bool:
    """Whether a module's name is a tower's layer's: `...layers.3`, `blocks.3`, `...layer.3`."""
    parent, _, last = name.rpartition(".")
    return last.isdigit() and parent.rpartition(".")[2] in ("layers", "layer", "blocks")


def _patches_per_unit(config: Any) -> int:
    merge = getattr(config.vision_config, "spatial_merge_size", None)
    if merge is not None:
        return int(merge) ** 2
    return round(1 / float(getattr(config, "downsample_ratio", 1.0))) ** 2


def _most_tiles(config: Any) -> int:
    """Tiles of the largest picture, the whole one among them."""
    points = getattr(config, "image_grid_pinpoints", None)
    if not points:
        # transformers' `GotOcr2ImageProcessor.max_patches`, which InternVL is published with
        return 1 + int(getattr(config, "max_dynamic_patch", None) or 12)
    side = config.vision_config.image_size
    return 1 + max(int(height // side) * int(width // side) for height, width in points)
