# SPDX-License-Identifier: Apache-2.0
"""The small Qwen3-VL: what its training computes is what the exported checkpoint computes in transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from demo import study_qwen3_vl, train_qwen3_vl
from demo.model import VOCABULARY
from demo.qwen3_vl import SIDES, Shape, answer_logits, build, export, pack_questions, patch_rows, see
from demo.qwen3_vl_runner import Qwen3VLRunner
from tests.helpers.family_processor import placeholder_of, processor_of
from vllm_vtprune import demo_model, request_kwargs
from vllm_vtprune.settings import VisionSettings
from vtprune_eval.drawn import questions_each
from vtprune_eval.scenes import make_scene
from vtprune_eval.setting import Setting
from vtprune_loadtest.questions import is_right


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made: Any = build(Shape()).eval()
    for parameter in made.parameters():  # larger weights, so that a wrong mask or position shows
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


@pytest.fixture(scope="module")
def exported(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen") / "export"
    export(model, folder, torch.bfloat16)
    return folder


@pytest.mark.parametrize("side", SIDES)
def test_pictures_enter_as_the_exported_processor_prepares_them(exported: Path, side: int) -> None:
    pixels = make_scene("train", 3, side).pixels
    prepared = AutoProcessor.from_pretrained(exported).image_processor(Image.fromarray(pixels))
    assert prepared["image_grid_thw"].tolist() == [[1, side // 14, side // 14]]
    rows = patch_rows(torch.from_numpy(pixels.copy())[None])
    torch.testing.assert_close(rows, torch.as_tensor(prepared["pixel_values"]), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("side", SIDES)
def test_packed_questions_get_the_logits_they_get_when_asked_alone(
    model: Any, exported: Path, side: int
) -> None:
    """Masks, three-dimensional positions and the deepstack level, beside transformers' own forward pass."""
    scene = make_scene("train", 5, side)
    questions = questions_each(scene, random.Random(0))[:3]
    seen = see(model, torch.from_numpy(scene.pixels.copy())[None])
    keep = torch.arange(seen.units.shape[1])[None]
    packed = pack_questions([questions], keep)
    units = side // 28
    logits = answer_logits(model, seen.kept(keep), keep, (units, units), packed)
    together = logits.view(len(questions), 2, -1)[:, 0]
    processor = AutoProcessor.from_pretrained(exported)
    for question, mine in zip(questions, together, strict=True):
        message = [{"type": "image"}, {"type": "text", "text": question.text}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True
        )
        inputs = processor(
            text=text, images=Image.fromarray(scene.pixels), add_special_tokens=False, return_tensors="pt"
        )
        alone = model(**inputs).logits[0, -1]
        torch.testing.assert_close(mine, alone, atol=1e-3, rtol=1e-3)


def test_it_stays_below_its_limit_in_16_bits(exported: Path) -> None:
    assert (exported / "model.safetensors").stat().st_size < 12_000_000
    assert max(VOCABULARY.values()) < 125


def test_a_few_steps_of_each_phase_run_go_on_and_export(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--align-steps", "1", "--validation-scenes", "2", "--threads", "1"]
    arguments += ["--pictures", "10"]
    train_qwen3_vl.main([*arguments, "--tower-steps", "2", "--steps", "1"])
    train_qwen3_vl.main([*arguments, "--tower-steps", "2", "--steps", "3"])
    lines = (tmp_path / "log.jsonl").read_text()
    assert '"phase": "tower"' in lines and '"loss"' in lines and '"objects alone"' in lines
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
    assert all(torch.isfinite(parameter).all() for parameter in reloaded.parameters())


def test_the_plugin_prunes_it(exported: Path) -> None:
    ours = processor_of(exported)
    picture = Image.fromarray(np.asarray(make_scene("train", 1, 336).pixels))
    kwargs, _ = request_kwargs(keep_ratio=0.25)
    items = ours.info.parse_mm_data({"image": [picture]})
    result = ours(placeholder_of(ours), items, hf_processor_mm_kwargs=kwargs)
    assert result["vtprune_vision_tokens"] == 144
    assert result["mm_placeholders"]["image"][0].get_num_embeds() == 36


def test_the_study_s_replies_are_what_generate_begins_with(model: Any, exported: Path) -> None:
    """The study's runner beside transformers' own loop, on the whole picture."""
    runner = Qwen3VLRunner(exported, "test", 2, 168, "scenes", frozenset({"received"}))
    processor = AutoProcessor.from_pretrained(exported)
    stored = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32)
    for question, reply in zip(runner.questions.asked, runner.answer(Setting()), strict=True):
        message = [{"type": "image"}, {"type": "text", "text": question.text}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True
        )
        picture = runner.questions.pictures[question.picture]
        inputs = processor(text=text, images=picture, add_special_tokens=False, return_tensors="pt")
        assert reply.prompt_tokens == inputs["input_ids"].shape[1]
        first = stored.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1:]
        assert reply.text.removesuffix(" …") == processor.tokenizer.decode(first)


@pytest.mark.parametrize(("domain", "least"), [("scenes", 0.9), ("documents", 0.65)])
def test_the_shipped_one_answers_with_a_third_of_the_tokens_too(domain: str, least: float) -> None:
    folder = demo_model.QWEN3_VL.folder
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12_000_000
    runner = Qwen3VLRunner(folder, "test", 30, 336, domain, frozenset({"received"}))

    def right(setting: Setting) -> float:
        replies = runner.answer(setting)
        return sum(
            is_right(r.text, q.answers) for r, q in zip(replies, runner.questions.asked, strict=True)
        ) / len(replies)

    whole = right(Setting())
    assert whole > least
    assert right(Setting(VisionSettings("topk", None, 0.33, score="received"))) > whole - 0.1


def test_the_study_writes_its_tables_and_plots(exported: Path, tmp_path: Path) -> None:
    arguments = [str(exported), "--out", str(tmp_path), "--pictures", "3", "--validation", "2"]
    study_qwen3_vl.main([*arguments, "--side", "168", "--threads", "1"])
    result = json.loads((tmp_path / "results.json").read_text())
    assert set(result["domains"]) == {"scenes", "documents"}
    for domain, part in result["domains"].items():
        rows = part["fixed"]["rows"]
        by_method = {
            row["setting"]["method"]: row for row in rows[1:] if row["setting"]["keep_ratio"] == 0.33
        }
        assert {"topk", "divprune", "downscale"} <= by_method.keys()
        assert by_method["topk"]["vision_tokens_kept"] == 12
        assert by_method["downscale"]["vision_tokens_kept"] == 12, "three rows of four"
        assert (tmp_path / f"accuracy-{domain}.png").is_file()
    assert "over downscale" in (tmp_path / "results.md").read_text()
