# SPDX-License-Identifier: Apache-2.0
"""A family's tower and projector on one device: images in, what selection needs out, kept units projected."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_vtprune.errors import CheckpointError
from vllm_vtprune.families.base import Family, Item, Kept, Projected, TowerOutput
from vllm_vtprune.families.registry import family_of
from vllm_vtprune.vision.captured import CudaGraphs, Graphs, Record
from vllm_vtprune.vision.checkpoint import load_vision_weights, refuse_missing_parts
from vllm_vtprune.vision.transfer import to_device, wait_for

logger = logging.getLogger(__name__)


class VisionEncoder:
    """Tower and projector of one checkpoint; one pass of the tower at a time.

    Attributes:
        family: the adapter.
        modules: what `Family.build` made, with the checkpoint's weights.
        device: where they run.
        dtype: their precision.
    """

    def __init__(self, family: Family, modules: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.family = family
        self.device = device
        self.dtype = dtype
        _move(modules, device, dtype)
        self.modules: Any = modules.eval().requires_grad_(False)
        # multiply-adds of the tower's matrix products, for one patch
        self._work_per_patch = sum(p.numel() for p in modules.parameters())
        self._lock = threading.Lock()

    @staticmethod
    def load(
        config: Any,
        model: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        revision: str | None = None,
        download_dir: str | None = None,
        dummy: bool = False,
        graphs: int = 0,
        record: Record | None = None,
    ) -> VisionEncoder:
        """Build the encoder from the same checkpoint as the engine.

        Args:
            config: the checkpoint's configuration.
            model: local folder or hub id.
            device: where tower and projector run.
            dtype: their precision.
            revision: of a hub id.
            download_dir: cache folder of the hub client.
            dummy: random weights, for vLLM's `--load-format dummy`.
            graphs: the largest batch whose passes are captured as CUDA graphs, where the device has such; 0:
                none are.
            record: captures, in place of CUDA.

        Raises:
            CheckpointError: a model that is not pruned; weights are missing or have other shapes than the
                configuration says.
        """
        family = family_of(config)
        with torch.device("cpu"):
            modules = family.build()
        if not dummy:
            weights = load_vision_weights(model, family.rename, revision=revision, download_dir=download_dir)
            _assign(modules, family.arrange(weights), family, model)
        logger.info("vtprune: vision tower and projector on %s, %s", device, dtype)
        encoder = VisionEncoder(family, modules, device, dtype)
        if record is None and device.type == "cuda":
            record = CudaGraphs()
        captured = Graphs(graphs, record) if graphs and record is not None else None
        if captured is not None and not family.captures:
            logger.info("vtprune: the vision tower runs without CUDA graphs: its pictures differ in size.")
            captured = None
        with torch.inference_mode():
            like = torch.empty(0, device=device, dtype=dtype)
            family.warm_up(encoder.modules, like, family.usual_outputs(), captured)
        return encoder

    @torch.inference_mode()
    def encode(self, items: Sequence[Item], outputs: frozenset[str] = frozenset()) -> list[TowerOutput]:
        """Run the tower.

        Args:
            items: images, preprocessed.
            outputs: the optional outputs wanted, of `families.base.OPTIONAL_OUTPUTS`.

        Returns:
            One `TowerOutput` per image, each in memory of its own, so that one can be freed without the rest.

        Raises:
            ValueError: what the adapter returned does not hold together.
        """
        with self._lock:
            encoded = self.family.encode(self.modules, to_device(items, self.device, self.dtype), outputs)
            if self.device.type == "cuda":
                # the caller wants the outputs and not their launch, and its seconds those of the pass
                wait_for(self.device)
        for output in encoded:
            if sum(view.grid[0] * view.grid[1] for view in output.views) != output.patches.shape[0]:
                raise ValueError("the tower's views do not hold as many units as it computed")
        return [
            dataclasses.replace(
                output,
                on_host=item.on_host,
                places=item.places or output.patches.shape[0],
                modality=item.modality,
            )
            for output, item in zip(encoded, items, strict=True)
        ]

    @torch.inference_mode()
    def project(self, images: Sequence[Kept]) -> list[Projected]:
        """What the engine is given of several images: embeddings [k', E] and their places [k'] among the T.

        Raises:
            ValueError: embeddings, places and the unpruned count do not fit, which the engine cannot survive.
        """
        projected = self.family.project(self.modules, images)
        for kept, (embeddings, places) in zip(images, projected, strict=True):
            whole, count = kept.units.shape[0] == kept.output.patches.shape[0], places.shape[0]
            fits = count == kept.output.places if whole else 1 <= count <= kept.output.places
            if embeddings.shape[0] != count or not fits:
                raise ValueError(
                    f"{embeddings.shape[0]} embeddings and {count} places for an image of "
                    f"{kept.output.places}: the tower's adapter does not fit this checkpoint"
                )
        return projected

    def patches(self, item: Item) -> int:
        """Patches that the tower sees of an image."""
        return self.family.patches(item)

    def work(self, item: Item) -> int:
        """Multiply-adds of the tower for one image."""
        return self.family.patches(item) * self._work_per_patch


def _move(modules: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    # buffers keep their precision: frequencies of rotary embeddings are float32 in every model
    for parameter in modules.parameters():
        parameter.data = parameter.data.to(device, dtype)
    for module in modules.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _assign(modules: nn.Module, weights: dict[str, Tensor], family: Family, model: str) -> None:
    wanted = modules.state_dict()
    # layers above the feature layer are in the file and not needed; position ids are a buffer of old files
    given = {name: tensor for name, tensor in weights.items() if name in wanted}
    refuse_missing_parts(model, given, family.prefixes)
    missing = [name for name in wanted if name not in given and not name.endswith("position_ids")]
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks {len(missing)} weights of the vision tower or its projector (first: "
            f"{missing[0]}): config.json and weights do not belong together."
        )
    for name, tensor in given.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{name} of the vision tower has shape {tuple(tensor.shape)}, the configuration says "
                f"{tuple(wanted[name].shape)}: config.json and weights do not belong together."
            )
    modules.load_state_dict(given, strict=False, assign=True)
