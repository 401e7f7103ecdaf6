#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# On a GPU machine without network: stage 2 beside the reference, then vLLM and vtprune side by side on
# LLaVA-1.5-7B's architecture with dummy weights.
#
#     bash run.sh PARTS RESULTS      # PARTS as written by pack.py; RESULTS is a folder for the JSON files
#
# Two servers at a time share the GPU. SECONDS_PER_POINT (default 60) bounds each of the five concurrencies.
set -euo pipefail
if [ $# -ne 2 ]; then
  echo "usage: bash run.sh PARTS RESULTS" >&2
  exit 2
fi
parts=$(realpath "$1")
mkdir -p "$2"
results=$(realpath "$2")
export VTPRUNE_SITE=${VTPRUNE_SITE:-$HOME/vllm-site}
for part in a b c; do
  bash "$parts/$part/install.sh"
done
export PYTHONPATH=$VTPRUNE_SITE
# left out of the parts
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_USE_DEEP_GEMM=0

cd "$results"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 -m tests.cuda_tower 2>&1 | tee "$results/tower.txt" || true # what differs stands there
python3 -m tests.cuda --out "$results/stage2" 2>&1 | tee "$results/stage2.txt"
compare() {
  python3 -m benchmarks.compare --model llava-1.5-7b --concurrency 1,4,16,32,128 \
    --seconds "${SECONDS_PER_POINT:-60}" --logs "$results/logs" --arms "$1" --json "$results/$2.json"
  python3 -m benchmarks.roofline "$results/$2.json" --json "$results/$2-roofline.json"
}
compare vllm,off,keep0.22 stage1
compare vllm,kv1,keep0.22+kv1,keep0.22+kv0.5 stage2
