# SPDX-License-Identifier: Apache-2.0
"""Prints a request to try once the server with the embedded model answers."""

from __future__ import annotations

import os
import shlex
import sys
import threading
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import httpx

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Endpoint:
    """Where and how this machine reaches its own server.

    Attributes:
        url: of the server, without a path.
        key: whether it asks for a key.
        uds: the Unix socket it listens on, if any.
    """

    url: str
    key: bool = False
    uds: str | None = None

    @staticmethod
    def of(args: Namespace) -> Endpoint:
        """Read it off vLLM's arguments."""
        # vLLM takes the key from the same two places (`init_entrypoints_middleware`)
        key = any(args.api_key or [os.environ.get("VLLM_API_KEY")])
        if args.uds:
            return Endpoint("http://localhost", key, args.uds)
        host = "localhost" if args.host in (None, "", "0.0.0.0", "::") else args.host
        host = f"[{host}]" if ":" in host else host
        return Endpoint(f"{'https' if args.ssl_certfile else 'http'}://{host}:{args.port}", key)

    @property
    def curl_options(self) -> str:
        """What curl needs besides the URL. The key itself is never printed: a log is no place for it."""
        options = ["-s"]
        if self.uds:
            options += ["--unix-socket", shlex.quote(self.uds)]
        if self.url.startswith("https:"):
            options.append("-k")  # the certificate names another host than this one
        if self.key:
            options.append('-H "Authorization: Bearer $VLLM_API_KEY"')
        return " ".join(options)

    def healthy(self) -> bool:
        """Whether `/health` answers 200."""
        transport = httpx.HTTPTransport(verify=False, uds=self.uds)
        try:
            with httpx.Client(transport=transport, timeout=5) as client:
                return client.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False


def announce_when_ready(args: Namespace, picture: Path, question: str) -> None:
    """Wait in the background until the server is healthy, then print a curl line for the shell.

    Args:
        args: vLLM's, of the server.
        picture: a PNG file to send.
        question: what to ask about it.
    """
    endpoint, model = Endpoint.of(args), args.served_model_name[0]
    threading.Thread(
        target=_announce, args=(endpoint, model, picture, question), name="vtprune-hint", daemon=True
    ).start()


def curl_line(endpoint: Endpoint, model: str, picture: Path, question: str) -> str:
    """The request as a command for a POSIX shell; the shell encodes the picture."""
    encoded = f"$(base64 < {shlex.quote(str(picture))} | tr -d '\\n')"
    return f"""\
curl {endpoint.curl_options} {endpoint.url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -H 'X-VTPrune-Preset: balanced' -d @- <<EOF
{{"model": "{model}", "max_tokens": 8, "temperature": 0, "messages": [{{"role": "user", "content": [
  {{"type": "image_url", "image_url": {{"url": "data:image/png;base64,{encoded}"}}}},
  {{"type": "text", "text": "{question}"}}]}}]}}
EOF"""


def _announce(endpoint: Endpoint, model: str, picture: Path, question: str) -> None:
    while not endpoint.healthy():
        time.sleep(_POLL_SECONDS)
    line = curl_line(endpoint, model, picture, question)
    key = ", with the server's key in VLLM_API_KEY" if endpoint.key else ""
    at = endpoint.uds or endpoint.url
    print(f"\nvtprune is ready at {at}. Try it{key}:\n\n{line}\n", file=sys.stderr, flush=True)
