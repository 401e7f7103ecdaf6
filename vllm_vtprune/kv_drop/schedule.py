# SPDX-License-Identifier: Apache-2.0
"""Prune schedules: at which decoder layers tokens leave, and the largest share that goes on above each.

A schedule is written ``8:0.5,16:0.25,24:0`` (layer:share of the prompt) or, for shares of the visual tokens
alone, ``8:vision=0.5``; it may also be one of `NAMED`, or a JSON file. Nothing here knows of vLLM or torch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from vllm_vtprune.errors import OperatorError

#: KV-cache groups cost a block table and a metadata build each, so there is an end to prune layers.
MOST_PRUNE_LAYERS = 4


class ScheduleError(OperatorError, ValueError):
    """A schedule that cannot work; the message is a clause that says why."""


@dataclass(frozen=True, slots=True)
class PruneLayer:
    """One prune layer.

    Attributes:
        layer: K; decoder layers of index K and more see what goes on.
        share: in [0, 1]; the most that a request which prunes at all keeps here. 0 is the exit: no visual
            token goes on, and every text token does.
        of: what it is a share of: the `prompt`, or its visual tokens (`vision`), where all text stays.
    """

    layer: int
    share: float = 1.0
    of: Literal["prompt", "vision"] = "prompt"

    def __str__(self) -> str:
        """As it is written in a schedule."""
        if self.share == 1 and self.of == "prompt":
            return str(self.layer)
        unit = "vision=" if self.of == "vision" and self.share else ""
        return f"{self.layer}:{unit}{self.share:g}"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Prune layers from the lowest up, and how each rates tokens.

    Attributes:
        prune_layers: the prune layers.
        relevance: names of `vllm_vtprune.kv_drop.relevance.RELEVANCE`, as many as prune layers; None leaves
            it to the operator.
        deviation: largest difference to the published curve, in share of the visual tokens; 0 for a schedule
            that is none's approximation.
        window: last prompt tokens that rate the others; None leaves it to the operator.
        weights: fingerprint of the only model that it is for (`vllm_vtprune.fingerprint`); None for any.
        presets: aggressiveness of presets by name, calibrated with it.
        gate: file of a gate that decides at one of the prune layers; None for none.
    """

    prune_layers: tuple[PruneLayer, ...]
    relevance: tuple[str, ...] | None = None
    deviation: float = 0.0
    window: int | None = None
    weights: str | None = None
    presets: Mapping[str, float] = field(default_factory=dict)
    gate: str | None = None

    def __str__(self) -> str:
        """As an operator writes it."""
        return ",".join(map(str, self.prune_layers))


def parse(text: str) -> tuple[PruneLayer, ...]:
    """Read ``8:0.5,16:vision=0.25,24:0``; a layer without a share leaves it to the request.

    Raises:
        ScheduleError: it cannot be read, or cannot work.
    """
    found = []
    for part in text.split(","):
        layer, _, share = part.strip().partition(":")
        unit, _, number = share.rpartition("=")
        try:
            value = float(number) if share else 1.0
            found.append(PruneLayer(int(layer), value, "vision" if unit or not value else "prompt"))
        except ValueError:
            unit = "?"
        if unit not in ("", "vision"):
            raise ScheduleError(
                f"{part.strip()[:40]!r} is no prune layer: write 8:0.5 for half of the prompt above layer 8, "
                "or 8:vision=0.5 for half of the visual tokens"
            )
    check(found)
    return tuple(found)


def check(prune_layers: Sequence[PruneLayer]) -> None:
    """Refuse prune layers that cannot work together.

    Raises:
        ScheduleError: too many, not rising, a share out of bounds or above the one below, or any after an
        exit.
    """
    if not 1 <= len(prune_layers) <= MOST_PRUNE_LAYERS:
        raise ScheduleError(
            f"{len(prune_layers)} prune layers are given, and may be 1 to {MOST_PRUNE_LAYERS}"
        )
    for prune_layer in prune_layers:
        if prune_layer.layer < 1:
            raise ScheduleError(f"a prune layer must be at least 1, not {prune_layer.layer}")
        if not 0 <= prune_layer.share <= 1:  # NaN fails too
            raise ScheduleError(f"a share must be in [0, 1], not {prune_layer.share:g}")
    for low, high in itertools.pairwise(prune_layers):
        if low.layer >= high.layer:
            raise ScheduleError(f"prune layers must rise, and {high.layer} follows {low.layer}")
        if low.share == 0:
            raise ScheduleError(f"no visual token is left to drop at layer {high.layer}: leave it out")
        if low.of == high.of and high.share > low.share:
            raise ScheduleError(f"shares must not rise, and {high.share:g} follows {low.share:g}")


def aim(layers: int) -> Schedule:
    """AIM's curve (arXiv 2412.03248) in bands.

    As published each layer sees an eighth of the visual tokens less than the one below, from layer 14 of 28
    on (Qwen2) and 13 of 32 (Vicuna); for other depths the first is scaled. Here each band sees the curve's
    mean over its layers.
    """
    start, fall = {28: (14, 8.0), 32: (13, 8.0)}.get(layers, (layers // 2, layers * 8 / 28))
    curve = [min(1.0, max(0.0, 1 - (layer - start) / fall)) for layer in range(layers)]
    cuts, deviation = _quantise(curve)
    return Schedule(cuts, ("pagerank",) * len(cuts), deviation)


def pyramid(layers: int) -> Schedule:
    """PyramidDrop (arXiv 2410.17247): half of the visual tokens leave at each quarter of the decoder."""
    cuts = tuple(PruneLayer(max(1, round(layers * i / 4)), 0.5**i, "vision") for i in (1, 2, 3))
    return Schedule(cuts, ("last_token",) * 3)


def leave(layers: int) -> Schedule:
    """DyVTE (arXiv 2411.19628) with a fixed layer in its gate's place: visual tokens leave in the middle."""
    return Schedule((PruneLayer(max(1, layers // 2), 0.0, "vision"),))


NAMED = MappingProxyType({"aim": aim, "pyramid": pyramid, "exit": leave})


def is_reference(text: str) -> bool:
    """Whether it names a schedule or a file of one, which only `resolve` can read."""
    return text.strip().lower() in NAMED or text.strip().endswith(".json")


def resolve(text: str, layers: int) -> Schedule:
    """The schedule that an operator means, for a decoder of so many layers.

    Args:
        text: prune layers as `parse` reads them, a name, or the path of a JSON file (it ends in ``.json``).
        layers: decoder layers.

    Raises:
        ScheduleError: it cannot be read, or cannot work with this decoder.
    """
    name = text.strip()
    if name.lower() in NAMED:
        schedule = NAMED[name.lower()](layers)
        check(schedule.prune_layers)
    elif name.endswith(".json"):
        schedule = _from_file(Path(name), layers)
    else:
        schedule = Schedule(parse(name))
    highest = schedule.prune_layers[-1].layer
    if highest >= layers:
        raise ScheduleError(
            f"prune layers must be 1 to {layers - 1} for {layers} decoder layers, not {highest}"
        )
    return schedule


def _from_file(path: Path, layers: int) -> Schedule:
    """``{"prune_layers": "8:0.5,16:0", "relevance": ["attention", "inherited"], "layers": 32}``.

    The last two may be missing, and so may what `vtprune calibrate` writes beside them: `window`, `model`
    with the fingerprint of its `weights`, and `presets`; so may `gate`, the file of one, beside this file.
    What else stands there is notes.
    """
    try:
        content: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ScheduleError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("prune_layers"), str):
        raise ScheduleError(f'{path} must be an object with "prune_layers", such as "8:0.5,16:0.25"')
    if content.get("layers", layers) != layers:
        raise ScheduleError(f"{path} is for {content['layers']} decoder layers, and this model has {layers}")
    relevance = content.get("relevance")
    names = [relevance] if isinstance(relevance, str) else relevance
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ScheduleError(f'{path}: "relevance" must be a name or a list of names')
    return Schedule(
        parse(content["prune_layers"]),
        None if names is None else tuple(names),
        **_calibrated(content, path),
    )


def _calibrated(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a file of `vtprune calibrate` says beside its prune layers."""
    window, presets = content.get("window"), content.get("presets") or {}
    model = content.get("model") or {}
    weights = model.get("weights") if isinstance(model, Mapping) else model
    gate = content.get("gate")
    wrong = {
        '"gate" must be the name of a file': not isinstance(gate, str | None) or gate == "",
        '"window" must be a whole number of at least 1': window is not None
        and not (isinstance(window, int) and window >= 1),
        '"model" must be an object with "weights", a text': not isinstance(weights, str | None),
        '"presets" must be an object of numbers in [0, 1]': not isinstance(presets, Mapping)
        or not all(isinstance(value, int | float) and 0 <= value <= 1 for value in presets.values()),
    }
    if found := next((sentence for sentence, is_wrong in wrong.items() if is_wrong), None):
        raise ScheduleError(f"{path}: {found}")
    where = None if gate is None else str(path.parent / gate)
    return {"window": window, "weights": weights, "presets": presets, "gate": where}


def band_groups(sizes: Sequence[int]) -> tuple[list[int], float]:
    """KV-cache groups that vLLM makes of each band, and the share of the cache that stays empty for it.

    vLLM's rule (`_get_kv_cache_groups_uniform_page_size`, which calls it a heuristic): groups as large as the
    smallest band, or as the largest where that is less than 1.5 times the smallest.

    Args:
        sizes: layers of each band.
    """
    small, large = min(sizes), max(sizes)
    size = large if large < 1.5 * small else small
    groups = [-(-layers // size) for layers in sizes]
    return groups, sum(groups) * size / sum(sizes) - 1


def band_sizes(layers: int, prune_layers: Sequence[int]) -> list[int]:
    """Layers of each band of a decoder."""
    return [high - low for low, high in itertools.pairwise([0, *prune_layers, layers])]


def _quantise(curve: Sequence[float]) -> tuple[tuple[PruneLayer, ...], float]:
    """The bands nearest to a falling curve in the mean square, and the largest deviation from it.

    Only bands that leave no KV-cache group partly empty, and no more than eight groups, are considered.

    Args:
        curve: share of the visual tokens that each layer should see.
    """
    layers = len(curve)
    best: tuple[float, tuple[PruneLayer, ...], float] | None = None
    # large bands and few first: they win where others come no nearer
    for step in range(layers - 1, -(-layers // 8) - 1, -1):
        if layers % step:
            continue
        for count in range(1, MOST_PRUNE_LAYERS + 1):
            for edges in itertools.combinations(range(step, layers, step), count):
                sizes = band_sizes(layers, edges)
                bands = list(itertools.pairwise([*edges, layers]))
                shares = [round(sum(curve[low:high]) / (high - low), 3) for low, high in bands]
                if band_groups(sizes)[1] or 0.0 in shares[:-1]:
                    continue
                seen = [share for share, size in zip([1.0, *shares], sizes, strict=True) for _ in range(size)]
                apart = [abs(a - b) for a, b in zip(seen, curve, strict=True)]
                error = sum(a * a for a in apart)
                if best is None or error < best[0] - 1e-9:
                    cuts = tuple(PruneLayer(k, s, "vision") for k, s in zip(edges, shares, strict=True))
                    best = error, cuts, max(apart)
    if best is None:
        raise ScheduleError(
            f"{layers} decoder layers cannot be cut into bands of one size: write the prune layers out"
        )
    return best[1:]
