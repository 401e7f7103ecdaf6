# SPDX-License-Identifier: Apache-2.0
"""The second stage after the first, for any family, written plainly on transformers' own decoders.

    python -m tests.helpers.family_stage2 CHECKPOINT OUT    # the engine's answers to `cases`

The reference runs the decoder layer by layer on the whole sequence, at each token's own positions; nothing is
cached or batched.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers import model_runner_v2
from tests.helpers.family_cases import CLIP, LANDSCAPE, PORTRAIT, SMALL, SQUARE, TALL_CLIP
from tests.helpers.family_oracle import Judged, Oracle, Request

# here, since the processes that vLLM starts import this module again
model_runner_v2.install_from_environment()

#: Of four layers: what attention asks for twice, then all visual tokens leave.
PRUNE_LAYERS = ((2, 0.8), (3, 0.0))
WINDOW = 8
STEPS = 16


@dataclass(frozen=True)
class BothStages(Request):
    """A prompt with both stages' settings; `kv_keep` is a share for each prune layer."""

    kv_keep: tuple[float, ...] = (1.0,)
    kv_scope: str = "all"


_LINE = "First {} then {} and at last {} Which is the odd one?"
CASES = [
    BothStages("Look: {} What is this?", (LANDSCAPE,)),
    BothStages("Look: {} What is this?", (LANDSCAPE,), kv_keep=(0.5, 1.0)),
    BothStages("{} And this?", (PORTRAIT,), kv_keep=(0.4, 1.0)),
    BothStages("{} And this?", (PORTRAIT,), keep_ratio=0.35, kv_keep=(0.7, 0.4)),
    BothStages("Describe {}", (SQUARE,), aggressiveness=0.5, kv_keep=(0.6, 0.0)),
    BothStages("{}{} Equal?", (SQUARE, SMALL), kv_keep=(0.6, 0.3), kv_scope="vision"),
    BothStages(_LINE, (PORTRAIT, SMALL, LANDSCAPE), keep_ratio=0.5, kv_keep=(0.5, 0.5)),
    BothStages(_LINE, (SMALL, PORTRAIT, SMALL), kv_keep=(0.0,)),
    BothStages("Tell me something about vision tokens, at some length please.", kv_keep=(0.6, 1.0)),
]


_WATCH = "Watch <video> then {} and <video> What differs?"
#: Of families with videos, too.
VIDEO_CASES = [
    BothStages(_WATCH, (SMALL,), kv_keep=(0.5, 1.0), videos=(TALL_CLIP, CLIP)),
    BothStages(_WATCH, (SMALL,), keep_ratio=0.35, kv_keep=(0.6, 0.4), videos=(CLIP, TALL_CLIP)),
    BothStages("Watch: <video> What moves?", keep_ratio=0.5, kv_keep=(0.7, 0.0), videos=(CLIP,)),
    BothStages(
        _WATCH,
        (SMALL,),
        aggressiveness=0.5,
        kv_keep=(0.6, 0.3),
        kv_scope="vision",
        videos=(CLIP, CLIP),
        method="inflection_temporal",
    ),
]


def cases(videos: bool) -> list[BothStages]:
    """What a family is asked."""
    return [*CASES, *VIDEO_CASES * videos]


class BothStagesOracle(Oracle):
    """One checkpoint, in float32, with `PRUNE_LAYERS`."""

    @torch.inference_mode()
    def judge(self, request: Request, answer: Sequence[int]) -> Judged:
        """As `Oracle.judge`."""
        assert isinstance(request, BothStages)
        embeddings, positions, visual, levels, after, special = self.family.prompt(request)
        positions = positions if positions.dim() == 2 else positions[None]
        n = len(embeddings)
        sequence = _Sequence(self.model, embeddings, positions, visual, levels)
        kept = self._kept(sequence, request, special)
        new = torch.tensor(answer[:-1], dtype=torch.long)
        sequence.embeddings = torch.cat([embeddings, self.model.get_input_embeddings()(new)])
        tail = (after + torch.arange(len(new))).expand(len(positions), -1)
        sequence.positions = torch.cat([positions, tail], -1)
        sequence.visual = torch.cat([visual, torch.zeros(len(new), dtype=torch.bool)])
        language = self.model.model.language_model
        hidden, _ = sequence.run(kept, len(language.layers))
        return self.judged(n, language.norm(hidden[-len(answer) :]), answer)

    def _kept(self, sequence: _Sequence, request: BothStages, special: Tensor) -> list[Tensor]:
        """Prompt places in each band, from the lowest, which has all."""
        visual, n = sequence.visual, len(sequence.visual)
        asked = [request.kv_keep[min(i, len(request.kv_keep) - 1)] for i in range(len(PRUNE_LAYERS))]
        shares = []
        for own, (_, most) in zip(asked, PRUNE_LAYERS, strict=True):
            shares.append(1.0 if own >= 1 else min(own, most))
        # where all visual tokens leave, no text does anywhere
        text_stays = request.kv_scope == "vision" or 0.0 in shares
        protected = torch.arange(n) >= n - WINDOW
        protected[0] = True
        protected |= ~visual if text_stays else special & ~visual
        kept = [torch.arange(n)]
        for (layer, _), share in zip(PRUNE_LAYERS, shares, strict=True):
            here = kept[-1]
            counted = math.ceil(Decimal(str(share)) * n) if share else 0
            count = max(counted, int(protected.sum()))
            if share < 1 and count < len(here):
                scores = sequence.attention(kept, layer - 1)
                ranks = [
                    (not bool(protected[i]), -score, at)
                    for at, (i, score) in enumerate(zip(here, scores, strict=True))
                ]
                here = here[sorted(at for *_, at in sorted(ranks)[:count])]
            kept.append(here)
        return kept


class _Sequence:
    """Tokens on their way through a decoder of transformers."""

    def __init__(
        self, model: Any, embeddings: Tensor, positions: Tensor, visual: Tensor, levels: list[Tensor]
    ) -> None:
        self._language = model.model.language_model
        self.embeddings, self.positions, self.visual, self._levels = embeddings, positions, visual, levels

    def run(self, kept: list[Tensor], end: int) -> tuple[Tensor, Tensor]:
        """Layers below `end`, each band on its tokens and what follows the prompt; hidden states, places."""
        places, hidden, first = torch.arange(len(self.embeddings)), self.embeddings, 0
        edges = [layer for layer, _ in PRUNE_LAYERS][: len(kept) - 1]
        for stay, last in zip(kept, [*edges, end], strict=True):
            inside = torch.isin(places, stay) | (places >= len(kept[0]))
            hidden, places = hidden[inside], places[inside]
            rotary = self._rotary(hidden, places)
            mask = torch.full((len(hidden), len(hidden)), -torch.inf).triu(1)[None, None]
            for index in range(first, last):
                layer = self._language.layers[index]
                out = layer(hidden[None], attention_mask=mask, position_embeddings=rotary)
                hidden = (out[0] if isinstance(out, tuple) else out).view(len(places), -1)
                if index < len(self._levels):
                    hidden = hidden.index_add(0, self.visual[places].nonzero()[:, 0], self._levels[index])
            first = last
        return hidden, places

    def attention(self, kept: list[Tensor], index: int) -> list[float]:
        """What the highest band's tokens receive from the last ones in layer `index`, mean over heads."""
        hidden, places = self.run(kept, index)
        layer = self._language.layers[index]
        module, n = layer.self_attn, len(hidden)
        x = layer.input_layernorm(hidden[None])
        q = module.q_proj(x).view(1, n, -1, module.head_dim)
        k = module.k_proj(x).view(1, n, -1, module.head_dim)
        if hasattr(module, "q_norm"):
            q, k = module.q_norm(q), module.k_norm(k)
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
        q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), *self._rotary(hidden, places))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        logits = q @ k.transpose(-1, -2) * module.head_dim**-0.5 + torch.full((n, n), -torch.inf).triu(1)
        scores: list[float] = logits.softmax(-1)[0, :, -WINDOW:].mean((0, 1)).tolist()
        return scores

    def _rotary(self, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        positions = self.positions[:, places]
        rotary: tuple[Tensor, Tensor] = self._language.rotary_emb(
            hidden[None], positions[:, None] if len(positions) > 1 else positions
        )
        return rotary


def main() -> None:
    """Both bands' answers in one mixed batch, the bands traced by torch.compile."""
    from vllm import LLM, SamplingParams

    from tests.helpers import family_stage2 as importable
    from tests.helpers.kv_engine import answer, device_options
    from vllm_vtprune import engine_kwargs, request_kwargs

    checkpoint, out = Path(sys.argv[1]), sys.argv[2]
    family = Oracle(checkpoint).family
    written = ",".join(f"{layer}:{share:g}" for layer, share in PRUNE_LAYERS)
    llm = LLM(
        str(checkpoint),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=640,
        block_size=32,
        num_gpu_blocks_override=200,
        limit_mm_per_prompt={"image": 4, **dict.fromkeys(family.other_modalities, 2)},
        seed=0,
        trust_remote_code=True,
        **device_options(),
        # the score that the reference has for every family
        **engine_kwargs(prune_layers=written, window=WINDOW, score="received"),
    )
    prompts, params = [], []
    for case in importable.cases(family.prunes_videos):
        amount = {"keep_ratio": case.keep_ratio, "aggressiveness": case.aggressiveness or None}
        kv = {"kv_keep": case.kv_keep, "kv_scope": case.kv_scope}
        mm_kwargs, extra_args = request_kwargs(method=case.method, **amount, **kv)
        text = case.text.format(*[family.placeholder] * len(case.images))
        text = text.replace("<video>", family.placeholder.replace("image", "video"))
        prompt: dict[str, Any] = {"prompt": text}
        data = {"image": list(case.images), "video": list(case.videos)}
        if data := {modality: media for modality, media in data.items() if media}:
            prompt |= {"multi_modal_data": data, "mm_processor_kwargs": mm_kwargs}
        prompts.append(prompt)
        params.append(
            SamplingParams(
                temperature=0, max_tokens=STEPS, ignore_eos=True, logprobs=0, extra_args=extra_args
            )
        )
    answers = [answer(output) for output in llm.generate(prompts, params, use_tqdm=False)]
    torch.save({"answers": answers, "bands": llm.apply_model(importable.bands)[0]}, out)


def bands(model: Any) -> list[tuple[str, int, bool]]:
    """Run on the engine's model: name, layers and whether it is compiled of each band."""
    return [(type(b).__name__, len(b.layers), not b.do_not_compile) for b in model.language_model.model.bands]


if __name__ == "__main__":
    main()
