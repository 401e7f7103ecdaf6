# SPDX-License-Identifier: Apache-2.0
"""The tower's passes on a GPU: as Python, traced, and captured as CUDA graphs, side by side.

    python -m tests.cuda_tower                  # LLaVA-1.5-7B's tower, random weights
    python -m tests.cuda_tower --layers 3 --width 64 --device cpu --repeats 1

Compares the results of batches of 1 to 20 pictures with the Python pass's, in half precision, and prints what
a pass costs (seconds, and the thread's processor time, in which it holds the interpreter) and what the graphs
hold beside what `vtprune memory` counts for them. On the CPU the graphs are acted out. Exits 1 if results
differ or nothing was captured.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from benchmarks.llava import TowerShape, llava_config
from tests.helpers.recorded_passes import Recorder
from vllm_vtprune.families.base import OPTIONAL_OUTPUTS
from vllm_vtprune.families.fixed_tower import FixedTower
from vllm_vtprune.families.registry import family_of
from vllm_vtprune.vision import memory
from vllm_vtprune.vision.captured import CapturedPass, CudaGraphs, Graphs, agree
from vllm_vtprune.vision.encoder import VisionEncoder
from vllm_vtprune.vision.tower_pass import TowerPass, traced

LARGEST = 16


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    width = options.width
    tower = TowerShape(hidden=width, intermediate=4 * width, layers=options.layers, heads=width // 64)
    with torch.inference_mode():
        return _run(device, dtype, tower, options.repeats)


def _run(device: torch.device, dtype: torch.dtype, tower_shape: TowerShape, repeats: int) -> int:
    from transformers import LlamaConfig

    family: Any = family_of(llava_config(LlamaConfig(hidden_size=4096), tower_shape))
    torch.manual_seed(0)
    tower = VisionEncoder(family, family.build(), device, dtype).modules["tower"]
    wrong = 0
    for outputs in (frozenset[str](), frozenset({"received"}), OPTIONAL_OUTPUTS):
        fixed = FixedTower(family.config)

        def run(pixels: torch.Tensor, fixed: FixedTower = fixed, wanted: frozenset[str] = outputs) -> Any:
            return fixed._pass(tower, wanted, pixels)

        example = torch.randn((1, 3, 336, 336)).to(device, dtype)
        before = _held(device)
        record = CudaGraphs() if device.type == "cuda" else Recorder()
        captured = CapturedPass(run, example, Graphs(LARGEST, record))
        held = _held(device) - before
        passes: dict[str, TowerPass] = {"Python": run, "traced": traced(run, example), "captured": captured}
        print(f"outputs: {', '.join(sorted(outputs)) or 'none'}", flush=True)
        wrong += passes["traced"] is run
        for count in (1, 2, 3, 5, 8, 13, 16, 20):
            pixels = torch.randn((count, 3, 336, 336)).to(device, dtype)
            expected = run(pixels)
            for name, one in passes.items():
                right = agree(one(pixels), expected)
                wrong += not right
                seconds, busy = _time(one, pixels, repeats, device)
                print(
                    f"  {count:3} pictures, {name:9}{'' if right else 'OTHER RESULTS '}"
                    f"{1000 * seconds:8.2f} ms, {1000 * busy:8.2f} ms of the thread",
                    flush=True,
                )
        if not outputs:
            counted = memory.TowerShape.of(family).graph_bytes(LARGEST, dtype.itemsize)
            print(f"  graphs hold {held / 2**20:.0f} MiB, counted are {counted / 2**20:.0f} MiB")
            wrong += held > counted
    return int(wrong > 0)


def _held(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _time(run: TowerPass, pixels: torch.Tensor, repeats: int, device: torch.device) -> tuple[float, float]:
    """Seconds a pass until its results are there, and processor seconds until it is launched."""
    seconds = busy = 0.0
    for _ in range(repeats):
        start, thread = time.perf_counter(), time.thread_time()
        run(pixels)
        busy += time.thread_time() - thread
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds += time.perf_counter() - start
    return seconds / repeats, busy / repeats


if __name__ == "__main__":
    sys.exit(main())
