# SPDX-License-Identifier: Apache-2.0
"""What later turns find in vLLM's own block pool, without a model: a cache whose every slot is looked at."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_group_id, get_request_block_hasher
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from tests.helpers.checkpoints import random_llava
from tests.helpers.kv_config import config
from tests.kv_drop.test_scheduler import BLOCK, BUDGET, LAYERS, finish_step, held, ids_held, make
from vllm_vtprune.kv_drop.bands import KVDropBands
from vllm_vtprune.kv_drop.hooks.failures import report_failures
from vllm_vtprune.kv_drop.hooks.requests import request_drop
from vllm_vtprune.settings import KVSettings

#: What the engine answers, always.
SAID = 7
PICTURE = 80


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    checkpoint: Path = random_llava(tmp_path_factory.mktemp("llava"), layers=LAYERS)
    policy = {"prune_layer": None, "prune_layers": "2,4:0.6", "kv_reuse": True}
    sizes = {"max_num_batched_tokens": BUDGET, "max_num_seqs": 6, "block_size": BLOCK}
    return config(checkpoint, policy=policy, **sizes)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def scheduler(request: pytest.FixtureRequest, vllm_config: VllmConfig) -> Scheduler:
    vllm_config.scheduler_config.async_scheduling = request.param
    return make(vllm_config, blocks=61)


def prompt(seed: int, tokens: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(8, 200) for _ in range(tokens)]


def turn(
    request_id: str,
    tokens: list[int],
    *,
    keep: float | tuple[float, ...] = 0.5,
    first_turn: int = 0,
    output: int = 4,
    picture: str = "picture",
    reuse: bool = True,
    scope: Any = "vision",
    **kwargs: Any,
) -> Request:
    """A request whose picture begins at its second token."""
    item = MultiModalFeatureSpec(
        data=MultiModalKwargsItem({}),
        modality="image",
        identifier=picture,
        mm_position=PlaceholderRange(offset=1, length=min(PICTURE, (first_turn or len(tokens)) - 12)),
    )
    shares = keep if isinstance(keep, tuple) else (keep,)
    settings = KVSettings.of(shares, scope, reuse=reuse, first_turn=first_turn)
    params = SamplingParams(max_tokens=output, ignore_eos=True, extra_args=settings.extra_args(), **kwargs)
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(request_id, tokens, params, None, mm_features=[item], block_hasher=hasher)


@dataclass
class Cache:
    """What the layers of each group would find in each slot, written by a worker that ranks at random.

    Every slot holds its token's position, a hash of it with all before it, and the ranking that it stayed at.

    Attributes:
        found: how many tokens of each request were not computed when it began, or began again.
        own: the ranking of each request that was ranked; a preempted one keeps its own.
        of: the ranking that each request's tokens stayed at; None where none left.
    """

    dice: random.Random = field(default_factory=lambda: random.Random(0))
    found: dict[str, list[int]] = field(default_factory=dict)
    own: dict[str, int] = field(default_factory=dict)
    of: dict[str, int | None] = field(default_factory=dict)
    slots: dict[tuple[int, int], list[Any]] = field(default_factory=dict)
    rankings: list[list[list[int]]] = field(default_factory=list)
    texts: dict[str, list[int]] = field(default_factory=dict)

    def step(self, scheduler: Scheduler, output: Any) -> None:
        """Write what a step computes, then look at what its requests attend to."""
        begun = {new.req_id for new in output.scheduled_new_reqs}
        begun |= output.scheduled_cached_reqs.resumed_req_ids
        rows = []
        for name, count in output.num_scheduled_tokens.items():
            end = scheduler.requests[name].num_computed_tokens
            if name in begun:
                self.found.setdefault(name, []).append(end - count)
                self.of[name] = self._ranking(scheduler, name) if end == count else None
            rows.append((name, end - count, end))
        for name, start, end in rows:
            self._write(scheduler, name, start, end)
        for name, _, end in rows:
            # a request's slots change little from step to step
            if name in begun or self.dice.random() < 0.1:
                self._look(scheduler, name, end)

    def _ranking(self, scheduler: Scheduler, name: str) -> int | None:
        """The ranking of a request that begins at its first token."""
        one = scheduler.requests[name]
        config = scheduler.kv_drop_config
        drops = request_drop(one.prompt_token_ids, one.mm_features, one.sampling_params, config)
        if drops is None:
            return None
        if name not in self.own:
            left, bands = list(range(drops[0].tokens)), []
            for drop in drops:
                stay = [i for i in left if drop.protected[i]]
                others = [i for i in left if not drop.protected[i]]
                left = sorted(stay + self.dice.sample(others, drop.tokens - drop.dropped - len(stay)))
                bands.append(left)
            self.own[name] = len(self.rankings)
            self.rankings.append([list(range(drops[0].tokens)), *bands])
        return self.own[name]

    def _places(self, ranking: int | None, band: int, end: int) -> list[int]:
        """Positions in a band's slots, in order."""
        if ranking is None:
            return list(range(end))
        kept = self.rankings[ranking]
        return [*kept[band], *range(len(kept[0]), end)]

    def _groups(self, scheduler: Scheduler, name: str) -> list[tuple[int, int, list[int]]]:
        """Each group, its band, and the request's blocks."""
        specs: list[Any] = [group.kv_cache_spec for group in scheduler.kv_cache_config.kv_cache_groups]
        ids = ids_held(scheduler, name)
        return [(group, spec.band, ids[group]) for group, spec in enumerate(specs)]

    def _text(self, scheduler: Scheduler, name: str, end: int) -> list[int]:
        """A hash of each token with all before it; one that is still being sampled is what they all are."""
        request, text = scheduler.requests[name], self.texts.setdefault(name, [])
        tokens = list(request.all_token_ids)
        for position in range(len(text), end):
            token = tokens[position] if position < len(tokens) else SAID
            text.append(hash((text[-1] if text else request.mm_features[0].identifier, token)))
        return text

    def _write(self, scheduler: Scheduler, name: str, start: int, end: int) -> None:
        text, groups = self._text(scheduler, name, end), self._groups(scheduler, name)
        if start and self.of[name] is None and name in scheduler.prompt_plans:
            # it went on from what another kept, and finds out of whom
            group, _, ids = groups[-1]
            self.of[name] = self.slots[group, ids[0]][0][2]
        for group, band, ids in groups:
            for place, position in enumerate(self._places(self.of[name], band, end)):
                if position >= start:
                    block = self.slots.setdefault((group, ids[place // BLOCK]), [None] * BLOCK)
                    block[place % BLOCK] = (position, text[position], self.of[name])

    def _look(self, scheduler: Scheduler, name: str, end: int) -> None:
        text, ranking = self._text(scheduler, name, end), self.of[name]
        assert (ranking is None) is (name not in scheduler.prompt_plans)
        for group, band, ids in self._groups(scheduler, name):
            places = self._places(ranking, band, end)
            assert len(ids) == -(-len(places) // BLOCK)
            for place, position in enumerate(places):
                seen = self.slots[group, ids[place // BLOCK]][place % BLOCK]
                assert seen == (position, text[position], ranking), (name, group, place)


def run(scheduler: Scheduler, cache: Cache, *requests: Request) -> list[int]:
    """Serve requests that come at once; how many tokens of each were found when it began."""
    for one in requests:
        scheduler.add_request(one)
    pending: list[Any] = []
    while scheduler.has_unfinished_requests() or pending:
        if scheduler.has_unfinished_requests():
            pending.append(scheduler.schedule())
            cache.step(scheduler, pending[-1])
        ahead = scheduler.scheduler_config.async_scheduling and scheduler.has_unfinished_requests()
        while len(pending) > int(ahead):
            finish_step(scheduler, pending.pop(0))
    return [cache.found[one.request_id][0] for one in requests]


def lose(scheduler: Scheduler, group: int, block: int) -> None:
    """Take one block out of the prefix cache, by its place among those that a group published."""
    pool = scheduler.kv_cache_manager.block_pool
    found = pool.cached_block_hash_to_block
    lost = found.get_one_block([key for key in found._cache if get_group_id(key) == group][block])
    assert lost is not None
    pool.evict_blocks({lost.block_id})


#: A picture of 80 tokens behind the first one, then text: from the 81st on every token stays.
FIRST = prompt(1, 118)
#: Behind its answer of 31 tokens, the last of which is not computed: of 148 four blocks lie in the cache.
SECOND = [*FIRST, *[SAID] * 30, *prompt(2, 20)]


def test_a_later_turn_finds_all_that_was_computed(scheduler: Scheduler) -> None:
    cache = Cache()
    assert run(scheduler, cache, turn("one", FIRST, output=31)) == [0]
    assert run(scheduler, cache, turn("two", SECOND, first_turn=118, output=31)) == [128]
    third = [*SECOND, *[SAID] * 31, *prompt(3, 9)]
    assert run(scheduler, cache, turn("three", third, first_turn=118)) == [192]


def test_whole_blocks_are_dropped(scheduler: Scheduler) -> None:
    scheduler.add_request(turn("one", FIRST))
    scheduler.schedule()
    # half of the tokens could leave at both prune layers; 59 are a block and 27
    assert scheduler.prompt_plans["one"].kept_by_layer == (86, 86)
    assert held(scheduler, "one") == [4, 3, 3]


@pytest.mark.parametrize(
    "other",
    [
        {"keep": 0.3},
        {"picture": "another"},
        {"reuse": False},
        {"keep": 1.0},
        {"first_turn": 117},
        {"first_turn": 0},
    ],
    ids=str,
)
def test_another_prompt_finds_nothing(scheduler: Scheduler, other: dict[str, Any]) -> None:
    cache = Cache()
    run(scheduler, cache, turn("one", FIRST, output=31))
    assert run(scheduler, cache, turn("other", SECOND, **{"first_turn": 118, **other})) == [0]
    changed = [*FIRST[:100], 5, *SECOND[101:]]
    assert run(scheduler, cache, turn("changed", changed, first_turn=118)) == [0]
    assert run(scheduler, cache, turn("two", SECOND, first_turn=118)) == [128]


def test_who_refuses_neither_finds_nor_leaves_anything(scheduler: Scheduler) -> None:
    cache = Cache()
    assert run(scheduler, cache, turn("one", FIRST, reuse=False, output=31)) == [0]
    assert run(scheduler, cache, turn("again", FIRST, reuse=False)) == [0]
    assert run(scheduler, cache, turn("two", SECOND, first_turn=118)) == [0]


def test_a_request_that_may_not_read_the_cache_leaves_what_it_kept(scheduler: Scheduler) -> None:
    cache = Cache()
    run(scheduler, cache, turn("one", FIRST, output=31))
    unread = turn("two", SECOND, first_turn=118, skip_reading_prefix_cache=True)
    assert run(scheduler, cache, unread) == [0]
    assert run(scheduler, cache, turn("three", SECOND, first_turn=118)) == [160]


def test_equal_prompts_at_once_go_on_from_one_of_them(scheduler: Scheduler) -> None:
    """As several answers to one prompt are; the second begins in the very step of the first."""
    cache, short = Cache(), prompt(4, 107)
    assert run(scheduler, cache, *(turn(f"answer {i}", short) for i in range(3))) == [0, 96, 96]


def test_prompts_too_short_to_go_on_leave_what_lies_there(scheduler: Scheduler) -> None:
    """No edge of a block lies behind their picture and before their end; a longer turn finds one."""
    cache, short = Cache(), prompt(5, 96)
    assert run(scheduler, cache, *(turn(f"answer {i}", short, output=40) for i in range(3))) == [0, 0, 0]
    assert run(scheduler, cache, turn("again", short)) == [0]
    longer = [*short, *[SAID] * 39, 9]
    assert run(scheduler, cache, turn("two", longer, first_turn=96)) == [128]
    assert cache.of["two"] == cache.own["answer 0"]


def test_a_turn_goes_on_whatever_was_answered(scheduler: Scheduler) -> None:
    """Text behind the last edge of a block in the first turn stays, even if it competes with the picture."""
    cache = Cache()
    assert run(scheduler, cache, turn("one", FIRST, scope="all")) == [0]
    otherwise = [*FIRST, *prompt(6, 12)]
    assert run(scheduler, cache, turn("two", otherwise, scope="all", first_turn=118)) == [96]


def test_a_worker_is_given_the_pictures_that_it_may_need_again(scheduler: Scheduler) -> None:
    """It is told of a request once, and a preempted one whose blocks are gone begins at its first token."""
    run(scheduler, Cache(), turn("one", FIRST, output=31))
    scheduler.add_request(turn("two", SECOND, first_turn=118))
    (new,) = scheduler.schedule().scheduled_new_reqs
    assert new.num_computed_tokens == 128
    assert [feature.data is not None for feature in new.mm_features] == [True]


def test_a_lost_block_has_the_turn_computed_anew(scheduler: Scheduler) -> None:
    """One block of one band is enough; what is left of the old ranking is not mixed with the new one's."""
    for group, block in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1)]:
        cache = Cache(random.Random(block))
        run(scheduler, cache, turn("one", FIRST, output=31))
        lose(scheduler, group, block)
        assert run(scheduler, cache, turn("two", SECOND, first_turn=118, output=12)) == [0]
        assert run(scheduler, cache, turn("again", SECOND, first_turn=118)) == [160]
        assert cache.of["again"] == cache.own["two"] != cache.own["one"]
        assert scheduler.reset_prefix_cache()


def test_the_tail_of_a_conversation_may_be_lost_alone(scheduler: Scheduler) -> None:
    cache = Cache()
    run(scheduler, cache, turn("one", FIRST, output=80))
    lose(scheduler, 2, -1)
    second = [*FIRST, *[SAID] * 80, 9]
    assert run(scheduler, cache, turn("two", second, first_turn=118)) == [160]


def test_a_reset_forgets(scheduler: Scheduler) -> None:
    cache = Cache()
    run(scheduler, cache, turn("one", FIRST, output=31))
    assert scheduler.reset_prefix_cache()
    assert run(scheduler, cache, turn("two", SECOND, first_turn=118)) == [0]


def test_a_long_later_turn_is_split_behind_its_first(scheduler: Scheduler) -> None:
    cache = Cache()
    second = [*FIRST, *prompt(2, 200)]
    scheduler.add_request(turn("two", second, first_turn=118))
    output = scheduler.schedule()
    cache.step(scheduler, output)
    assert output.num_scheduled_tokens == {"two": BUDGET}
    finish_step(scheduler, output)
    run(scheduler, cache)
    assert run(scheduler, cache, turn("again", second, first_turn=118)) == [288]


def test_who_went_on_from_what_was_never_written_fails_too(vllm_config: VllmConfig) -> None:
    """The worker could not serve the first; the second had found its blocks, a step ahead."""
    vllm_config.scheduler_config.async_scheduling = True
    scheduler = make(vllm_config, blocks=61)
    for one in (turn("bystander", prompt(9, 50), picture="its own"), turn("one", FIRST, output=31)):
        scheduler.add_request(one)
    output = scheduler.schedule()
    while "one" not in output.num_scheduled_tokens:
        finish_step(scheduler, output)
        output = scheduler.schedule()
    scheduler.add_request(turn("two", [*FIRST, *[SAID] * 20], first_turn=118))
    pending = scheduler.schedule()
    assert pending.scheduled_new_reqs[0].num_computed_tokens == 96
    ids = list(output.num_scheduled_tokens)
    result = ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={i: n for n, i in enumerate(ids)},
        sampled_token_ids=[[SAID] for _ in ids],
        prompt_logprobs_dict={},
    )
    state = KVDropBands(2, 8, 200, torch.device("cpu"))
    state.bands[1].overrun = {ids.index("one")}
    report_failures(result, state)
    scheduler.update_from_output(output, result)
    assert list(scheduler.requests) == ["bystander"]
    finish_step(scheduler, pending)
    while scheduler.has_unfinished_requests():
        finish_step(scheduler, scheduler.schedule())
    assert run(scheduler, Cache(), turn("three", SECOND, first_turn=118)) == [0]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_random_conversations_find_what_one_ranking_kept(vllm_config: VllmConfig, asynchronous: bool) -> None:
    """Preempted, aborted, refused, evicted, reset: no slot of another ranking is ever attended to."""
    vllm_config.scheduler_config.async_scheduling = asynchronous
    found, preempted = [], 0
    for seed in range(6):
        hits, preemptions = random_conversations(make(vllm_config, blocks=50), seed)
        found += hits
        preempted += preemptions
    assert sum(map(bool, found)) > 60 and preempted > 10


def random_conversations(scheduler: Scheduler, seed: int) -> tuple[list[int], int]:
    """Seventy turns of three conversations that part; what was found of each, and the preemptions."""
    dice = random.Random(seed)
    cache, pool = Cache(dice), scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    shares: list[Any] = [0.5, (0.7, 0.2)]
    beginnings = [
        (prompt(10 + i, dice.choice([60, 97, 118, 123])), dice.choice(shares), str(i)) for i in range(3)
    ]
    # tokens, share, picture and first turn of what was answered, and of what is asked
    history: list[tuple[list[int], Any, str, int]] = []
    asked: dict[str, tuple[list[int], Any, str, int]] = {}
    everyone: list[Request] = []
    pending: list[Any] = []
    for _ in range(3000):
        if len(everyone) < 70 and dice.random() < 0.3:
            tokens, keep, picture = dice.choice(beginnings)
            first = 0
            if history and dice.random() < 0.7:
                before, keep, picture, first = dice.choice(history[-6:])
                tokens = [*before, *prompt(dice.randrange(4), dice.choice([1, 20, 33]))]
            if len(tokens) < 330:
                name = str(len(everyone))
                share = 1.0 if dice.random() < 0.1 else keep
                options = {"keep": share, "picture": picture, "reuse": dice.random() > 0.1}
                length = dice.choice([2, 30, 60])
                everyone.append(turn(name, tokens, first_turn=first, output=length, **options))
                asked[name] = tokens, keep, picture, first or len(tokens)
                scheduler.add_request(everyone[-1])
        output = scheduler.schedule()
        cache.step(scheduler, output)
        pending.append(output)
        while len(pending) > int(scheduler.scheduler_config.async_scheduling):
            finish_step(scheduler, pending.pop(0))
        for name in [name for name in asked if name not in scheduler.requests]:
            tokens, *rest = asked.pop(name)
            history.append(([*tokens, *everyone[int(name)].output_token_ids], *rest))
        if dice.random() < 0.02 and scheduler.requests:
            scheduler.finish_requests(dice.choice(list(scheduler.requests)), RequestStatus.FINISHED_ABORTED)
        if dice.random() < 0.01:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        if len(everyone) == 70 and not scheduler.has_unfinished_requests():
            break
    for output in pending:
        finish_step(scheduler, output)
    ours: Any = scheduler
    assert not scheduler.requests and len(everyone) == 70
    assert pool.get_num_free_blocks() == free
    assert not ours.prompt_plans and not ours.passages._requests
    pruned = [name for name in cache.found if cache.of[name] is not None]
    return [n for name in pruned for n in cache.found[name]], sum(r.num_preemptions for r in everyone)
