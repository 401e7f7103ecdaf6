# SPDX-License-Identifier: Apache-2.0
"""The rule that sees time, against a slow and plain version of itself and cases worked out by hand."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from tests.helpers.selection_cases import GRID, TOKENS, batch, image
from tests.helpers.slow_selection import Array, cosines
from tests.selection.test_syncs import host_traffic
from vllm_vtprune.selection import Selection, VisionFeatures, get_method
from vllm_vtprune.selection.base import share_count
from vllm_vtprune.selection.methods.inflection_temporal import changes
from vllm_vtprune.settings import VisionSettings

budgets = pytest.mark.parametrize(
    "budget",
    [
        VisionSettings(score="received", keep_ratio=0.3),
        VisionSettings(score="received", keep_ratio=0.9),
        VisionSettings(score="received", keep_ratio=0.01),
        VisionSettings(score="received", keep_ratio=0.3, min_tokens=9),
        VisionSettings(score="received", aggressiveness=0.3),
        VisionSettings(score="received", aggressiveness=0.54, max_share=0.2),
    ],
    ids=str,
)


def video(seed: int, frames: int) -> VisionFeatures:
    """Frames alike but for a few tokens."""
    found = batch([image(seed * 100 + frame) for frame in range(frames)])
    patches = found.patches.clone()
    generator = torch.Generator().manual_seed(seed)
    for frame in range(1, frames):
        same = torch.rand(TOKENS, generator=generator) < 0.7
        patches[frame, same] = patches[frame - 1, same]
    return dataclasses.replace(found, patches=patches, frames=(frames,))


def together(*videos: VisionFeatures) -> VisionFeatures:
    frames = tuple(count for one in videos for count in one.frames)
    parts = {
        name: torch.cat([getattr(one, name) for one in videos])
        for name in ("patches", "cls", "cls_attention", "received", "received_midway", "keys")
    }
    return VisionFeatures(
        grid=GRID, seeds=tuple(s for one in videos for s in one.seeds), frames=frames, **parts
    )


def kept(selections: list[Selection]) -> list[list[int]]:
    return [selection.indices.tolist() for selection in selections]


def slow(given: VisionFeatures, counts: list[int], least: int) -> list[list[int]]:
    """Of one video: each frame's best, then the video's best, one by one."""
    patches = given.patches.double().numpy()
    values: Array = np.zeros((len(patches), TOKENS))
    for frame, scores in enumerate(given.received[:, -1].tolist()):  # type: ignore[index]
        for place in range(TOKENS):
            change = 1.0
            if frame:
                change = 1 - cosines(patches[frame, place][None], patches[frame - 1, place][None])[0, 0]
            ahead = sum(other > scores[place] for other in scores)
            values[frame, place] = max(change, 0) * (1 - ahead / TOKENS)
    order = sorted((-values[f, p], f, p) for f in range(len(patches)) for p in range(TOKENS))
    stays = [one for f in range(len(patches)) for one in [o for o in order if o[1] == f][:least]]
    for one in order:
        if len(stays) < sum(counts) and one not in stays:
            stays.append(one)
    return [sorted(p for _, f, p in stays if f == frame) for frame in range(len(patches))]


@budgets
@pytest.mark.parametrize("number", range(3))
def test_it_keeps_what_the_slow_version_keeps(number: int, budget: VisionSettings) -> None:
    given = video(number, 4)
    per_frame = [len(one) for one in kept(get_method("inflection").select(given, budget))]
    mine = kept(get_method("inflection_temporal").select(given, budget))
    # where nothing changed, float32 leaves a difference in the last bit, which orders nothing that matters
    expected = slow(given, per_frame, budget.min_tokens)
    value = changes(given.patches, given.frames)
    for frame, (ours, theirs) in enumerate(zip(mine, expected, strict=True)):
        differ = set(ours) ^ set(theirs)
        assert all(float(value[frame, place]) < 1e-6 for place in differ)
    assert sum(map(len, mine)) == sum(per_frame)


@budgets
def test_a_picture_keeps_what_inflection_keeps(budget: VisionSettings) -> None:
    pictures = batch([image(seed) for seed in range(4)])
    one, other = (get_method(name).select(pictures, budget) for name in ("inflection_temporal", "inflection"))
    assert kept(one) == kept(other)


@budgets
def test_a_video_keeps_as_many_as_by_the_rule_that_sees_no_time_and_each_frame_some(
    budget: VisionSettings,
) -> None:
    given = video(5, 6)
    mine = kept(get_method("inflection_temporal").select(given, budget))
    by_frame = kept(get_method("inflection").select(given, budget))
    assert sum(map(len, mine)) == sum(map(len, by_frame))
    assert min(map(len, mine)) >= budget.min_tokens
    if budget.max_share < 1:
        assert sum(map(len, mine)) <= 6 * share_count(budget.max_share, TOKENS)


def test_what_did_not_change_goes_first() -> None:
    given = video(1, 3)
    patches = given.patches.clone()
    patches[1:] = patches[0]
    moved = [3, 17, 40]
    patches[1, moved] = -patches[1, moved]
    patches[2, moved] = patches[0, moved]
    given = dataclasses.replace(given, patches=patches)
    # as many as everything in the first frame, and what moved in the others
    budget = VisionSettings(score="received", keep_ratio=(TOKENS + 2 * len(moved)) / (3 * TOKENS))
    assert [len(one) for one in kept(get_method("inflection").select(given, budget))] == [18] * 3
    assert kept(get_method("inflection_temporal").select(given, budget)) == [
        list(range(TOKENS)),
        moved,
        moved,
    ]


def test_a_frame_that_stands_still_keeps_its_least() -> None:
    given = video(2, 3)
    still = dataclasses.replace(given, patches=given.patches[:1].expand(3, -1, -1).clone())
    budget = VisionSettings(score="received", keep_ratio=0.3, min_tokens=2)
    assert [len(one) for one in kept(get_method("inflection_temporal").select(still, budget))] == [41, 2, 2]


@budgets
def test_a_video_is_treated_alone_as_in_a_batch(budget: VisionSettings) -> None:
    videos = [video(1, 3), dataclasses.replace(image(7), frames=(1,)), video(2, 5)]
    method = get_method("inflection_temporal")
    alone = [selection for one in videos for selection in kept(method.select(one, budget))]
    assert kept(method.select(together(*videos), budget)) == alone


def test_it_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = together(video(1, 3), video(2, 5))
    with host_traffic(monkeypatch) as seen:
        get_method("inflection_temporal").select(given, VisionSettings(score="received", aggressiveness=0.5))
    assert seen == Counter({"tolist": 1})


@pytest.mark.parametrize("frames", [(1, 2), (4, 1), (4, 0)])
def test_frames_that_are_not_the_batch_are_refused(frames: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="are not 4 images"):
        dataclasses.replace(video(1, 4), frames=frames)
