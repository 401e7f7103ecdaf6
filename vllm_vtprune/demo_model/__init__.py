# SPDX-License-Identifier: Apache-2.0
"""The embedded demo model: where it lies and how it is served and asked."""

from pathlib import Path

FOLDER = Path(__file__).parent
#: Of its five layers the first two rate tokens badly (docs/evaluation/results.md).
PRUNE_LAYER = 3
#: A picture it knows, and what it is asked about that.
EXAMPLE = FOLDER / "example.png"
QUESTION = "What color is the circle?"
