# SPDX-License-Identifier: Apache-2.0
"""The demo model made deep: the same logits from more and wider layers, at the cost that is promised."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from benchmarks import models
from benchmarks.deep import Deepening, deepen
from vllm_vtprune import demo_model
from vtprune_eval.flops import CostShape, RequestShape, request_work

SMALL = Deepening(before=2, after=3, hidden=300, intermediate=500)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    deepen(demo_model.FOLDER, folder, SMALL)
    return folder


def test_it_answers_as_the_demo_model(deep: Path) -> None:
    plain, info = _load(demo_model.FOLDER)
    deeper, of_deeper = _load(deep)
    assert not info["missing_keys"] and not of_deeper["missing_keys"] and not of_deeper["unexpected_keys"]
    assert deeper.config.text_config.num_hidden_layers == plain.config.text_config.num_hidden_layers + 5
    first, other = _prompt(demo_model.FOLDER), _prompt(deep)
    assert first["input_ids"].tolist() == other["input_ids"].tolist()
    with torch.inference_mode():
        logits, of_deep = plain(**first), deeper(**other)
    assert logits.logits.abs().max() > 1
    torch.testing.assert_close(of_deep.logits, logits.logits, rtol=0, atol=1e-4)


def test_added_layers_hand_on_and_the_demos_stand_between_them(deep: Path) -> None:
    deeper, _ = _load(deep)
    plain, _ = _load(demo_model.FOLDER)
    with torch.inference_mode():
        states = deeper(**_prompt(deep), output_hidden_states=True).hidden_states
        of_plain = plain(**_prompt(demo_model.FOLDER), output_hidden_states=True).hidden_states
    # entry k is what layer k is given; the last one is behind the final norm
    assert torch.equal(states[0], states[1]) and torch.equal(states[1], states[2])
    at_prune_layer = SMALL.before + demo_model.PRUNE_LAYER
    width = plain.config.text_config.hidden_size
    torch.testing.assert_close(
        states[at_prune_layer][..., :width], of_plain[demo_model.PRUNE_LAYER], rtol=1e-5, atol=1e-4
    )
    assert not states[at_prune_layer][..., width:].any()
    behind = SMALL.before + plain.config.text_config.num_hidden_layers
    assert torch.equal(states[behind], states[behind + 2])
    # what they compute is work on full matrices all the same
    added = deeper.model.language_model.layers[0]
    assert added.mlp.gate_proj.weight.std() > 0.01 and added.self_attn.q_proj.weight.std() > 0.01


def test_a_token_costs_as_much_as_the_decoder_bound_models() -> None:
    demo = CostShape.of(demo_model.FOLDER)
    added = models.DEMO_DEEP
    layers = demo.layers + added.before + added.after
    deep = replace(demo, layers=layers, hidden=added.hidden, intermediate=added.intermediate)
    shape = models.DECODER_150M
    bound = replace(
        demo,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        layers=shape.layers,
        q_width=shape.hidden,
        kv_width=shape.hidden,
        vocab=shape.vocab,
    )
    prompt = RequestShape(1, _prompt(demo_model.FOLDER)["input_ids"].shape[1] - demo.patches, demo.patches, 1)
    costs = [request_work(shape, prompt)["prefill"].flops for shape in (deep, bound)]
    assert costs[0] == pytest.approx(costs[1], rel=0.1)


def test_it_is_a_model_by_name_and_prints_how_it_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "DEMO_DEEP", SMALL)
    assert models.main(["demo-deep", "--model-dir", str(tmp_path)]) == 0
    told = capsys.readouterr()
    folder, *flags = told.out.split()
    assert json.loads((Path(folder) / "config.json").read_text())["text_config"]["num_hidden_layers"] == 10
    assert flags[flags.index("--prune-layer") + 1] == "5" and "VLLM_CPU_KVCACHE_SPACE=1" in told.err
    assert models.main(["none"]) == 2 and "demo-deep" in capsys.readouterr().err


def _load(folder: Path) -> tuple[LlavaForConditionalGeneration, dict[str, set[str]]]:
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    return model.eval(), info


def _prompt(folder: Path) -> dict[str, torch.Tensor]:
    processor = LlavaProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": demo_model.QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with Image.open(demo_model.EXAMPLE) as image:
        inputs = processor(images=[image], text=text, return_tensors="pt", add_special_tokens=False)
    return dict(inputs)
