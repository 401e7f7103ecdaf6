# SPDX-License-Identifier: Apache-2.0
"""Phase 1: pretrain the CLIP tower alone.

Three losses. Contrastive: the CLS output against a caption of the scene (Radford et al. 2021, arXiv
2103.00020). Patch labels: the feature layer's patches name what they show. CLS alignment: at the feature
layer the cosine between CLS and a patch is driven up on object patches and down elsewhere, which CLIP
learns from far more pictures by itself. Most background patches are left out of the first part of the run,
which halves its cost (Li et al. 2023, arXiv 2212.00794).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel

from demo.data import ATTRIBUTES, Batch, batches
from demo.model import IGNORE, Size
from demo.optim import SAVE_EVERY_S, Log, Optimiser, load, save, schedule


@dataclass(frozen=True)
class TowerSettings:
    """Length and rates of the tower's pretraining."""

    steps: int = 1900
    batch: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.02
    masked_share: float = 0.7
    """Share of the steps in which only `visible` of the patches are shown."""
    visible: float = 0.55
    bfloat16: bool = False
    compile: bool = False


def normalise(pixels: Tensor) -> Tensor:
    """Pictures as the exported image processor feeds them: uint8 [B, S, S, 3] to float [B, 3, S, S]."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def encode(tower: CLIPVisionModel, pixels: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the tower, on the patches in `keep` [B, K] only if given.

    Returns the feature layer's states, CLS first, [B, 1 + K, width], and the CLS output [B, width]. Equal to
    `CLIPVisionModel`, but the last layer is computed for CLS alone, since nothing else of it is used.
    """
    states = tower.embeddings(pixels)
    if keep is not None:
        rows = torch.cat([torch.zeros_like(keep[:, :1]), keep + 1], 1)
        states = states.gather(1, rows[..., None].expand(-1, -1, states.shape[-1]))
    states = tower.pre_layrnorm(states)
    encoder_layers: list[Any] = list(tower.encoder.layers)
    *layers, last = encoder_layers
    for layer in layers:
        states = layer(states, None)
    normed, attention = last.layer_norm1(states), last.self_attn
    heads = (attention.num_heads, attention.head_dim)
    query, key, value = (
        project(x).unflatten(-1, heads).transpose(1, 2)
        for project, x in (
            (attention.q_proj, normed[:, :1]),
            (attention.k_proj, normed),
            (attention.v_proj, normed),
        )
    )
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    cls = states[:, :1] + attention.out_proj(mixed)
    cls = cls + last.mlp(last.layer_norm2(cls))
    return states, tower.post_layernorm(cls[:, 0])


class Heads(nn.Module):
    """What only pretraining needs: patch classifiers, a caption encoder, two contrastive projections."""

    def __init__(self, width: int, shared: int = 64) -> None:
        super().__init__()
        self.classify = nn.Linear(width, sum(ATTRIBUTES.values()))
        self.embed = nn.ModuleList(nn.Embedding(count, width) for count in ATTRIBUTES.values())
        self.describe = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.caption = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, shared))
        self.image = nn.Linear(width, shared)
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def contrast(self, cls: Tensor, objects: Tensor) -> Tensor:
        """Symmetric contrastive loss of CLS outputs [B, width] and captions [B, objects, attributes]."""
        words = sum(embed(objects[..., k]) for k, embed in enumerate(self.embed))
        present = (objects.sum(-1, keepdim=True) > 0).float()
        captions = F.normalize(self.caption((self.describe(words) * present).sum(1)), dim=-1)
        logits = F.normalize(self.image(cls), dim=-1) @ captions.T * self.log_scale.exp().clamp(max=50)
        target = torch.arange(len(cls), device=cls.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def name_patches(self, patches: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Patch-label loss of patches [B, K, width] against labels [B, K, attributes].

        Also returns, per attribute, the share of object patches that are named right.
        """
        total, right = patches.new_zeros(()), {}
        known = labels[..., 0] != IGNORE
        shown = known & (labels[..., -1] > 0)
        for k, (name, logits) in enumerate(
            zip(ATTRIBUTES, self.classify(patches).split(list(ATTRIBUTES.values()), -1), strict=True)
        ):
            on_object = F.cross_entropy(logits[shown], labels[..., k][shown])
            elsewhere = logits[known & ~shown].logsumexp(-1).sub(logits[known & ~shown][:, 0]).mean()
            total = total + on_object + 0.3 * elsewhere
            of_kind = shown & (labels[..., k] > 0)
            right[name] = (logits[of_kind].argmax(-1) == labels[..., k][of_kind]).float().mean()
        return total, right


def align(states: Tensor, prominence: Tensor) -> Tensor:
    """CLS alignment: squared error of the cosine of CLS and each patch, objects weighing as much as the rest.

    The target rises from 0.1 at an object's edge to 0.9 at the patch that shows most of it, and is 0
    elsewhere: a long tail instead of a step, so that every aggressiveness has a cut of its own.
    """
    cosine = F.cosine_similarity(states[:, :1], states[:, 1:], dim=-1)
    shown = prominence > 0
    error = (cosine - (0.1 + 0.8 * prominence**1.4) * shown) ** 2
    return 8 * (error[shown].mean() + error[~shown].mean())


def visible_patches(owner: Tensor, count: int) -> Tensor:
    """The patches that a masked step shows, [B, count] in raster order: all touched ones, then any."""
    order = torch.rand(owner.shape, device=owner.device) + (owner != -1).float()
    return order.topk(count, 1).indices.sort(1).values


def pretrain(
    tower: CLIPVisionModel, size: Size, settings: TowerSettings, folder: Path, seed: int, log: Log
) -> None:
    """Pretrain the tower in place, going on from `folder`/tower.pt where that exists."""
    torch.manual_seed(seed)
    device = next(tower.parameters()).device
    heads = Heads(size.tower_width).to(device)
    optimiser = Optimiser([tower.encoder.layers], [tower, heads], settings.lr, settings.weight_decay)
    parts: dict[str, Any] = {"tower": tower, "heads": heads, "optimiser": optimiser}
    path, step = folder / "tower.pt", 0
    if (state := load(path)) is not None:
        step = state.pop("step")
        for name, saved in state.items():
            parts[name].load_state_dict(saved)
    if step >= settings.steps:
        return
    run = torch.compile(encode) if settings.compile else encode

    def snapshot() -> None:
        save(path, {"step": step, **{name: part.state_dict() for name, part in parts.items()}})

    data, saved_at, recent = (
        batches("train", step * settings.batch, settings.batch, size.image),
        time.monotonic(),
        [],
    )
    while step < settings.steps:
        torch.manual_seed(seed + step)  # a resumed run masks the same patches
        batch = next(data)
        moved = Batch(*(getattr(batch, field).to(device) for field in Batch.__dataclass_fields__))
        keep, labels, prominence = None, moved.labels, moved.prominence
        if step < settings.masked_share * settings.steps:
            keep = visible_patches(moved.owner, round(settings.visible * size.grid**2))
            labels = labels.gather(1, keep[..., None].expand(-1, -1, labels.shape[-1]))
            prominence = prominence.gather(1, keep)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
            states, cls = run(tower, normalise(moved.pixels), keep)
        states, cls = states.float(), cls.float()
        named, right = heads.name_patches(states[:, 1:], labels)
        contrast, aligned = heads.contrast(cls, moved.objects), align(states, prominence)
        optimiser.step(named + 0.3 * contrast + aligned, schedule(step, settings.steps))
        recent.append({"patch": named, "contrast": contrast, "align": aligned, **right})
        step += 1
        if step % 50 == 0:
            means = {
                name: float(torch.stack([r[name].detach() for r in recent]).mean()) for name in recent[0]
            }
            log(phase="tower", step=step, **means)
            recent.clear()
        if time.monotonic() - saved_at > SAVE_EVERY_S:
            snapshot()
            saved_at = time.monotonic()
    snapshot()
