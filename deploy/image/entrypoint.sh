#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# `vtprune` with secrets out of files: VLLM_API_KEY_FILE names the file of VLLM_API_KEY, and so on. A file that
# holds nothing is refused: the server would ask nobody for a key.
set -eu
for name in VLLM_API_KEY OPENAI_API_KEY; do
    eval "file=\${${name}_FILE:-}"
    [ -n "$file" ] || continue
    if ! value=$(cat -- "$file") || [ -z "$value" ]; then
        echo "vtprune: ${name}_FILE names $file, which cannot be read or is empty." >&2
        exit 2
    fi
    export "$name=$value"
    unset "${name}_FILE"
done
exec vtprune "$@"
