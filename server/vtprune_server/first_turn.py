# SPDX-License-Identifier: Apache-2.0
"""How many tokens of a chat's prompt its first turn's had: those that may leave where later turns go on.

The first turn is the one with the first picture or video, with all that precedes it; in a chat without any,
the very first. The template is filled in again with the messages before its answer, as it was for that turn,
and what comes of it is looked for at the beginning of the whole prompt. Media are not looked at again.
Hook: `vllm.renderers.hf.safe_apply_chat_template` and `BaseRenderer.tokenize_prompt_async` of vLLM 0.32, as
`OnlineRenderer.preprocess_chat` has them called.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.renderers.chat_utils import has_non_text_content
from vllm.renderers.hf import HfRenderer, safe_apply_chat_template
from vllm.renderers.online_renderer import OnlineRenderer

#: Most tokens that a template writes where an image or a video goes.
_LONGEST_PLACE = 4


async def first_turn_tokens(
    renderer: OnlineRenderer,
    conversation: Sequence[Mapping[str, Any]],
    engine_input: Mapping[str, Any],
    request: Any,
    messages: Sequence[Any],
    *args: Any,
    **kwargs: Any,
) -> int | None:
    """Tokens of the prompt that a chat's first turn had.

    Args:
        renderer: which rendered the chat.
        conversation: its messages, as `preprocess_chat` returned them.
        engine_input: the prompt that it returned.
        request: vLLM's request model.
        messages: the chat, as the client sent it.
        *args: what `preprocess_chat` was given behind the messages.
        **kwargs: likewise.

    Returns:
        0 where all of the prompt is the first turn's; None where it cannot be told: where the prompt was cut
        off, or where the template writes a first turn otherwise once it was answered.
    """
    number = first_answer(messages)
    if number is None:
        return 0
    engine = renderer.renderer
    prompt = engine_input.get("prompt_token_ids")
    answers = [at for at, message in enumerate(conversation) if message["role"] == "assistant"]
    if number >= len(answers) or prompt is None or not isinstance(engine, HfRenderer):
        return None
    if getattr(request, "truncate_prompt_tokens", None) is not None:
        return None
    signature = inspect.signature(OnlineRenderer.preprocess_chat)
    given = signature.bind(renderer, request, messages, *args, **kwargs)
    params = request.build_chat_params(
        given.arguments["default_template"], given.arguments["default_template_content_format"]
    ).with_defaults(given.arguments["default_template_kwargs"])
    options = {**params.get_apply_chat_template_kwargs(), "tools": given.arguments.get("tool_dicts")}
    options |= {"add_generation_prompt": True, "continue_final_message": False, "tokenize": False}
    text = safe_apply_chat_template(
        renderer.model_config,
        engine.get_tokenizer(),
        list(conversation[: answers[number]]),
        **options,
    )
    tokens = await engine.tokenize_prompt_async(
        {"prompt": text},
        request.build_tok_params(renderer.model_config),
    )
    placeholders = (engine_input.get("mm_placeholders") or {}).values()
    ranges = sorted((one.offset, one.length) for some in placeholders for one in some)
    return beginning(tokens["prompt_token_ids"], prompt, ranges) or None


def first_answer(messages: Sequence[Any]) -> int | None:
    """Which of a chat's answers, counted from 0, is that to its first turn; None while there is none.

    Args:
        messages: as the client sent them; the last is no answer yet, but at most one to be continued.
    """
    asked = not has_non_text_content(messages)
    answers = 0
    for message in messages[:-1]:
        asked = asked or has_non_text_content([message])
        if isinstance(message, Mapping) and message.get("role") == "assistant":
            if asked:
                return answers
            answers += 1
    return None


def beginning(first: Sequence[int], prompt: Sequence[int], placeholders: Sequence[tuple[int, int]]) -> int:
    """How much of a prompt a shorter one takes up in it.

    Args:
        first: the shorter one, in which each image or video is as the template wrote it: as many tokens each.
        prompt: the whole one, in which each takes up its place.
        placeholders: (offset, length) of these places in it, in order.

    Returns:
        Tokens of the whole one; 0 where it does not begin with the shorter one.
    """
    first, prompt = list(first), list(prompt)
    for written in range(1, _LONGEST_PLACE + 1):
        start = read = 0
        for offset, length in [*placeholders, (len(prompt), 0)]:
            end = start + len(first) - read
            # the text behind the last of its places
            if start < end <= offset and end < len(prompt) and prompt[start:end] == first[read:]:
                return end
            text = prompt[start:offset]
            if first[read : read + len(text)] != text:
                break
            read += len(text) + written
            start = offset + length
    return 0
