#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Finds a Python that vLLM runs on and hands over to setup_env.py, which makes .venv.
# VTPRUNE_PYTHON=/path/to/python skips the search.
set -eu
cd "$(dirname "$0")/.."

runs() { "$@" >/dev/null 2>&1 </dev/null; }
supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))'
lacking=

for python in ${VTPRUNE_PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python}; do
    # A name on PATH proves nothing (version managers put stubs there), so each candidate is really run.
    runs "$python" -c "$supported" || continue
    if runs "$python" -c 'import ensurepip, venv'; then
        exec "$python" tools/setup_env.py "$@"
    fi
    lacking="${lacking:-$python}"
done

if [ -n "$lacking" ]; then
    echo "set-up: $lacking lacks the modules venv and ensurepip (pip's installer). Install them (on Debian and" \
        "Ubuntu: apt-get install python3-venv), or name another Python with VTPRUNE_PYTHON=/path/to/python." >&2
elif [ -n "${VTPRUNE_PYTHON:-}" ]; then
    echo "set-up: VTPRUNE_PYTHON=$VTPRUNE_PYTHON is not a Python between 3.11 and 3.14, which vLLM 0.32 needs." >&2
else
    echo "set-up: found no Python between 3.11 and 3.14, which vLLM 0.32 needs. Install one (on Debian and Ubuntu:" \
        "apt-get install python3 python3-venv), or name it with VTPRUNE_PYTHON=/path/to/python." >&2
fi
exit 1
