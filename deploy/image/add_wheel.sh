#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Add vtprune's wheel to the Python that vLLM's image runs, which uv has installed packages into.
set -eu
if command -v uv >/dev/null; then
    uv pip install --system --no-deps /wheel/*.whl
else
    python3 -m pip install --no-deps /wheel/*.whl
fi
vtprune version
