# SPDX-License-Identifier: Apache-2.0
"""Replies to numbers: accuracy by kind, tokens kept, agreement with the unpruned answers, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_vtprune.kv_drop.schedule import band_sizes
from vtprune_eval import statistics
from vtprune_eval.backend import Reply, Runner
from vtprune_eval.setting import Setting
from vtprune_eval.tasks import Questions
from vtprune_loadtest.questions import OTHER, is_right, normalised
from vtprune_loadtest.shares import wilson

Floats = NDArray[np.float64]
Progress = Callable[[str], None]


def evaluate(
    runner: Runner, settings: Iterable[Setting], progress: Progress, baselines: Sequence[str] | None = None
) -> dict[str, Any]:
    """Run every setting, the unpruned one first, and its baselines at the same counts.

    Args:
        runner: what answers.
        settings: what to run.
        progress: told one line per result.
        baselines: stage-1 rules to compare with, of `setting.BASELINES`; None: all that the runner can. A
            setting that drops at the prune layer alone is compared with dropping at random there.

    Returns:
        A JSON object: `model`, `questions`, `layers`, and `rows`, the unpruned one first. See `_row`.
    """
    asked, names = runner.questions, runner.baselines if baselines is None else baselines
    whole = runner.answer(Setting())
    rows = [_row(Setting(), asked, [whole], whole, runner.layers)]
    progress(_line(rows[0]))
    for setting in settings:
        if not setting.prunes:
            continue
        draws = range(runner.draws) if setting.vision.method == "random" else range(1)
        replies = [runner.answer(replace(setting, draw=draw)) for draw in draws]
        row = _row(setting, asked, replies, whole, runner.layers)
        for name, others in _baselines(runner, setting, names).items():
            row["versus"][name] = _versus(asked, replies, others)
        rows.append(row)
        progress(_line(row))
    return {
        "model": runner.name,
        "questions": {"name": asked.name, "pictures": len(asked.pictures), "asked": len(asked.asked)},
        "layers": runner.layers,
        "rows": rows,
    }


def _baselines(runner: Runner, setting: Setting, names: Sequence[str]) -> dict[str, list[Sequence[Reply]]]:
    """Replies of each baseline, one list per draw."""
    if setting.vision.keeps_all:
        if not setting.prune_layers or setting.relevance == "random" or "random" not in names:
            return {}
        return {"random": [runner.answer(replace(setting, relevance="random"))]}
    return {
        name: [
            runner.answer(setting.baseline(name, draw))
            for draw in range(runner.draws if name == "random" else 1)
        ]
        for name in names
        if name != setting.vision.method
    }


def _row(
    setting: Setting,
    asked: Questions,
    draws: Sequence[Sequence[Reply]],
    whole: Sequence[Reply],
    layers: int | None,
) -> dict[str, Any]:
    """One setting's numbers, its random draws averaged.

    `share_kept` is of the vision tokens; `cache_share` of the KV-cache entries that the unpruned prompt takes
    over all layers; `versus` compares with each baseline at the same counts; `content` says how the kept
    count follows the picture.
    """
    right, replies = _right(asked, draws), draws[0]
    agreement = _mean([_same(run, whole) for run in draws])
    kept = _column(replies, "vision_tokens_kept")
    row: dict[str, Any] = {
        "label": setting.label,
        "setting": setting.as_dict(),
        "vision_tokens_kept": round(float(kept.mean()), 2),
        "share_kept": round(float(kept.sum() / _column(replies, "vision_tokens").sum()), 4),
        "prompt_tokens": round(float(_column(replies, "prompt_tokens").mean()), 2),
        "prompt_tokens_kept": round(float(_column(replies, "prompt_tokens_kept").mean()), 2),
        "cache_share": _cache_share(setting, replies, layers),
        "accuracy": statistics.share(right, asked.picture_of).as_dict(),
        "by_kind": _by_kind(asked, right),
        "agreement": statistics.share(agreement, asked.picture_of).as_dict(),
        "versus": {},
    }
    if setting.prunes:
        row["versus"]["unpruned"] = _versus(asked, draws, [whole])
        if (content := _content(asked, kept)) is not None:
            row["content"] = content
    return row


def _versus(
    asked: Questions, draws: Sequence[Sequence[Reply]], others: Sequence[Sequence[Reply]]
) -> dict[str, Any]:
    right, other = _right(asked, draws), _right(asked, others)
    return {
        "accuracy": statistics.share(other, asked.picture_of).as_dict(),
        "difference": statistics.difference(right, other, asked.picture_of).as_dict(),
        "draws": len(others),
    }


def _by_kind(asked: Questions, right: Floats) -> dict[str, Any]:
    """Accuracy of each kind, by Wilson's interval: a picture is asked at most one question of a kind.

    Questions from a file may be several per picture, so theirs is the bootstrap's.
    """
    kinds = np.array([question.kind for question in asked.asked])
    groups = {kind: kinds == kind for kind in dict.fromkeys(kinds.tolist())}
    held_out = np.array([question.held_out for question in asked.asked])
    if held_out.any():
        groups["held out"] = held_out
    result = {}
    for kind, members in groups.items():
        owners = asked.picture_of[members]
        alone = len(np.unique(owners)) == len(owners)
        interval = (
            wilson(float(right[members].sum()), int(members.sum()))
            if alone
            else statistics.share(right[members], owners)
        )
        result[kind] = {**interval.as_dict(), "asked": int(members.sum())}
    return result if set(groups) != {OTHER} else {}


def _content(asked: Questions, kept: Floats) -> dict[str, Any] | None:
    """How a picture's kept count follows what it shows; None where that is unknown or the count fixed."""
    if asked.shapes is None or asked.objects is None:
        return None
    _, first = np.unique(asked.picture_of, return_index=True)
    count = kept[first]
    if len(count) < 3 or 0 in (count.std(), asked.shapes.std()):
        return None
    patches = asked.objects.sum(1).astype(np.float64)
    return {
        "correlation_with_shapes": statistics.correlation(count, asked.shapes.astype(np.float64)).as_dict(),
        "correlation_with_object_patches": statistics.correlation(count, patches).as_dict(),
        "kept_by_shapes": {
            str(number): round(float(count[asked.shapes == number].mean()), 2)
            for number in np.unique(asked.shapes).tolist()
        },
        "standard_deviation": round(float(count.std()), 2),
    }


def _cache_share(setting: Setting, replies: Sequence[Reply], layers: int | None) -> float | None:
    whole = sum(reply.unpruned_tokens for reply in replies)
    if not setting.kv.drops:
        return round(sum(reply.prompt_tokens for reply in replies) / whole, 4)
    if layers is None or not setting.prune_layers:
        return None
    sizes = band_sizes(layers, [prune_layer.layer for prune_layer in setting.prune_layers])
    stored = sum(
        size * tokens for reply in replies for size, tokens in zip(sizes, reply.by_band, strict=True)
    )
    return round(stored / (layers * whole), 4)


def _right(asked: Questions, draws: Sequence[Sequence[Reply]]) -> Floats:
    """1 where the reply is right, averaged over draws, [Q]."""
    runs = (
        np.array([is_right(reply.text, q.answers) for reply, q in zip(run, asked.asked, strict=True)])
        for run in draws
    )
    return _mean([run.astype(np.float64) for run in runs])


def _same(replies: Sequence[Reply], whole: Sequence[Reply]) -> Floats:
    pairs = zip(replies, whole, strict=True)
    return np.array([float(normalised(a.text) == normalised(b.text)) for a, b in pairs])


def _mean(runs: Sequence[Floats]) -> Floats:
    mean: Floats = np.mean(np.stack(runs), axis=0)
    return mean


def _column(replies: Sequence[Reply], name: str) -> Floats:
    return np.array([float(getattr(reply, name)) for reply in replies])


def _line(row: dict[str, Any]) -> str:
    accuracy = row["accuracy"]
    against = "".join(
        f", {name} {entry['difference']['value']:+.3f}"
        for name, entry in row["versus"].items()
        if name != "unpruned"
    )
    return f"{row['label']}: {row['share_kept']:.1%} kept, accuracy {accuracy['value']:.3f}{against}"
