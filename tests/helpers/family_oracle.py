# SPDX-License-Identifier: Apache-2.0
"""What stage 1 must answer, family by family, written plainly on transformers' own models.

The whole prompt's embeddings and positions are computed as for the unpruned prompt, then the dropped rows are
cut out of both. Nothing is cached or batched, and nothing is shared with the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.video_utils import VideoMetadata
from transformers.vision_utils import get_vision_window_index

#: A view's grid and the attention [rows, columns] its units receive.
Received = list[tuple[tuple[int, int], Tensor]]


@dataclass(frozen=True)
class Request:
    """A prompt with one ``{}`` per picture and one ``<video>`` per video, and stage 1's settings."""

    text: str
    images: tuple[Image.Image, ...] = ()
    keep_ratio: float | None = None
    aggressiveness: float = 0.0
    videos: tuple[Any, ...] = ()
    method: str = "inflection"


@dataclass(frozen=True)
class Judged:
    """The prompt's length, the best token after each prefix of the answer, and its log-probability.

    Attributes:
        answered: log-probability of the answer's own tokens.
    """

    prompt_tokens: int
    token_ids: list[int]
    logprobs: list[float]
    answered: list[float]


class Oracle:
    """One checkpoint, in float32."""

    def __init__(self, checkpoint: Path) -> None:
        # a format that transformers does not read has its weights beside it in one that it does
        chat = (checkpoint / "hf").is_dir()
        checkpoint = checkpoint / "hf" if chat else checkpoint
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor: Any = AutoProcessor.from_pretrained(checkpoint)
        family = InternVLChat if chat else _FAMILIES[self.model.config.model_type]
        self.family: Family = family(self.model, self.processor)

    @torch.inference_mode()
    def embeddings(self, image: Image.Image) -> Tensor:
        """[T, E] of the unpruned image, deepstack levels side by side."""
        return self.family.embeddings(self.family.preprocess([image]))[0]

    @torch.inference_mode()
    def received(self, image: Image.Image) -> Received:
        """Per view, attention received in the last layer that compares all of its units."""
        return self.family.received(self.family.preprocess([image]), 0)

    @torch.inference_mode()
    def judge(self, request: Request, answer: Sequence[int]) -> Judged:
        """The greedy answer is `answer` exactly if `token_ids` are, by induction over the tokens."""
        embeddings, positions, visual, levels, after, _ = self.family.prompt(request)
        n = embeddings.shape[0]
        new = torch.tensor(answer[:-1], dtype=torch.long)
        embeddings = torch.cat([embeddings, self.model.get_input_embeddings()(new)])
        tail = (after + torch.arange(len(new))).expand(*positions.shape[:-1], -1)
        positions = torch.cat([positions, tail], -1)
        extra = {}
        if levels:
            mask = torch.cat([visual, torch.zeros(len(new), dtype=torch.bool)])
            extra = {"visual_pos_masks": mask[None], "deepstack_visual_embeds": levels}
        positions = positions[:, None] if positions.dim() == 2 else positions[None]
        hidden = self.model.model.language_model(
            inputs_embeds=embeddings[None], position_ids=positions, **extra
        ).last_hidden_state[0, n - 1 :]
        return self.judged(n, hidden, answer)

    def judged(self, prompt_tokens: int, hidden: Tensor, answer: Sequence[int]) -> Judged:
        """From the hidden states [answer, D] that each of the answer's tokens was chosen from."""
        logprobs = self.model.lm_head(hidden).float().log_softmax(-1)
        best = logprobs.max(-1)
        answered = logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]
        return Judged(prompt_tokens, best.indices.tolist(), best.values.tolist(), answered.tolist())


class Family:
    """Base: how a family's prompt is built."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.whole, self.model, self.config, self.processor = model, model.model, model.config, processor

    def preprocess(self, images: Sequence[Image.Image]) -> Any:
        return self.processor(text=[self.placeholder * len(images)], images=list(images), return_tensors="pt")

    placeholder: str
    #: What stands for an image's embeddings among the tokens, where that is not the placeholder.
    token: str | None = None
    #: Modalities beside images, which the tests allow none of.
    other_modalities: tuple[str, ...] = ()
    #: Whether videos are pruned, so that this reference knows them.
    prunes_videos = False
    #: Tokens of the tests' longest prompt with its answer: the context, and what the KV cache holds.
    room = 352

    def embeddings(self, inputs: Any) -> list[Tensor]:
        raise NotImplementedError

    def received(self, inputs: Any, image: int) -> Received:
        raise NotImplementedError

    def video(self, inputs: Any, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Frames' units [F, N, D], the attention [F, N] they receive, and embeddings [T, E] of a video."""
        raise NotImplementedError

    def places(self, inputs: Any, image: int) -> tuple[list[Tensor], Tensor]:
        """Per view the places [N] of its units among the image's, and the places of what always stays."""
        raise NotImplementedError

    def stays(self, inputs: Any, image: int, request: Request) -> Tensor:
        """Bool [T]."""
        units, fixed = self.places(inputs, image)
        mask = torch.zeros(sum(len(u) for u in units) + len(fixed), dtype=torch.bool)
        mask[fixed] = True
        for (_, scores), places in zip(self.received(inputs, image), units, strict=True):
            flat = scores.flatten()
            kept = flat.sort(descending=True, stable=True).indices[: count(flat, request)]
            mask[places[kept]] = True
        return mask

    def prompt(self, request: Request) -> tuple[Any, ...]:
        """Of what is left: embeddings, positions, if visual, levels, the next position, if special."""
        inputs = self.inputs(request)
        ids = inputs["input_ids"][0]
        embeddings = self.whole.get_input_embeddings()(ids)
        stays, visual = torch.ones(len(ids), dtype=torch.bool), torch.zeros(len(ids), dtype=torch.bool)
        deep: list[Tensor] = []
        of_images = [self.stays(inputs, i, request) for i in range(len(request.images))]
        videos = [self.video(inputs, i) for i in range(len(request.videos))]
        of_videos = [frames_stay(units, scores, request) for units, scores, _ in videos]
        for token, rows, kept in (
            (self.config.image_token_id, self.embeddings(inputs) if request.images else [], of_images),
            (getattr(self.config, "video_token_id", None), [r for *_, r in videos], of_videos),
        ):
            if not rows:
                continue
            places, values = ids == token, torch.cat(rows)
            visual |= places
            stays[places] = torch.cat(kept)
            width = embeddings.shape[-1]
            embeddings[places] = values[:, :width]
            whole = torch.zeros(len(ids), values.shape[1] - width)
            whole[places] = values[:, width:]
            deep.append(whole)
        levels = list(sum(deep)[visual & stays].split(width, -1)) if deep and deep[0].shape[1] else []
        positions, after = self.positions(inputs, ids, stays)
        return embeddings[stays], positions, visual[stays], levels, after, self.special(ids)[stays]

    def special(self, ids: Tensor) -> Tensor:
        """Which tokens are special, placeholders aside."""
        placeholders = {self.config.image_token_id, getattr(self.config, "video_token_id", None)}
        return torch.isin(ids, torch.tensor([*set(self.processor.tokenizer.all_special_ids) - placeholders]))

    def inputs(self, request: Request) -> Any:
        text = request.text.format(*[self.placeholder] * len(request.images))
        text = text.replace("<video>", self.placeholder.replace("image", "video"))
        given: dict[str, Any] = {}
        if request.videos:
            told = [{k: v for k, v in t.items() if k != "do_sample_frames"} for _, t in request.videos]
            given = {
                "videos": [frames for frames, _ in request.videos],
                "video_metadata": [VideoMetadata(**one) for one in told],
                "do_sample_frames": False,
            }
        return self.processor(text=[text], images=list(request.images) or None, return_tensors="pt", **given)

    def positions(self, inputs: Any, ids: Tensor, stays: Tensor) -> tuple[Tensor, int]:
        """Contiguous."""
        n = int(stays.sum())
        return torch.arange(n), n


class Qwen(Family):
    """Both generations: units of 2x2 patches in raster order; true three-dimensional positions."""

    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    other_modalities = ("video",)
    prunes_videos = True

    def embeddings(self, inputs: Any) -> list[Tensor]:
        return self.features(inputs["pixel_values"], inputs["image_grid_thw"])

    def features(self, pixels: Tensor, grid: Tensor) -> list[Tensor]:
        features = self.model.get_image_features(pixels, grid)
        levels = [torch.cat(list(level)) for level in getattr(features, "deepstack_features", None) or ()]
        rows = torch.cat([torch.cat(list(features.pooler_output)), *levels], -1)
        return list(rows.split((grid.prod(-1) // 4).tolist()))

    def received(self, inputs: Any, image: int) -> Received:
        grid = inputs["image_grid_thw"]
        pixels = inputs["pixel_values"].split(grid.prod(-1).tolist())[image]
        units = self.attention(pixels, grid[image : image + 1])
        return [((units.shape[0], units.shape[1]), units)]

    def video(self, inputs: Any, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Each frame through the tower as a picture of its own."""
        grid = inputs["video_grid_thw"]
        pixels = inputs["pixel_values_videos"].split(grid.prod(-1).tolist())[number]
        frames = pixels.chunk(int(grid[number, 0]))
        alone = torch.cat((torch.ones(1, dtype=torch.long), grid[number, 1:]))[None]
        scores = torch.stack([self.attention(frame, alone).flatten() for frame in frames])
        rows = torch.cat([self.features(frame, alone)[0] for frame in frames])
        # what is compared between frames: what the merger takes, where there is one apart
        units = rows
        if hasattr(self.config.vision_config, "fullatt_block_indexes"):
            units = torch.cat([self.unmerged(frame, alone) for frame in frames])
        return units.view(len(frames), scores.shape[1], -1), scores, rows

    def unmerged(self, pixels: Tensor, grid: Tensor) -> Tensor:
        tower, seen = self.model.visual, []
        hook = tower.merger.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        tower(pixels, grid_thw=grid)
        hook.remove()
        units = seen[0].reshape(len(pixels) // 4, -1)
        return torch.empty_like(units).index_copy(0, self.window(grid), units)

    def window(self, grid: Tensor) -> Tensor:
        tower = self.model.visual
        found: Tensor = get_vision_window_index(
            grid, spatial_merge_size=2, window_size=tower.window_size, patch_size=tower.patch_size
        )[0]
        return found

    def attention(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """[rows, columns] that the units of one picture receive."""
        tower, seen = self.model.visual, {}
        hook = tower.blocks[-1].attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs, hidden_states=args[0]), with_kwargs=True
        )
        tower(pixels, grid_thw=grid)
        hook.remove()
        attention = tower.blocks[-1].attn
        q, k, _ = (
            attention.qkv(seen["hidden_states"])
            .double()
            .view(len(pixels), 3, attention.num_heads, -1)
            .unbind(1)
        )
        cos, sin = (t.double()[:, None] for t in seen["position_embeddings"])

        def rotate(x: Tensor) -> Tensor:
            half = x.shape[-1] // 2
            return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) * q.shape[-1] ** -0.5
        units = scores.softmax(-1).mean((0, 1)).view(-1, 4).mean(1)
        if hasattr(self.config.vision_config, "fullatt_block_indexes"):
            units = torch.empty_like(units).index_copy(0, self.window(grid), units)
        rows, columns = (int(side) // 2 for side in grid[0, 1:])
        return units.view(rows, columns)

    def places(self, inputs: Any, image: int) -> tuple[list[Tensor], Tensor]:
        units = int(inputs["image_grid_thw"][image].prod()) // 4
        return [torch.arange(units)], torch.arange(0)

    def positions(self, inputs: Any, ids: Tensor, stays: Tensor) -> tuple[Tensor, int]:
        if "video_grid_thw" in inputs:
            return self.positions_with_videos(inputs, ids, stays)
        if "image_grid_thw" not in inputs:
            return torch.arange(len(ids)).expand(3, -1), len(ids)
        positions, _ = self.model.get_rope_index(
            ids[None], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
        )
        return positions[:, 0, stays], int(positions.max()) + 1

    def positions_with_videos(self, inputs: Any, ids: Tensor, stays: Tensor) -> tuple[Tensor, int]:
        """VLLM's own: the text behind a video goes on behind its last position in time, too.

        Transformers' goes on behind the longer side of a frame, however long the video.
        """
        grids = {
            self.config.image_token_id: [[1, *grid[1:], 1.0] for grid in inputs.get("image_grid_thw", ())]
        }
        videos: list[Any] = []
        for number, (frames, rows, columns) in enumerate(inputs["video_grid_thw"].tolist()):
            if "second_per_grid_ts" in inputs:
                step = (
                    float(inputs["second_per_grid_ts"][number]) * self.config.vision_config.tokens_per_second
                )
                videos.append([frames, rows, columns, step])
            else:  # a frame between texts of its own
                videos += [[1, rows, columns, 1.0]] * frames
        grids[self.config.video_token_id] = videos
        blocks, at, i = [], 0, 0
        while i < len(ids):
            block = torch.full((3, 1), at)
            if int(ids[i]) in grids:
                frames, rows, columns, step = (float(n) for n in grids[int(ids[i])].pop(0))
                sides = torch.arange(frames), torch.arange(rows // 2), torch.arange(columns // 2)
                block = torch.stack(torch.meshgrid(*sides, indexing="ij")).flatten(1)
                block[0] = (block[0] * step).floor()
                block = block.long() + at
            blocks.append(block)
            at, i = int(block.max()) + 1, i + block.shape[1]
        return torch.cat(blocks, 1)[:, stays], at


class Llava(Family):
    """One picture, or a small whole one and tiles: rows of the large picture end in a newline that stays."""

    placeholder = "<image>"

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self.side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        self.tiled = hasattr(self.config, "image_grid_pinpoints")
        if self.config.model_type == "llava_onevision":
            self.other_modalities, self.prunes_videos, self.room = ("video",), True, 512

    def preprocess(self, images: Sequence[Image.Image]) -> list[Any]:
        return [self.processor.image_processor([image], return_tensors="pt") for image in images]

    def embeddings(self, inputs: list[Any]) -> list[Tensor]:
        sizes = ({"image_sizes": one["image_sizes"]} if self.tiled else {} for one in inputs)
        layer, strategy = self.config.vision_feature_layer, self.config.vision_feature_select_strategy
        ratio = {"vision_aspect_ratio": "anyres_max_9"} if self.other_modalities else {}
        return [
            self.model.get_image_features(
                one["pixel_values"],
                vision_feature_layer=layer,
                vision_feature_select_strategy=strategy,
                **size,
                **ratio,
            ).pooler_output[0]
            for one, size in zip(inputs, sizes, strict=True)
        ]

    def scores(self, one: Any) -> Tensor:
        """[tiles, P] attention received in the feature layer, CLS aside."""
        pixels = one["pixel_values"].flatten(0, -4)
        attentions = self.model.vision_tower(pixels, output_attentions=True).attentions
        received = attentions[self.config.vision_feature_layer].double().mean((1, 2))
        return received[:, received.shape[1] - self.side**2 :]

    def pack(self, one: Any, values: Tensor) -> Tensor:
        """[T] of values [tiles, P], newlines as -1."""
        arguments = ["default"] if self.config.model_type == "llava_next" else []
        (packed,), _ = self.model.pack_image_features(
            [values.float()[..., None]], one["image_sizes"], *arguments, image_newline=torch.tensor([-1.0])
        )
        return packed[:, 0]

    def units(self, one: Any) -> list[tuple[tuple[int, int], Tensor, Tensor]]:
        """Per view its grid, its units' scores and their places."""
        scores, patches = self.scores(one), self.side**2
        views = [((self.side, self.side), scores[0].view(self.side, self.side), torch.arange(patches))]
        if not self.tiled:
            return views
        packed = self.pack(one, scores)[patches:]
        columns = int((packed == -1).nonzero()[0]) if len(packed) else 0
        large = packed.view(-1, columns + 1)[:, :-1]
        places = patches + torch.arange(len(packed)).view(-1, columns + 1)[:, :-1]
        # which tile the middle of each unit is in, by LLaVA-NeXT's packing of the patches' numbers
        numbers = torch.arange(scores.numel(), dtype=torch.float64).view(scores.shape)
        (whole,), _ = LlavaNextModel.pack_image_features(
            SimpleNamespace(config=self.config),
            [numbers[..., None]],
            one["image_sizes"],
            "default",
            torch.tensor([-1.0], dtype=torch.float64),
        )
        whole = whole[patches:, 0]
        wide = int((whole == -1).nonzero()[0])
        whole = whole.view(-1, wide + 1)[:, :-1]
        rows = ((torch.arange(large.shape[0]) + 0.5) * whole.shape[0] / large.shape[0]).long()
        across = ((torch.arange(columns) + 0.5) * wide / columns).long()
        owner = whole[rows][:, across].long() // patches
        for tile in sorted(set(owner.flatten().tolist())):
            mine = owner == tile
            grid = (int(mine.any(1).sum()), int(mine.any(0).sum()))
            views.append((grid, large[mine].view(grid), places[mine]))
        return views

    def received(self, inputs: list[Any], image: int) -> Received:
        return [(grid, scores.double()) for grid, scores, _ in self.units(inputs[image])]

    def places(self, inputs: list[Any], image: int) -> tuple[list[Tensor], Tensor]:
        units = [places for _, _, places in self.units(inputs[image])]
        total = len(self.embeddings(inputs)[image])
        taken = torch.cat(units)
        return units, torch.tensor(
            [p for p in range(total) if p not in set(taken.tolist())], dtype=torch.long
        )

    def around(self, image: list[int]) -> list[int]:
        """The tokens of an image with whatever text stands around them."""
        return image

    def video(self, inputs: Any, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """OneVision's: each frame a picture of one tile, shrunk by half; a newline behind the last."""
        pixels = self.processor.video_processor([inputs[number][0]], return_tensors="pt").pixel_values_videos
        layer, strategy = self.config.vision_feature_layer, self.config.vision_feature_select_strategy
        rows = self.model.get_video_features(
            pixels, vision_feature_layer=layer, vision_feature_select_strategy=strategy
        ).pooler_output.flatten(0, -2)
        attentions = self.model.vision_tower(pixels[0], output_attentions=True).attentions
        received = attentions[layer].double().mean((1, 2)).view(-1, 1, self.side, self.side)
        scores = torch.nn.functional.avg_pool2d(received, 2).flatten(1)
        return rows[:-1].view(*scores.shape, -1), scores, rows

    def prompt(self, request: Request) -> tuple[Any, ...]:
        text = request.text.format(*[self.token or self.placeholder] * len(request.images))
        inputs = self.preprocess(request.images)
        rows = self.embeddings(inputs)
        kept = [r[self.stays(inputs, i, request)] for i, r in enumerate(rows)]
        videos = [self.video(request.videos, i) for i in range(len(request.videos))]
        newline = torch.ones(1, dtype=torch.bool)
        frames = [r[torch.cat((frames_stay(u, s, request), newline))] for u, s, r in videos]
        placeholder, video = self.config.image_token_id, getattr(self.config, "video_token_id", None)
        given, ids = {placeholder: iter(kept), video: iter(frames)}, []
        rows = []
        for token in self.processor.tokenizer(text).input_ids:
            if token in given:
                rows.append(next(given[token]))
                ids += self.around([token] * len(rows[-1]))
            else:
                ids.append(token)
        tokens = torch.tensor(ids)
        visual = torch.isin(tokens, torch.tensor([i for i in given if i is not None]))
        embeddings = self.whole.get_input_embeddings()(tokens)
        embeddings[visual] = torch.cat([*rows, embeddings[:0]])
        n = len(embeddings)
        return embeddings, torch.arange(n), visual, [], n, self.special(tokens)


class InternVL(Llava):
    """Tiles, then a thumbnail, each of 2x2 units, between two tokens that stay."""

    placeholder = "<IMG_CONTEXT>"
    other_modalities = ("video",)

    def __init__(self, model: Any, processor: Any) -> None:
        Family.__init__(self, model, processor)
        vision = self.config.vision_config
        self.side, self.tiled = vision.image_size[0] // vision.patch_size[0], False

    def embeddings(self, inputs: list[Any]) -> list[Tensor]:
        return [
            self.model.get_image_features(
                one["pixel_values"], vision_feature_layer=-1, vision_feature_select_strategy="default"
            ).pooler_output.flatten(0, 1)
            for one in inputs
        ]

    def units(self, one: Any) -> list[tuple[tuple[int, int], Tensor, Tensor]]:
        attentions = self.model.vision_tower(one["pixel_values"], output_attentions=True).attentions
        received = attentions[-1].double().mean((1, 2))[:, 1:].view(-1, 1, self.side, self.side)
        units = torch.nn.functional.avg_pool2d(received, 2)[:, 0]
        grid = (self.side // 2, self.side // 2)
        count = grid[0] * grid[1]
        return [(grid, scores, tile * count + torch.arange(count)) for tile, scores in enumerate(units)]

    def around(self, image: list[int]) -> list[int]:
        return [self.processor.start_image_token_id, *image, self.processor.end_image_token_id]


class InternVLChat(InternVL):
    """Its tiles are cut and resized by code of the checkpoint's, of which vLLM has a copy."""

    placeholder = "<image>"
    token = "<IMG_CONTEXT>"

    def preprocess(self, images: Sequence[Image.Image]) -> list[Any]:
        from vllm.transformers_utils.processors.internvl import image_to_pixel_values_internvl

        cut = {"min_num": 1, "max_num": 6, "use_thumbnail": True}
        tiles = [image_to_pixel_values_internvl(image, input_size=56, **cut) for image in images]
        return [{"pixel_values": one} for one in tiles]


class Mistral3(Family):
    """Units of 2x2 patches in raster order; rows end in tokens of the language model's own."""

    placeholder = "[IMG]"

    def embeddings(self, inputs: Any) -> list[Tensor]:
        features = self.model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], vision_feature_layer=-1
        )
        return list(features.pooler_output)

    def received(self, inputs: Any, image: int) -> Received:
        height, width = inputs["image_sizes"][image].tolist()
        pixels = inputs["pixel_values"][image : image + 1, :, :height, :width]
        attentions = self.model.vision_tower(pixels, output_attentions=True).attentions
        patch = self.config.vision_config.patch_size
        patches = attentions[-1].double().mean((1, 2)).view(1, height // patch, width // patch)
        units = torch.nn.functional.avg_pool2d(patches, 2)[0]
        return [((units.shape[0], units.shape[1]), units)]

    def places(self, inputs: Any, image: int) -> tuple[list[Tensor], Tensor]:
        side = 2 * self.config.vision_config.patch_size
        return [torch.arange(int((inputs["image_sizes"][image] // side).prod()))], torch.arange(0)


_FAMILIES: dict[str, type[Family]] = {
    "qwen2_5_vl": Qwen,
    "qwen3_vl": Qwen,
    "qwen3_vl_moe": Qwen,
    "qwen3_5": Qwen,
    "llava": Llava,
    "llava_next": Llava,
    "llava_onevision": Llava,
    "internvl": InternVL,
    "mistral3": Mistral3,
}


def frames_stay(units: Tensor, scores: Tensor, request: Request) -> Tensor:
    """Bool [F * N]: which units [F, N, D] of a video stay, by the scores [F, N]."""
    frames, n = scores.shape
    counts = [count(row, request) for row in scores]
    mask = torch.zeros(frames, n, dtype=torch.bool)
    if request.method == "inflection":
        for frame, (row, kept) in enumerate(zip(scores, counts, strict=True)):
            mask[frame, row.sort(descending=True, stable=True).indices[:kept]] = True
        return mask.flatten()
    values: list[tuple[float, int, int]] = []
    for frame in range(frames):
        for place in range(n):
            change = 1.0
            if frame:
                before, now = units[frame - 1, place].double(), units[frame, place].double()
                change = 1 - float(before @ now / before.norm() / now.norm())
            share = float((scores[frame] <= scores[frame, place]).sum()) / n
            values.append((change * share, frame, place))
    # the best of each frame first, then the video's best
    best = [max(v for v in values if v[1] == frame) for frame in range(frames)]
    for _, frame, place in (best + sorted((v for v in values if v not in best), reverse=True))[: sum(counts)]:
        mask[frame, place] = True
    return mask.flatten()


def count(scores: Tensor, request: Request) -> int:
    """How many of a view's units stay."""
    n = len(scores)
    if request.keep_ratio is not None:
        return max(1, math.ceil(Decimal(str(request.keep_ratio)) * n))
    if request.aggressiveness == 0:
        return n
    curve = scores.sort(descending=True).values.double()
    y = (curve - curve[-1]) / (curve[0] - curve[-1])
    x = torch.arange(n, dtype=torch.float64) / (n - 1)
    slope = request.aggressiveness / (1 - request.aggressiveness)
    cut = int((y + min(slope, 1) * x).argmin()) + 1
    return math.ceil(round(cut / max(slope, 1), 6))
