# SPDX-License-Identifier: Apache-2.0
"""The playground: a page at `/playground` that shows what pruning does to one picture and one question.

Plain files without a build step, which talk to this server's own routes (`/v1/chat/completions`,
`/vtprune/explain`, `/vtprune/config`) as any other client would.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

_FOLDER = Path(__file__).parent / "static" / "playground"
_HEADERS = {
    # pictures may come from blob: and data: URLs; everything else from this server alone
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # ask again, so that page and scripts are always of one version
}


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


def attach_playground(app: FastAPI) -> None:
    """Serve the page at `/playground` and its files below `/playground/`, outside the OpenAPI schema."""
    files = _Files(directory=_FOLDER)

    @app.get("/playground", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    @app.get("/playground/", include_in_schema=False)
    async def page_with_slash() -> Response:
        # the page's own URLs are relative to the address without the slash
        return RedirectResponse("../playground", headers=_HEADERS)

    app.mount("/playground", files)
