# SPDX-License-Identifier: Apache-2.0
"""vLLM's prompt-taking routes with the contract's headers and body field.

Each route is vLLM's own handler behind a thin wrapper: the headers are read and validated, the handler runs,
the counts are put on its response. vLLM replaces a core route by a plugin's of the same path and method, in
routing and in OpenAPI (`vllm.plugins.endpoint_plugins.interface.attach_endpoint_plugins`).
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field, create_model
from vllm.exceptions import VLLMValidationError

from vllm_vtprune.contract import KWARG, body_schema, header_parameters
from vllm_vtprune.errors import SettingsError
from vllm_vtprune.settings import Controls
from vtprune_server.client_errors import disclosable
from vtprune_server.context import RequestContext, current_request, refusal
from vtprune_server.request_log import LoggedRequest
from vtprune_server.responses import annotate
from vtprune_server.scale_out import GENERATE_ROUTE, RENDER_ROUTES, check_generate

#: The routes that render prompts. `/invocations` dispatches to the handlers itself.
PROMPT_ROUTES = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/invocations",
    # vLLM's structured decisions: 0.32's name, and 0.33's
    "/v1/systemone",
    "/v1/decisions",
    *RENDER_ROUTES,
    GENERATE_ROUTE,
)

#: How OpenAPI shows the body's `vtprune` field, which is typed Any so that our own sentences judge it.
VTPRUNE_SCHEMA: dict[str, Any] = body_schema()
#: How OpenAPI shows the headers; their values are read from the raw pairs, where a repeated or unknown header
#: can be seen.
HEADER_PARAMETERS: dict[str, Any] = {"parameters": header_parameters()}


async def prune_headers(raw_request: Request) -> None:
    """Read the headers into the request's context.

    Raises:
        VLLMValidationError: a header is unknown, repeated or out of range; vLLM answers 400.
    """
    try:
        headers = Controls.from_headers(raw_request.headers.raw)
    except SettingsError as error:
        raise refusal(error) from error
    current_request.set(RequestContext(headers=headers))


def attach_prompt_routes(app: FastAPI) -> None:
    """Add our version of each prompt route that vLLM has attached."""
    for route in list(app.routes):
        if isinstance(route, APIRoute) and route.path in PROMPT_ROUTES and "POST" in (route.methods or ()):
            app.add_api_route(
                route.path,
                _wrapped(route.endpoint),
                methods=["POST"],
                dependencies=[*route.dependencies, Depends(prune_headers)],
                responses=route.responses,
                # 0.33 describes the answers there, 0.32 in `responses`
                openapi_extra={**(route.openapi_extra or {}), **HEADER_PARAMETERS},
                response_model=None,
                summary=route.summary,
                name=route.name,
            )


def _wrapped(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    signature = inspect.signature(handler)
    hints = typing.get_type_hints(handler)

    @functools.wraps(handler)
    async def endpoint(*args: Any, **kwargs: Any) -> Any:
        context = current_request.get()
        if context is None:  # the dependency sets it; without it the handler is vLLM's, unchanged
            return await handler(*args, **kwargs)
        raw_request = kwargs.get("raw_request")
        if "request" in kwargs:
            context.body = getattr(kwargs["request"], KWARG, None)
        elif raw_request is not None:
            await _read_untyped(context, raw_request)
        record = LoggedRequest(context, raw_request)
        try:
            if raw_request is not None and raw_request.url.path.endswith(GENERATE_ROUTE):
                policy = raw_request.app.state.online_renderer.vtprune_context.policy
                check_generate(kwargs["request"], context, policy)
            response = await handler(*args, **kwargs)
        except BaseException as error:
            record.failed(error)
            if (answered := disclosable(error)) is error:
                raise
            raise answered from error
        level = context.settings.level if context.settings is not None else None
        return annotate(response, context.counts, record, level)

    parameters = [
        parameter.replace(annotation=_with_field(hints[name]) if name == "request" else hints[name])
        for name, parameter in signature.parameters.items()
    ]
    endpoint.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return endpoint


async def _read_untyped(context: RequestContext, raw_request: Request) -> None:
    """Read what `/invocations` hides: SageMaker's adapter injection overwrites the body's `model`."""
    try:
        body = await raw_request.json()
    except (UnicodeDecodeError, RecursionError) as error:
        raise VLLMValidationError("The request body is not JSON that this server reads.") from error
    except ValueError:
        return  # vLLM's own 400 says where the JSON breaks
    if isinstance(body, dict):
        context.body, model = body.get(KWARG), body.get("model")
        context.model = model if isinstance(model, str) else None


@functools.cache
def _with_field(model: Any) -> Any:
    """The request model with a `vtprune` field; a union of models is mapped over."""
    if typing.get_origin(model) in (typing.Union, types.UnionType):
        return typing.Union[tuple(_with_field(member) for member in typing.get_args(model))]  # noqa: UP007
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return model
    fields: dict[str, Any] = {KWARG: (Any, Field(None, json_schema_extra=VTPRUNE_SCHEMA))}
    return create_model(model.__name__, __base__=model, __module__=model.__module__, **fields)
