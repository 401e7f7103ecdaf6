# SPDX-License-Identifier: Apache-2.0
"""Accuracy of an exported folder as a user meets it: `python -m demo.verify --checkpoint DIR`.

Every question is a conversation of its own through the folder's processor, chat template and transformers'
`generate`; nothing of the training code but the pictures is used.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from demo.accuracy import Accuracy
from vtprune_eval.drawn import DOMAINS, Drawn, make, questions_each
from vtprune_eval.scene_questions import Question


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, scene: Drawn, questions: list[Question]
) -> list[str]:
    """What the model generates greedily for each question, asked alone and decoded."""
    conversations: list[Any] = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        for question in questions
    ]
    prompts = [processor.apply_chat_template(one, add_generation_prompt=True) for one in conversations]
    inputs = processor(
        images=[Image.fromarray(scene.pixels)] * len(prompts),
        text=prompts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=False,
    )
    made = model.generate(  # type: ignore[misc]
        **inputs.to(model.device), max_new_tokens=4, do_sample=False
    )
    texts: list[str] = processor.batch_decode(made[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def main() -> None:
    """Parse the command line and print the accuracy as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--split", default="test")
    parser.add_argument("--domain", default="scenes", choices=DOMAINS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = LlavaForConditionalGeneration.from_pretrained(options.checkpoint).eval()
    processor = LlavaProcessor.from_pretrained(options.checkpoint)
    accuracy = Accuracy()
    for index in range(options.scenes):
        scene = make(options.domain, options.split, index, model.config.vision_config.image_size)
        questions = questions_each(scene, random.Random(f"0 {index}"))
        for question, answer in zip(questions, answers(model, processor, scene, questions), strict=True):
            accuracy.count(scene, question, answer == question.answer)
    print(json.dumps(accuracy.as_dict(), indent=1))


if __name__ == "__main__":
    main()
