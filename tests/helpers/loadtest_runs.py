# SPDX-License-Identifier: Apache-2.0
"""Runs the load tester against a fake server and reads what it wrote."""

import base64
import json
from pathlib import Path
from typing import Any

from tests.helpers.fake_chat import FakeChat
from vtprune_loadtest.__main__ import main


def run(
    fake: FakeChat, folder: Path, *arguments: str, plots: bool = False
) -> tuple[int, dict[str, Any], list[Any]]:
    """Exit status, result document, and the lines of the JSONL file."""
    small = ["--image-size", "32", "--output-len", "3", "--warmup", "0", "--seed", "0"]
    status = main(
        [
            "--base-url",
            fake.url,
            "--result-dir",
            str(folder),
            *small,
            *([] if plots else ["--no-plots"]),
            *arguments,
        ]
    )
    document = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    return status, document, lines


def presets(fake: FakeChat) -> list[str | None]:
    return [headers.get("x-vtprune-preset") for headers in fake.headers]


def pictures(body: dict[str, Any]) -> list[bytes]:
    parts = body["messages"][0]["content"]
    return [base64.b64decode(p["image_url"]["url"].split(",")[1]) for p in parts if p["type"] == "image_url"]
