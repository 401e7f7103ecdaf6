# SPDX-License-Identifier: Apache-2.0
"""Prints a request to try once the server with the embedded model answers."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import httpx

_POLL_SECONDS = 0.5


def announce_when_ready(host: str | None, port: int, model: str, picture: Path, question: str) -> None:
    """Wait in the background until `/health` answers, then print a curl line for the shell.

    Args:
        host: what the server listens on; None is every interface.
        port: its port.
        model: the name it serves the model under.
        picture: a PNG file to send.
        question: what to ask about it.
    """
    url = f"http://{'localhost' if host in (None, '', '0.0.0.0', '::') else host}:{port}"
    threading.Thread(
        target=_announce, args=(url, model, picture, question), name="vtprune-hint", daemon=True
    ).start()


def curl_line(url: str, model: str, picture: Path, question: str) -> str:
    """The request as a command for a POSIX shell; the shell encodes the picture."""
    encoded = f"$(base64 < {picture} | tr -d '\\n')"
    return f"""\
curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -H 'X-VTPrune-Preset: balanced' -d @- <<EOF
{{"model": "{model}", "max_tokens": 8, "temperature": 0, "messages": [{{"role": "user", "content": [
  {{"type": "image_url", "image_url": {{"url": "data:image/png;base64,{encoded}"}}}},
  {{"type": "text", "text": "{question}"}}]}}]}}
EOF"""


def _announce(url: str, model: str, picture: Path, question: str) -> None:
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                break
        except httpx.TransportError:
            pass
        time.sleep(_POLL_SECONDS)
    line = curl_line(url, model, picture, question)
    print(f"\nvtprune is ready at {url}. Try it:\n\n{line}\n", file=sys.stderr, flush=True)
