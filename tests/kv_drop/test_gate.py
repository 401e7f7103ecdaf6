# SPDX-License-Identifier: Apache-2.0
"""The gate without an engine: whom it decides on, what follows for plans and steps, its file, its start."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.checkpoints import random_llava
from tests.helpers.kv_config import config
from tests.helpers.kv_gate import linear_gate
from vllm_vtprune.errors import PolicyError
from vllm_vtprune.fingerprint import fingerprint
from vllm_vtprune.kv_drop.bands import KVDropBands
from vllm_vtprune.kv_drop.gate import Gate, GateFacts, leaves, load, read_facts, save, text_states
from vllm_vtprune.kv_drop.geometry import GateQuestion, RequestDrop
from vllm_vtprune.kv_drop.hooks.config import kv_drop_config
from vllm_vtprune.kv_drop.plan import KVDropConfig, PromptPlan, decided_plan, gate_report, plan_prompt
from vllm_vtprune.kv_drop.schedule import ScheduleError, parse
from vllm_vtprune.kv_drop.shares import protected_positions
from vllm_vtprune.policy import PrunePolicy
from vllm_vtprune.settings import KVSettings

SCHEDULE = "2,3:vision=1,5:vision=0.2"
TEXT, IMAGE = 30, 100


def plan(
    *shares: float,
    image: int = IMAGE,
    before: int = 10,
    schedule: str = SCHEDULE,
    at: int | None = 1,
    **kwargs: Any,
) -> PromptPlan:
    """Of a prompt with 30 tokens of text, ten of them ahead of the picture."""
    drop = KVDropConfig(parse(schedule), window=4, longest_prompt=1000, gate=at)
    settings_ = KVSettings.of(shares, **kwargs)
    return plan_prompt(list(range(TEXT + image)), [(before, image)] if image else [], settings_, drop)


def test_the_gate_is_still_to_decide_and_text_stays() -> None:
    found = plan(0.999)
    assert (found.kept_by_layer, found.gate, found.protected) == ((130, 130, 50), 1, TEXT)
    assert found.dropped == 80 and not found.whole
    left = found.decided(True)
    assert (left.kept_by_layer, left.gate) == ((130, 30, 30), None)
    assert found.decided(False).kept_by_layer == found.kept_by_layer
    # below the gate the visual tokens alone compete
    assert plan(0.1, 0.999).kept == TEXT and plan(0.1, 0.999, gate=False, at=None).kept == TEXT
    assert plan(0.5).kept == 65


def test_a_prompt_that_only_the_gate_may_prune_is_not_whole() -> None:
    found = plan(0.999, schedule="2,3,5")
    assert found.dropped == 0 and found.gate == 1 and not found.whole
    assert plan(1.0).whole


@pytest.mark.parametrize(
    "arguments",
    [
        {"at": None},
        {"gate": False},
        {"image": 0},
        {"before": 30},  # no text behind the picture
        {"schedule": "2:vision=0.5,3:0"},  # gone at the gate anyhow
    ],
    ids=["no gate", "refused", "no picture", "no text behind", "an exit there"],
)
def test_whom_the_gate_does_not_decide_on(arguments: dict[str, Any]) -> None:
    assert plan(0.999, **arguments).gate is None


def test_a_share_of_one_at_the_gates_prune_layer_refuses_it() -> None:
    assert plan(0.5, 1.0, 0.5).gate is None
    assert plan(0.5, 0.999, 1.0).gate == 1


def test_an_answer_tells_which_plan_the_gate_decided_on() -> None:
    plans = [plan(0.5, gate=False), plan(0.999), plan(0.5), plan(0.5)]
    report = json.loads(json.dumps(gate_report(plans[2], True)))
    assert decided_plan(plans, report) == 2
    plans[2] = plans[2].decided(True)
    assert decided_plan(plans, report) == 3
    plans[3] = plans[3].decided(True)
    assert decided_plan(plans, report) is None


# a step midway --------------------------------------------------


def drops_of(found: PromptPlan, image: int, *, at: int | None) -> tuple[RequestDrop, ...]:
    """As `hooks.requests.request_drop` makes them, nothing rated."""
    n = found.tokens
    mask = protected_positions(list(range(n)), [(10, image)], frozenset(), "vision", 4)
    reaching = (n, *found.kept_by_layer[:-1])
    return tuple(
        RequestDrop(
            n,
            n - kept,
            mask,
            lost=n - below,
            rated=kept < below and kept > int(mask.sum()),
            gate=GateQuestion(n - 10 - image) if index == at else None,
        )
        for index, (below, kept) in enumerate(zip(reaching, found.kept_by_layer, strict=True))
    )


class Groups:
    """The block tables and slots of a step, two groups above each prune layer, written as runners do."""

    def __init__(self, bands: KVDropBands, rows: int, tokens: int) -> None:
        self.slots = [torch.zeros(tokens, dtype=torch.int64) for _ in bands.bands for _ in range(2)]
        self.tables = [
            torch.arange(rows * 40).reshape(rows, 40) + 1000 * (i + 1) for i in range(len(self.slots))
        ]

    def write(self, bands: KVDropBands, held: Sequence[int]) -> None:
        blocks = np.array(held, dtype=np.int32)
        for group, (table, slots) in enumerate(zip(self.tables, self.slots, strict=True)):
            band = bands.bands[group // 2]
            band.write_slots(table, 8, slots, blocks)
            if band.repeatable:
                band.built.append(lambda g=group, b=band: ([f"layer {g}"], b.dropped.clone()))  # type: ignore[misc]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_step_decided_midway_is_the_step_that_was_planned_so(data: st.DataObject) -> None:
    """Geometry, slots and counts are those of prompts planned from the start as the gate decided."""
    gated, planned, scheduled, computed, said = [], [], [], [], []
    for _ in range(data.draw(st.integers(1, 5))):
        kind = data.draw(st.sampled_from(["asked", "whole", "refused", "decodes"]))
        image = data.draw(st.integers(6, 90))
        share = data.draw(st.sampled_from([0.999, 0.6, 0.2]))
        n = TEXT + image
        if kind == "asked":
            found = plan(share, image=image)
            leaving = data.draw(st.booleans())
            said += [leaving] if found.gate is not None else []
            gated.append(drops_of(found, image, at=found.gate))
            settled = found.decided(leaving) if found.gate is not None else found
            planned.append(drops_of(settled, image, at=None))
        elif kind == "whole":
            gated.append(None)
            planned.append(None)
        else:
            found = plan(share, image=image, gate=False)
            gated.append(drops_of(found, image, at=None))
            planned.append(drops_of(found, image, at=None))
        scheduled.append(1 if kind == "decodes" else n)
        computed.append(n + 3 if kind == "decodes" else 0)
    now, before = np.array(scheduled, dtype=np.int32), np.array(computed, dtype=np.int32)
    one, other = (
        KVDropBands(3, 8, 2000, torch.device("cpu"), gate=linear_gate(torch.ones(4)), gate_at=1)
        for _ in range(2)
    )
    groups, expected = (Groups(bands, len(now), int(now.sum())) for bands in (one, other))
    one.begin(gated, now, before)
    other.begin(planned, now, before)
    held = [40] * len(now)
    groups.write(one, held)
    expected.write(other, held)
    assert len(one.undecided) == len(said)
    below = one.bands[1].step
    for case in one.undecided:
        drop = gated[case.row]
        assert drop is not None and below is not None
        assert case.end == int(below.starts[case.row]) + drop[1].reaching
    metadata = one.decide(said) if said else {}
    assert set(metadata) == ({f"layer {g}" for g in (2, 3, 4, 5)} if any(said) else set())
    assert len(one.take_decisions()) == len(said) and not one.take_decisions() and not one.undecided
    for mine, theirs in zip(groups.slots, expected.slots, strict=True):
        assert mine.tolist() == theirs.tolist()
    for mine, theirs in zip(one.bands, other.bands, strict=True):
        assert (mine.step is None) == (theirs.step is None)
        assert mine.dropped.tolist() == theirs.dropped.tolist()
        if mine.step is not None and theirs.step is not None:
            for name in ("dropped", "query_start_loc", "requests", "positions", "pruned", "starts"):
                assert getattr(mine.step, name).tolist() == getattr(theirs.step, name).tolist(), name
            assert mine.step.reaching == theirs.step.reaching
        assert (mine.prompts is None) == (theirs.prompts is None)
        if mine.prompts is not None and theirs.prompts is not None:
            assert (mine.prompts.rows, mine.prompts.rows_kept) == (
                theirs.prompts.rows,
                theirs.prompts.rows_kept,
            )
            assert mine.prompts.settled == theirs.prompts.settled
    for mine_drops, their_drops in zip(gated, planned, strict=True):
        for a, b in zip(mine_drops or (), their_drops or (), strict=True):
            assert (a.dropped, a.lost, a.rated) == (b.dropped, b.lost, b.rated)


def test_a_decision_is_made_once() -> None:
    """A preempted prompt comes again as it was decided."""
    bands = KVDropBands(3, 8, 2000, torch.device("cpu"), gate=linear_gate(torch.ones(4)), gate_at=1)
    drops = drops_of(plan(0.999), IMAGE, at=1)
    whole, none = np.array([130], dtype=np.int32), np.zeros(1, dtype=np.int32)
    bands.begin([drops], whole, none)
    bands.decide([True])
    assert bands.take_decisions() == {0: True}
    bands.begin([drops], whole, none)
    assert not bands.undecided and not bands.take_decisions()
    assert bands.bands[1].dropped[0] == IMAGE


def test_blocks_that_cover_the_exit_alone_are_enough_once_it_is_decided() -> None:
    """The check that a request holds blocks for what the step writes is made again."""
    for leaving in (True, False):
        bands = KVDropBands(3, 8, 2000, torch.device("cpu"), gate=linear_gate(torch.ones(4)), gate_at=1)
        bands.begin(
            [drops_of(plan(0.999), IMAGE, at=1)], np.array([130], dtype=np.int32), np.zeros(1, np.int32)
        )
        groups = Groups(bands, 1, 130)
        groups.write(bands, [17])
        for band in bands.bands[1:]:
            for table, slots in zip(groups.tables, groups.slots, strict=True):
                band.write_slots(table, 8, slots, np.array([4], dtype=np.int32))
        bands.decide([leaving])
        assert bands.take_overrun() == ([] if leaving else [0])


# the network and its file --------------------------------------------------


def test_a_gate_reads_the_mean_of_the_text_and_its_last_token() -> None:
    text = torch.tensor([[1.0, 2.0], [3.0, 4.0], [7.0, 8.0]])
    assert text_states(text).tolist() == [2.0, 3.0, 7.0, 8.0]
    assert text_states(text[2:]).tolist() == [7.0, 8.0, 7.0, 8.0]


def test_a_tie_lets_the_tokens_stay() -> None:
    assert leaves(torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])).tolist() == [False, True, False]


def test_a_gate_comes_back_from_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gate, path = Gate(torch.randn(16, 8), torch.randn(2, 16)), tmp_path / "exit.gate"
    facts = GateFacts(3, 6, 4, "0123")
    save(path, gate, facts, {"note": [1]})
    assert read_facts(path) == facts
    states = torch.randn(5, 8)
    torch.testing.assert_close(load(path)(states), gate(states), atol=2e-2, rtol=2e-2)
    save(path, gate, facts, {}, torch.float32)
    assert torch.equal(load(path)(states), gate(states))


def test_no_gate_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "exit.gate"
    with pytest.raises(ScheduleError, match="cannot be read as a gate"):
        load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ScheduleError, match="cannot be read as a gate"):
        load(path)
    model = random_llava(tmp_path / "llava", layers=2) / "model.safetensors"
    with pytest.raises(ScheduleError, match="is no gate, as `vtprune calibrate --gate` writes"):
        load(model)


# at start --------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llava(tmp_path_factory.mktemp("llava"), layers=6)


def write(path: Path, weights: str, layer: int = 2, layers: int = 6) -> Path:
    save(path, linear_gate(torch.ones(256)), GateFacts(layer, layers, 128, weights), {})
    return path


def test_every_process_knows_where_the_gate_decides(checkpoint: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "exit.gate", fingerprint(str(checkpoint)))
    for layers, at in (("2,4:0.5", 0), ("1,2", 1)):
        drop = kv_drop_config(config(checkpoint, policy={"prune_layers": layers, "prune_gate": str(path)}))
        assert (drop.gate, drop.gate_file) == (at, str(path.resolve()))
    alone = kv_drop_config(config(checkpoint, policy={"prune_layer": 2, "prune_gate": str(path)}))
    assert alone.gate == 0
    assert kv_drop_config(config(checkpoint)).gate is None
    # beside the schedule's file, which names it
    schedule = tmp_path / "schedule.json"
    schedule.write_text(json.dumps({"prune_layers": "2:vision=1", "gate": path.name}))
    policy = {"prune_layer": None, "prune_schedule": str(schedule)}
    assert kv_drop_config(config(checkpoint, policy=policy)).gate_file == str(path.resolve())
    schedule.write_text(json.dumps({"prune_layers": "2:vision=1", "gate": 3}))
    with pytest.raises(ValueError, match='"gate" must be the name of a file'):
        config(checkpoint, policy=policy)


@pytest.mark.parametrize(
    ("facts", "layers", "sentence"),
    [
        ({"weights": "0123"}, "2", r"was trained for a model with the weights 0123, .*calibrate --gate"),
        ({"layer": 3}, "2,4", "decides at layer 3, and the prune layers are 2, 4: add 3:vision=1"),
        ({"layers": 8}, "2", "is for a decoder of 8 layers and width 128, and this one has 6 and 128"),
    ],
)
def test_a_gate_that_cannot_work_is_refused(
    checkpoint: Path, tmp_path: Path, facts: dict[str, Any], layers: str, sentence: str
) -> None:
    path = write(tmp_path / "exit.gate", **{"weights": fingerprint(str(checkpoint)), **facts})
    with pytest.raises(ValueError, match=sentence):
        config(checkpoint, policy={"prune_layers": layers, "prune_gate": str(path)})


def test_a_gate_needs_a_prune_layer() -> None:
    with pytest.raises(PolicyError, match="prune_gate needs its prune layer among prune_layers"):
        PrunePolicy.from_config({"vtprune": {"prune_gate": "exit.gate"}})


def test_a_request_may_refuse_it() -> None:
    refused = KVSettings.of((0.5,), gate=False)
    assert refused.extra_args() == {"vtprune": {"kv_keep": 0.5, "kv_scope": "all", "kv_gate": "off"}}
    assert KVSettings.from_extra_args(refused.extra_args(), KVSettings()) == refused
    # the entry of a request that takes it says nothing, as before there was one
    assert "kv_gate" not in KVSettings(0.5).extra_args()["vtprune"]
