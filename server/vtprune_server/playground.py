# SPDX-License-Identifier: Apache-2.0
"""The playground: a page at `/playground` that shows what pruning does to one picture and one question.

Plain files without a build step, which talk to this server's own routes (`/v1/chat/completions`,
`/vtprune/explain`, `/vtprune/config`) as any other client would.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import RedirectResponse, Response

_FOLDER = Path(__file__).parent / "static" / "playground"
_PAGE = "index.html"
_MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
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


@dataclass(frozen=True)
class _Asset:
    content: bytes
    media_type: str
    etag: str

    @staticmethod
    def read(path: Path) -> _Asset:
        content = path.read_bytes()
        return _Asset(content, _MEDIA_TYPES[path.suffix], f'"{sha256(content).hexdigest()[:32]}"')

    def response(self, request: Request) -> Response:
        headers = {**_HEADERS, "ETag": self.etag}
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def attach_playground(app: FastAPI) -> None:
    """Serve the page at `/playground` and its files below `/playground/`, outside the OpenAPI schema.

    The files are read once. A request's name is only ever looked up among theirs and never becomes a path,
    so none can reach another file.
    """
    assets = {path.name: _Asset.read(path) for path in _FOLDER.iterdir() if path.suffix in _MEDIA_TYPES}
    router = APIRouter(include_in_schema=False)

    @router.get("/playground")
    async def page(request: Request) -> Response:
        return assets[_PAGE].response(request)

    @router.get("/playground/{name:path}")
    async def asset(name: str, request: Request) -> Response:
        if not name:  # the page's own URLs are relative to the address without the slash
            return RedirectResponse("../playground", headers=_HEADERS)
        if name not in assets:
            raise HTTPException(status_code=404)
        return assets[name].response(request)

    app.include_router(router)
