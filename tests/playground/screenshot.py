# SPDX-License-Identifier: Apache-2.0
"""Write the README's picture of the playground, given a running server's URL.

``python -m tests.playground.screenshot http://127.0.0.1:8000 docs/playground.png``
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.playground.browser import Page, missing

SAMPLE = 2  # four shapes
QUESTION = "What color is the circle?"
RUNS = "5"


def main(server: str, target: str) -> None:
    """Ask a question about a sample picture with the settings the page begins with, and take the picture."""
    if reason := missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as profile:
        page = Page(Path(profile))
        try:
            page.open(server)
            page.choose_sample(SAMPLE)
            page.select("#runs", RUNS)
            page.ask(QUESTION)
            page.screenshot(Path(target))
        finally:
            page.quit()


if __name__ == "__main__":
    main(*sys.argv[1:])
