# SPDX-License-Identifier: Apache-2.0
"""vLLM's scale-out routes within the operator's policy: its own application with the plugin, no engine."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateTokensResponse

from vllm_vtprune.context import PluginContext
from vllm_vtprune.policy import PrunePolicy
from vtprune_server.scale_out import GENERATE_ROUTE, RENDER_ROUTES


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_vtprune.compat import serve_parser

    make_arg_parser, _ = serve_parser()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "vtprune")
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-scale-out"])
        yield build_app(args, ("generate",))


class Tokens:
    """Stands where vLLM's `ServingTokens` does, with an engine behind it."""

    def __init__(self) -> None:
        self.served: list[Any] = []

    async def serve_tokens(self, request: Any, raw_request: Any) -> GenerateTokensResponse:
        self.served.append(request.sampling_params.extra_args)
        return GenerateTokensResponse(request_id="an-id", choices=[])


async def generate(
    app: Any, policy: PrunePolicy, extra_args: Any, headers: dict[str, str] | None = None, **body: Any
) -> tuple[httpx.Response, list[Any]]:
    tokens = Tokens()
    app.state.serving_tokens = tokens
    app.state.online_renderer = SimpleNamespace(vtprune_context=PluginContext(policy=policy))
    app.state.enable_server_load_tracking = False
    sampling = {"max_tokens": 1} | ({"extra_args": extra_args} if extra_args is not None else {})
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        body = {"token_ids": [1, 2], "sampling_params": sampling, **body}
        return await client.post(GENERATE_ROUTE, json=body, headers=headers), tokens.served


POLICY = PrunePolicy(prune_layer=2, min_kv_keep=0.5)


@pytest.mark.parametrize(
    "policy,extra_args",
    [
        (POLICY, None),
        (POLICY, {"else": 1}),
        (POLICY, {"vtprune": {"kv_keep": 0.5, "kv_scope": "vision"}}),
        (PrunePolicy(prune_layer=2, client_controls=False), None),
        # what rendering writes where nothing may be chosen
        (PrunePolicy(prune_layer=2, client_controls=False), {"vtprune": {"kv_keep": 1.0, "kv_scope": "all"}}),
    ],
)
async def test_what_the_policy_allows_is_served(app: Any, policy: PrunePolicy, extra_args: Any) -> None:
    response, served = await generate(app, policy, extra_args)
    assert response.status_code == 200, response.text
    assert served == [extra_args]


@pytest.mark.parametrize(
    "policy,extra_args,sentence",
    [
        (POLICY, {"vtprune": {"kv_keep": 0.4}}, "keeps at least 0.5 (min_kv_keep)"),
        (POLICY, {"vtprune": {"kv_keep": [0.9, 0.8]}}, "this server has 1 prune layer"),
        (POLICY, {"vtprune": {"kv_keep": 7}}, "extra_args.vtprune.kv_keep"),
        (POLICY, {"vtprune": {"method": "random"}}, "Unknown field extra_args.vtprune.method"),
        (POLICY, {"vtprune": "all"}, "must be an object"),
        (PrunePolicy(), {"vtprune": {"kv_keep": 0.9}}, "needs a prune layer"),
        (
            PrunePolicy(prune_layer=2, client_controls=False),
            {"vtprune": {"kv_keep": 0.9}},
            "the operator of this server fixed the pruning",
        ),
    ],
)
async def test_what_is_beyond_the_policy_is_a_400(
    app: Any, policy: PrunePolicy, extra_args: Any, sentence: str
) -> None:
    response, served = await generate(app, policy, extra_args)
    assert response.status_code == 400 and served == []
    assert sentence in response.json()["error"]["message"]


async def test_settings_that_would_not_act_are_a_400(app: Any) -> None:
    by_header, served = await generate(app, POLICY, None, {"X-VTPrune-Preset": "balanced"})
    by_field, also_served = await generate(app, POLICY, None, vtprune={"preset": "balanced"})
    assert served == also_served == []
    for response in (by_header, by_field):
        assert response.status_code == 400
        assert f"does not act on {GENERATE_ROUTE}" in response.json()["error"]["message"]


def test_rendering_reads_the_headers(app: Any) -> None:
    """As every other route that renders prompts; 0.33 has `/v1/decisions` beside 0.32's `/v1/systemone`."""
    described = app.openapi()["paths"]
    decisions = [path for path in ("/v1/systemone", "/v1/decisions") if path in described]
    for path in (*RENDER_ROUTES, *decisions):
        named = {parameter["name"] for parameter in described[path]["post"]["parameters"]}
        assert "X-VTPrune-Preset" in named, path


async def test_a_bad_header_is_refused_where_a_prompt_is_rendered(app: Any) -> None:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        decisions = [path for path in app.openapi()["paths"] if path in ("/v1/systemone", "/v1/decisions")]
        assert decisions
        for path in (*RENDER_ROUTES, *decisions):
            response = await client.post(path, json={}, headers={"X-VTPrune-Preset": "hard"})
            assert response.status_code == 400 and "X-VTPrune-Preset" in response.text, path
