# SPDX-License-Identifier: Apache-2.0
"""Thinned placeholders and restored positions, over many picture sizes and masks, without an engine.

An engine worker cannot survive embeddings that differ in number from their places.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vllm.multimodal.processing import PromptUpdateDetails

from tests.helpers.family_checkpoints import CHECKPOINTS
from tests.helpers.family_processor import placeholder_of
from vllm_vtprune.vision.placeholders import FIELDS, embed_mask, thin

IMAGE, BREAK, END = 1, 2, 3


def rows_with_breaks(rows: int, columns: int) -> PromptUpdateDetails:
    tokens = ([IMAGE] * columns + [BREAK]) * rows
    return PromptUpdateDetails.select_token_id([*tokens[:-1], END], IMAGE)


@given(st.integers(1, 12), st.integers(1, 12), st.booleans(), st.randoms(use_true_random=False))
def test_every_token_without_an_embedding_stays(rows: int, columns: int, flat: bool, rng: Any) -> None:
    details = PromptUpdateDetails([IMAGE] * rows * columns) if flat else rows_with_breaks(rows, columns)
    kept = torch.tensor([rng.random() < 0.3 for _ in range(rows * columns)])
    kept[rng.randrange(rows * columns)] = True
    thinned = thin(details, kept)
    assert [t for t in thinned.full if t != IMAGE] == [t for t in details.full if t != IMAGE]
    assert int(embed_mask(thinned).sum()) == int(kept.sum()) and thinned.places == rows * columns
    # each row keeps its own
    if not flat:
        counts = "".join(map(str, thinned.full)).replace(str(END), str(BREAK)).split(str(BREAK))[:-1]
        assert [len(row) for row in counts] == kept.view(rows, columns).sum(1).tolist()


@pytest.mark.parametrize("kept", [[], [True], [False, False], [True] * 3])
def test_a_mask_that_does_not_fit_is_refused(kept: list[bool]) -> None:
    with pytest.raises(ValueError, match="does not fit 2 places"):
        thin(PromptUpdateDetails([IMAGE, IMAGE]), torch.tensor(kept, dtype=torch.bool))


def sizes(count: int, longest: int = 30) -> list[tuple[int, int]]:
    """Widths and heights up to 1:`longest` and longest:1, small and large."""
    rng = random.Random(7)
    found = []
    for _ in range(count):
        short = rng.choice([rng.randint(1, 40), rng.randint(40, 400)])
        long = min(int(short * rng.uniform(1, longest)), 3000)
        found.append((short, long) if rng.random() < 0.5 else (long, short))
    return found


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_placeholders_and_embeddings_agree_for_200_sizes(name: str, processor: Callable[[str], Any]) -> None:
    """The places are those of vLLM's own update; what stays is what the mask says, whatever the method."""
    ours, noisy = processor(name), Image.effect_noise((64, 64), 80).convert("RGB")
    tried = 0
    for width, height in sizes(200):
        image = noisy.resize((width, height))
        tokens = ours.info.get_tokenizer().encode(placeholder_of(ours), add_special_tokens=False)
        rng = random.Random(width * height)
        setting = rng.choice(
            ['{"keep_ratio":0.3,"method":"random","min_tokens":1,"score":"received"}',
             '{"keep_ratio":0.01,"method":"inflection","min_tokens":1,"score":"received"}',
             '{"aggressiveness":0.6,"method":"inflection","min_tokens":1,"score":"received"}', "off"]
        )  # fmt: skip
        items = ours.info.parse_mm_data({"image": [image]})
        result = ours(tokens, items, hf_processor_mm_kwargs={"vtprune": setting})
        (item,), (found,) = result["mm_kwargs"]["image"], result["mm_placeholders"]["image"]
        kept, embeddings = item[FIELDS["image"].kept].data, item["image_embeds"].data
        assert found.get_num_embeds() == embeddings.shape[0] == int(kept.sum()) >= 1
        assert len(kept) == result["vtprune_vision_tokens"] == unpruned_places(ours, image, tokens)
        assert setting != "off" or bool(kept.all())
        tried += 1
    assert tried == 200


def unpruned_places(processor: Any, image: Image.Image, tokens: list[int]) -> int:
    """By vLLM's own processor of the model, which stands behind ours."""
    vllms = type(processor).__mro__[2]
    own = vllms(processor.info, processor.dummy_inputs)
    result = own(tokens, processor.info.parse_mm_data({"image": [image]}), hf_processor_mm_kwargs={})
    return int(result["mm_placeholders"]["image"][0].get_num_embeds())
