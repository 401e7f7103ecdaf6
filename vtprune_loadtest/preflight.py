# SPDX-License-Identifier: Apache-2.0
"""Before any load: does this server read the settings under test?

A server without vtprune passes over its headers, and a sweep would compare a setting with itself.
"""

import json
from typing import Any

from vllm_vtprune.contract import HEADER_PREFIX, KWARG
from vtprune_loadtest.client import ChatClient
from vtprune_loadtest.config import LoadTestConfig
from vtprune_loadtest.errors import LoadTestError
from vtprune_loadtest.sweep import DOWNSCALE

_CONFIG_PATH = "/vtprune/config"


async def require_vtprune(client: ChatClient, config: LoadTestConfig, model: str) -> None:
    """Make sure that the server prunes, where the test asks it to.

    Asks for `/vtprune/config`; where a proxy hides that, asks for one token of text and looks for vtprune's
    response headers and usage.

    Raises:
        LoadTestError: the server is not vtprune's.
    """
    asked = _pruning_asked_for(config)
    if asked is None or await _shows_its_policy(client):
        return
    body: dict[str, Any] = {"model": model, "max_tokens": 1}
    body["messages"] = [{"role": "user", "content": "Hello"}]
    answer = await client.complete(
        json.dumps(body | config.extra_body).encode(), dict(config.settings[0].headers)
    )
    if answer is None:
        return  # refused: the warm-up tells with which words
    headers, usage = answer
    if KWARG in usage or any(name.lower().startswith(HEADER_PREFIX) for name in headers):
        return
    raise LoadTestError(
        f"{config.endpoint.base_url} is not a vtprune server: it passes over {asked}, and every setting "
        "would be the same. Start `vtprune serve`, or load this server without pruning settings."
    )


async def require_sizes(client: ChatClient, config: LoadTestConfig) -> None:
    """Make sure that a smaller picture has fewer tokens, where the test sends some and the server tells.

    Raises:
        LoadTestError: the model's tower takes pictures of one size.
    """
    if all(setting.pixels == 1 for setting in config.settings):
        return
    try:
        shown = await client.get_json(_CONFIG_PATH)
        tokens = shown["model"]["vision_tokens_per_image"]
    except (LoadTestError, KeyError, TypeError):
        return  # it does not tell: the answers' counts will
    if tokens is not None:
        raise LoadTestError(
            f"{DOWNSCALE} in --sweep cannot be measured on this model: its tower resizes every picture to "
            f"one size, {tokens} tokens whatever the picture. Leave it out; the arm downscale of `vtprune "
            "eval` shrinks pictures inside such a tower."
        )


def _pruning_asked_for(config: LoadTestConfig) -> str | None:
    """The first pruning setting of the test, None without any."""
    names: list[str] = [name for setting in config.settings for name, _ in setting.headers]
    for name in (*names, *config.endpoint.headers):
        if name.lower().startswith(HEADER_PREFIX):
            return f"the header {name}"
    return f"the body's field {KWARG!r}" if KWARG in config.extra_body else None


async def _shows_its_policy(client: ChatClient) -> bool:
    try:
        shown = await client.get_json(_CONFIG_PATH)
    except LoadTestError:
        return False
    return isinstance(shown, dict) and "policy" in shown
