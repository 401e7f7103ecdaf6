# SPDX-License-Identifier: Apache-2.0
"""Both schedulers and the block managers, on vLLM's real ones, without a model: what a step may hold."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.helpers.checkpoints import random_llava
from tests.helpers.kv_config import config
from tests.helpers.kv_gate import linear_gate
from vllm_vtprune.fingerprint import fingerprint
from vllm_vtprune.kv_drop.bands import KVDropBands
from vllm_vtprune.kv_drop.gate import GateFacts, save
from vllm_vtprune.kv_drop.hooks.cache import split_specs
from vllm_vtprune.kv_drop.hooks.config import kv_drop_config
from vllm_vtprune.kv_drop.hooks.exits import report_decisions, told_held
from vllm_vtprune.kv_drop.hooks.failures import report_failures
from vllm_vtprune.kv_drop.hooks.scheduler import build_scheduler
from vllm_vtprune.settings import KVSettings

BLOCK = 32
LAYERS, PRUNE_LAYER = 6, 2
BUDGET = 128


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llava(tmp_path_factory.mktemp("llava"), layers=LAYERS)


@pytest.fixture(scope="module")
def vllm_config(checkpoint: Path) -> VllmConfig:
    return config(checkpoint, max_num_batched_tokens=BUDGET, max_num_seqs=6, block_size=BLOCK)


@pytest.fixture(scope="module")
def banded(checkpoint: Path) -> VllmConfig:
    """Two prune layers."""
    policy = {"prune_layers": f"{PRUNE_LAYER},4:0.6"}
    return config(checkpoint, policy=policy, max_num_batched_tokens=BUDGET, max_num_seqs=6, block_size=BLOCK)


@pytest.fixture(scope="module")
def gated(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    """Two prune layers, and a gate at the lower."""
    path = tmp_path_factory.mktemp("gate") / "exit.gate"
    facts = GateFacts(PRUNE_LAYER, LAYERS, 128, fingerprint(str(checkpoint)))
    save(path, linear_gate(torch.ones(2 * 128)), facts, {})
    policy = {"prune_layers": f"{PRUNE_LAYER},4:0.6", "prune_gate": str(path)}
    return config(checkpoint, policy=policy, max_num_batched_tokens=BUDGET, max_num_seqs=6, block_size=BLOCK)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def scheduler(request: pytest.FixtureRequest, vllm_config: VllmConfig) -> Scheduler:
    # the CPU platform allows the synchronous one only
    vllm_config.scheduler_config.async_scheduling = request.param
    return make(vllm_config, blocks=31)


def make(vllm_config: VllmConfig, blocks: int) -> Scheduler:
    init_none_hash(sha256)
    vllm_config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    prune_layers = kv_drop_config(vllm_config).prune_layers
    specs = split_specs({f"model.layers.{i}.attn": spec for i in range(LAYERS)}, *prune_layers)
    names = list(specs)
    groups = [KVCacheGroupSpec(names[i : i + 2], specs[names[i]]) for i in (0, 2, 4)]
    return build_scheduler(
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=BLOCK,
    )


def request(
    request_id: str,
    tokens: int,
    keep: float | tuple[float, ...],
    *,
    output: int = 4,
    image: int = 0,
    seed: int = 0,
    **kwargs: Any,
) -> Request:
    dice = random.Random(seed)
    features = []
    if image:
        item = MultiModalFeatureSpec(
            data=MultiModalKwargsItem({}),
            modality="image",
            identifier=f"image-{seed}",
            mm_position=PlaceholderRange(offset=1, length=image),
        )
        features.append(item)
    return Request(
        request_id,
        [dice.randrange(5, 200) for _ in range(tokens)],
        SamplingParams(
            max_tokens=output,
            ignore_eos=True,
            extra_args=KVSettings.of(keep if isinstance(keep, tuple) else (keep,)).extra_args(),
            **kwargs,
        ),
        None,
        mm_features=features,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def held(scheduler: Scheduler, request_id: str) -> list[int]:
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    return [len(m.req_to_blocks.get(request_id, ())) for m in managers]


def ids_held(scheduler: Scheduler, request_id: str) -> list[list[int]]:
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    return [[block.block_id for block in m.req_to_blocks.get(request_id, ())] for m in managers]


def finish_step(scheduler: Scheduler, output: Any, decided: dict[str, bool] | None = None) -> Any:
    """What a model runner answers: a token for each request whose prompt is through."""
    ids = list(output.num_scheduled_tokens)
    done = [not scheduler.requests[i].is_prefill_chunk if i in scheduler.requests else True for i in ids]
    result = ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={i: n for n, i in enumerate(ids)},
        sampled_token_ids=[[7] if through else [] for through in done],
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )
    state = KVDropBands(2, 8, 200, torch.device("cpu"))
    state._decisions = {ids.index(name): leaves for name, leaves in (decided or {}).items()}
    report_decisions(result, state)
    return scheduler.update_from_output(output, pickle.loads(pickle.dumps(result)))


class Worker:
    """A worker's side of the bookkeeping: the block-table rows, and what a gate decided.

    Attributes:
        rows: ids of the blocks by group that it believes each request to have.
        decided: by request, whether its visual tokens leave; for good, also over a preemption.
    """

    def __init__(self, dice: random.Random) -> None:
        self.rows: dict[str, list[list[int]]] = {}
        self.decided: dict[str, bool] = {}
        self._dice = dice

    def take(self, output: Any) -> None:
        """What a model runner does with the blocks of a step: rows grow behind what is held."""
        output = pickle.loads(pickle.dumps(output))
        for name, held in told_held(output).items():
            for ids, count in zip(self.rows.get(name, []), held, strict=False):
                del ids[count:]
        for name in output.finished_req_ids:
            self.rows.pop(name, None)
        for new in output.scheduled_new_reqs:
            self.rows[new.req_id] = [list(ids) for ids in new.block_ids]
        cached = output.scheduled_cached_reqs
        for name, new_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                self.rows[name] = [list(ids) for ids in new_ids]
            elif new_ids is not None:
                for ids, more in zip(self.rows[name], new_ids, strict=True):
                    ids.extend(more)

    def decide(self, scheduler: Scheduler, output: Any) -> dict[str, bool]:
        """What the gate decides in a step: on each of its prompts, the first time that it comes."""
        fresh = {}
        for name in output.num_scheduled_tokens:
            plan = scheduler.prompt_plans.get(name)
            if plan is not None and plan.gate is not None and name not in self.decided:
                self.decided[name] = fresh[name] = self._dice.random() < 0.5
        return fresh


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


def test_a_pruned_prompt_is_taken_whole_or_not_yet(scheduler: Scheduler) -> None:
    scheduler.add_request(request("chunked", 100, 1.0, seed=1))
    scheduler.add_request(request("pruned", 60, 0.5, seed=2))
    first = scheduler.schedule()
    assert first.num_scheduled_tokens == {"chunked": 100}  # 28 tokens are left, the prompt needs 60
    finish_step(scheduler, first)
    second = scheduler.schedule()
    assert second.num_scheduled_tokens["pruned"] == 60
    assert held(scheduler, "pruned") == [2, 1, 1]
    finish_step(scheduler, second)


def test_a_prompt_that_must_wait_is_not_overtaken(scheduler: Scheduler) -> None:
    """A step's admissions end at it by themselves in vLLM 0.32, and not in 0.33."""
    scheduler.add_request(request("chunked", 100, 1.0, seed=1))
    scheduler.add_request(request("pruned", 60, 0.5, seed=2))
    scheduler.add_request(request("behind", 20, 1.0, seed=3))
    assert scheduler.schedule().num_scheduled_tokens == {"chunked": 100}  # 28 are left: `behind` would fit
    assert scheduler.max_num_active_reqs == scheduler.max_num_running_reqs


def test_an_unpruned_prompt_in_its_place_is_split(scheduler: Scheduler) -> None:
    scheduler.add_request(request("first", 100, 1.0, seed=1))
    scheduler.add_request(request("second", 60, 1.0, seed=2))
    assert scheduler.schedule().num_scheduled_tokens == {"first": 100, "second": 28}


def test_a_prompt_longer_than_a_step_is_split_and_counted(scheduler: Scheduler) -> None:
    # 6 requests may run: 123 tokens are the longest that fit beside five others
    scheduler.add_request(request("long", 124, 0.5, seed=1))
    scheduler.add_request(request("longest", 123, 0.5, seed=2))
    assert scheduler.unpruned == {"too_long": 1}
    assert list(scheduler.prompt_plans) == ["longest"]


def test_pruned_blocks_are_neither_read_nor_published(scheduler: Scheduler) -> None:
    def run(request_id: str, keep: float) -> int:
        scheduler.add_request(request(request_id, 100, keep, output=1, seed=3))
        output = scheduler.schedule()
        computed = output.scheduled_new_reqs[0].num_computed_tokens
        finish_step(scheduler, output)
        return computed

    assert run("pruned", 0.5) == 0
    assert run("unpruned", 1.0) == 0  # nothing was published
    assert run("again", 1.0) == 96
    assert run("pruned again", 0.5) == 0  # and nothing is read


def test_a_prompt_that_may_grow_is_served_whole(scheduler: Scheduler) -> None:
    streaming = request("stream", 60, 0.5)
    streaming.resumable = True
    scheduler.add_request(streaming)
    assert scheduler.unpruned == {"streaming_input": 1} and not scheduler.prompt_plans
    # what the worker will read says so, too
    assert streaming.sampling_params is not None
    assert streaming.sampling_params.extra_args == KVSettings(1.0).extra_args()


def test_every_chunk_of_a_session_is_served_whole(scheduler: Scheduler) -> None:
    """The settings of a session's next chunk replace those of the last one; the worker reads them."""
    for tokens in (60, 40):
        chunk = request("stream", tokens, 0.5, output=1)
        chunk.resumable = True
        scheduler.add_request(chunk)
        output = scheduler.schedule()
        (sent,) = output.scheduled_new_reqs or [scheduler.requests["stream"]]
        assert sent.sampling_params is not None
        assert sent.sampling_params.extra_args == KVSettings(1.0).extra_args()
        finish_step(scheduler, output)
    assert not scheduler.prompt_plans


def test_a_request_that_the_worker_could_not_serve_fails_alone(scheduler: Scheduler) -> None:
    for name in ("first", "failed", "last"):
        scheduler.add_request(request(name, 30, 0.5, seed=len(name)))
    output = scheduler.schedule()
    ids = list(output.num_scheduled_tokens)
    result = ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={i: n for n, i in enumerate(ids)},
        sampled_token_ids=[[7] for _ in ids],
        prompt_logprobs_dict={},
    )
    state = KVDropBands(2, 8, 200, torch.device("cpu"))
    state.bands[1].overrun = {ids.index("failed")}
    report_failures(result, state)
    told = scheduler.update_from_output(output, pickle.loads(pickle.dumps(result)))[0].outputs
    assert {(o.request_id, tuple(o.new_token_ids), str(o.finish_reason)) for o in told} == {
        ("first", (7,), "None"),
        ("last", (7,), "None"),
        ("failed", (), "error"),
    }
    assert "failed" not in scheduler.requests and "failed" not in scheduler.prompt_plans
    assert held(scheduler, "failed") == [0, 0, 0]


def random_traffic(scheduler: Scheduler, seed: int) -> tuple[int, list[bool]]:
    """Thirty requests, some aborted, each step checked against every rule.

    Returns the preemptions, and what a gate decided.
    """
    dice = random.Random(seed)
    pool = scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    two = len(scheduler.kv_drop_config.schedule) > 1
    worker, decisions = Worker(dice), []
    arriving = []
    for i in range(30):
        tokens = dice.choice([5, 31, 32, 33, 60, 100, 123, 124, 200])
        image = dice.choice([0, tokens - 3, max(0, tokens - 12)])
        keep: Any = dice.choice([1.0, 0.5, 0.25, 0.05])
        if two and keep < 1:
            keep = (dice.choice([1.0, keep]), dice.choice([keep, keep / 2, 0.0]))
        arriving.append(request(str(i), tokens, keep, output=dice.randint(1, 60), image=image, seed=i))
    everyone = list(arriving)
    pending: list[Any] = []
    for _ in range(4000):
        if arriving and dice.random() < 0.5:
            scheduler.add_request(arriving.pop())
        output = scheduler.schedule()
        worker.take(output)
        decisions.append(worker.decide(scheduler, output))
        for request_id, scheduled in output.num_scheduled_tokens.items():
            one = scheduler.requests[request_id]
            through = one.num_computed_tokens  # advanced past this step already
            plan = scheduler.prompt_plans.get(request_id)
            if plan is not None and through - scheduled < plan.tokens:
                assert through - scheduled == 0 and scheduled >= plan.tokens
            kept = (plan.tokens, *plan.kept_by_layer) if plan else (0,) * 3
            dropped = [kept[0] - n for n in kept]
            groups = scheduler.kv_cache_config.kv_cache_groups
            bands = [group.kv_cache_spec.band for group in groups]
            assert held(scheduler, request_id) == [blocks_for(through - dropped[band]) for band in bands]
            assert worker.rows[request_id] == ids_held(scheduler, request_id)
        pending.append(output)
        # the asynchronous scheduler runs one step ahead of the model
        ahead = 1 if scheduler.scheduler_config.async_scheduling else 0
        while len(pending) > ahead:
            finish_step(scheduler, pending.pop(0), decisions.pop(0))
        if dice.random() < 0.03 and scheduler.requests:
            victim = dice.choice(list(scheduler.requests))
            scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
        if not arriving and not scheduler.has_unfinished_requests():
            break
    for output, decided in zip(pending, decisions, strict=True):
        finish_step(scheduler, output, decided)
    assert not scheduler.requests and not arriving
    assert pool.get_num_free_blocks() == free
    assert not scheduler.prompt_plans and not scheduler.gate_reports
    return sum(r.num_preemptions for r in everyone), list(worker.decided.values())


@pytest.mark.parametrize("prune_layers", ["vllm_config", "banded", "gated"], ids=["one", "two", "gate"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_random_traffic_keeps_every_rule_and_returns_every_block(
    request: pytest.FixtureRequest, prune_layers: str, asynchronous: bool
) -> None:
    vllm_config: VllmConfig = request.getfixturevalue(prune_layers)
    vllm_config.scheduler_config.async_scheduling = asynchronous
    found = [random_traffic(make(vllm_config, blocks=31), seed) for seed in range(6)]
    # otherwise the rules were not put to the test
    assert sum(preemptions for preemptions, _ in found) > 10
    decided = [leaves for _, one in found for leaves in one]
    assert (decided.count(True) > 3 and decided.count(False) > 3) is (prune_layers == "gated")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_decision_returns_the_surplus_and_the_row_follows(gated: VllmConfig, asynchronous: bool) -> None:
    gated.scheduler_config.async_scheduling = asynchronous
    scheduler = make(gated, blocks=31)
    pool, worker = scheduler.kv_cache_manager.block_pool, Worker(random.Random(0))
    free = pool.get_num_free_blocks()
    scheduler.add_request(request("picture", 100, (0.999, 0.5), output=30, image=80))
    scheduler.add_request(request("refuses", 20, 1.0))
    first = scheduler.schedule()
    worker.take(first)
    # 20 text tokens; of 80 visual ones all above the first prune layer, half of the prompt above the second
    assert held(scheduler, "picture") == [4, 4, 2]
    before = pool.get_num_free_blocks()
    pending = [first]
    if asynchronous:
        pending.append(scheduler.schedule())
        worker.take(pending[-1])
    finish_step(scheduler, pending.pop(0), {"picture": True})
    assert held(scheduler, "picture") == [4, 1, 1]
    assert pool.get_num_free_blocks() == before + 4
    while scheduler.requests:
        pending.append(scheduler.schedule())
        worker.take(pending[-1])
        for name in pending[-1].num_scheduled_tokens:
            assert worker.rows[name] == ids_held(scheduler, name)
        if len(pending) > int(asynchronous):
            told = finish_step(scheduler, pending.pop(0))
    (answer,) = [o for o in told[0].outputs if o.request_id == "picture"]
    report = {"leaves": True, "tokens": 100, "kept_by_layer": [100, 50]}
    assert answer.kv_transfer_params == {"vtprune": report}
    assert pool.get_num_free_blocks() == free


def test_a_decision_on_a_request_that_is_gone_does_nothing(gated: VllmConfig) -> None:
    gated.scheduler_config.async_scheduling = False
    scheduler = make(gated, blocks=31)
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    scheduler.add_request(request("picture", 100, 0.5, image=80))
    output = scheduler.schedule()
    scheduler.finish_requests("picture", RequestStatus.FINISHED_ABORTED)
    finish_step(scheduler, output, {"picture": True})
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
    assert not told_held(scheduler.schedule())


@pytest.mark.parametrize("leaves", [True, False])
def test_a_gated_prompt_neither_reads_the_prefix_cache_nor_publishes(gated: VllmConfig, leaves: bool) -> None:
    """Also where it turns out to stay whole: what is published is known to be whole when it is written."""
    gated.scheduler_config.async_scheduling = False
    scheduler = make(gated, blocks=31)

    def computed(request_id: str, keep: float, decided: dict[str, bool]) -> int:
        scheduler.add_request(request(request_id, 100, keep, output=2, image=80, seed=3))
        output = scheduler.schedule()
        found = output.scheduled_new_reqs[0].num_computed_tokens
        finish_step(scheduler, output, decided)
        finish_step(scheduler, scheduler.schedule())
        return found

    assert computed("gated", 0.999, {"gated": leaves}) == 0
    assert computed("whole", 1.0, {}) == 0
    assert computed("whole again", 1.0, {}) == 96
    assert computed("gated again", 0.999, {"gated again": leaves}) == 0
