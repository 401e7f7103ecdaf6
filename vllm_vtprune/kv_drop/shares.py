# SPDX-License-Identifier: Apache-2.0
"""What a share keeps: how many tokens stay above each prune layer, and which stay in any case.

The engine's plans (`vllm_vtprune.kv_drop.plan`), evaluations and benchmarks all count by these. Nothing here
knows of vLLM or torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vllm_vtprune.contract import KVScope
from vllm_vtprune.kv_drop.schedule import PruneLayer
from vllm_vtprune.settings import KVSettings
from vllm_vtprune.share import share_of


def protected_positions(
    token_ids: Sequence[int],
    placeholders: Sequence[tuple[int, int]],
    special_ids: frozenset[int],
    scope: KVScope,
    window: int,
) -> NDArray[np.bool_]:
    """Positions that stay whatever their relevance.

    The first token, special tokens outside the placeholders, the last `window` tokens, and with
    ``kv_scope=vision`` every token outside the placeholders. A token counts as visual by its position, never
    by its id: text can spell the placeholder's token.

    Args:
        token_ids: the prompt, [n].
        placeholders: (offset, length) of each run of visual tokens.
        special_ids: the tokenizer's special tokens, the image placeholder aside.
        scope: what competes; see `scope_of`.
        window: how many of the last tokens stay; see `plan.tail_of`.

    Returns:
        Mask, [n].
    """
    n = len(token_ids)
    image = np.zeros(n, dtype=bool)
    for offset, length in placeholders:
        image[offset : offset + length] = True
    if scope == "vision":
        protected = ~image
    else:
        protected = np.isin(np.asarray(token_ids, dtype=np.int64), list(special_ids)) & ~image
    protected[:1] = True
    protected[max(0, n - window) :] = True
    return protected


def shares_of(settings: KVSettings, schedule: Sequence[PruneLayer]) -> tuple[PruneLayer, ...]:
    """What a request keeps at each prune layer: the smaller of its own share and the schedule's.

    The last of its shares holds for the prune layers that follow. A share of 1 drops nothing there, whatever
    the schedule says, and 0 is the exit.
    """
    asked = settings.shares
    shares = []
    for index, prune_layer in enumerate(schedule):
        own = asked[min(index, len(asked) - 1)]
        share = 1.0 if own >= 1 else min(own, prune_layer.share)
        shares.append(replace(prune_layer, share=share, of=prune_layer.of if share else "vision"))
    return tuple(shares)


def scope_of(settings: KVSettings, shares: Sequence[PruneLayer], *, gated: bool = False) -> KVScope:
    """What competes at every prune layer.

    Where one counts visual tokens alone, no text may leave at any: how much of it is left there would be
    known on the device only.

    Args:
        settings: the request's.
        shares: what it keeps at each prune layer.
        gated: a gate decides on its prompt (`plan.gate_asks`), after which all text must be there.
    """
    vision = gated or any(share.of == "vision" and share.share < 1 for share in shares)
    return "vision" if vision else settings.scope


def tokens_kept(prompt_tokens: int, visual: int, protected: int, shares: Sequence[PruneLayer]) -> list[int]:
    """Tokens that stay above each prune layer; never more than above the one below.

    ``max(ceil(r * n), protected)`` for a share r of the prompt's n tokens; ``max(n - v + ceil(r * v),
    protected)`` for a share of its v visual tokens. A share counts as the decimal it is written as: 0.07 of
    100 tokens are 7, although the binary fraction nearest to 0.07 times 100 is a little above 7.
    """
    kept = []
    left = prompt_tokens
    for share in shares:
        if share.share < 1:
            counted = visual if share.of == "vision" else prompt_tokens
            left = min(left, max(prompt_tokens - counted + share_of(share.share, counted), protected))
        kept.append(left)
    return kept


def rated_at(tokens: int, kept: Sequence[int], protected: int, inherits: Sequence[bool]) -> list[bool]:
    """At which prune layers the tokens of a prompt have to be rated.

    Where more than the protected tokens go on and not all do; and below such a prune layer that inherits.

    Args:
        tokens: length of the prompt.
        kept: tokens that stay above each prune layer.
        protected: tokens that stay in any case.
        inherits: whether the rating at each prune layer is that of the one below.
    """
    chosen = [protected < left < n for n, left in zip((tokens, *kept), kept, strict=False)]
    rated = list(chosen)
    for index in range(len(chosen)):
        if inherits[index]:
            continue
        heirs = itertools.takewhile(lambda at: inherits[at], range(index + 1, len(chosen)))
        rated[index] |= any(chosen[at] for at in heirs)
    return rated
