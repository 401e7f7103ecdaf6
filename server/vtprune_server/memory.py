# SPDX-License-Identifier: Apache-2.0
"""`vtprune memory MODEL`: what a model and its vision towers take of GPUs of some sizes, without any GPU.

MODEL is a folder, a config.json or a hub id; weights are not looked at. The towers' part is what
`vtprune serve` sets aside from the KV cache at start (`vllm_vtprune.vision.memory`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from vllm_vtprune.errors import OperatorError
from vllm_vtprune.families.registry import family_of
from vllm_vtprune.policy import PrunePolicy
from vllm_vtprune.vision.memory import GIB, TowerMemory, TowerShape, tower_memory

_HEAD = ("GPU", "budget", "API processes", "towers", "language model", "left for the engine")


def main(rest: list[str]) -> int:
    """Run the command.

    Returns:
        0, or 2 with one sentence on standard error.
    """
    args = _parser().parse_args(rest)
    try:
        print(report(args))
    except (OperatorError, OSError, ValueError) as error:
        print(f"vtprune: {error}", file=sys.stderr)
        return 2
    return 0


def report(args: argparse.Namespace) -> str:
    """The lines that the command prints."""
    folder = Path(args.model)
    folder = folder.parent if folder.name == "config.json" else folder
    config = _configuration(str(folder), args.trust_remote_code)
    shape = TowerShape.of(family_of(config), args.max_pixels, videos=True)
    width = getattr(torch, args.dtype).itemsize
    language = _language_parameters(config, shape.parameters) * width
    rows: list[tuple[str, ...]] = []
    sums: list[TowerMemory] = []
    for count in args.api_server_count:
        towers = tower_memory(
            shape,
            processes=1 if args.shared else count,
            threads=1 if args.shared else 2,
            batch=args.encoder_batch,
            bytes_per_value=width,
            graphs=not args.no_graphs,
            cache_bytes=int(args.device_cache_gb * GIB),
        )
        sums.append(towers)
        rows += [
            _row(card, args.gpu_memory_utilization, count, towers, language) for card in args.gpu_memory_gb
        ]
    rows.sort(key=lambda row: float(row[0].split()[0]))
    lines = [f"towers of one GPU, in GiB: {one}" for one in dict.fromkeys(map(str, sums))]
    return "\n".join([*lines, "", *_table([_HEAD, *rows])])


def _row(card: float, utilization: float, count: int, towers: TowerMemory, language: int) -> tuple[str, ...]:
    budget = card * utilization
    left = budget - (towers.total + language) / GIB
    sizes = [f"{budget:.1f}", str(count), f"{towers.total / GIB:.1f}", f"{language / GIB:.1f}"]
    return (f"{card:g} GiB", *sizes, f"{left:.1f}" if left > 0 else f"{left:.1f}: does not fit")


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.rjust(w) for text, w in zip(row, widths, strict=True)) for row in rows]


def _configuration(model: str, trust_remote_code: bool) -> Any:
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise OperatorError(
            f"{model} brings code of its own for its configuration: read it, then pass --trust-remote-code."
        ) from error
    if hasattr(config, "llm_config"):  # as vLLM has it
        config.text_config = config.llm_config
        config.text_config.tie_word_embeddings = config.tie_word_embeddings
    return config


def _language_parameters(config: Any, tower: int) -> int:
    """Of the whole model less the tower's, built without memory.

    Where transformers has no such model (its code comes with the checkpoint): of its language model.
    """
    with torch.device("meta"):
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            model: torch.nn.Module = AutoModelForImageTextToText.from_config(config)
        else:
            model, tower = AutoModelForCausalLM.from_config(config.get_text_config()), 0
    return sum(parameter.numel() for parameter in model.parameters()) - tower


def _parser() -> argparse.ArgumentParser:
    policy = PrunePolicy()
    parser = argparse.ArgumentParser(
        prog="vtprune memory",
        description="What a model and its vision towers take of GPUs of some sizes, in GiB. What is left "
        "holds the KV cache and the engine's own activations, which vLLM measures at start.",
    )
    parser.add_argument("model", help="a folder, a config.json, or a Hugging Face id")
    parser.add_argument("--gpu-memory-gb", type=_numbers, default=[24.0, 48.0, 80.0], metavar="GIB,...")
    parser.add_argument("--api-server-count", type=_counts, default=[1, 2], metavar="N,...")
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.92, help="as vLLM's (default: 0.92)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--encoder-batch", type=int, default=policy.encoder_batch, help="as --vtprune-encoder-batch"
    )
    parser.add_argument(
        "--no-graphs", action="store_true", help="without captured passes, as --vtprune-encoder-graphs false"
    )
    parser.add_argument(
        "--max-pixels", type=int, help="of the largest picture after preprocessing, where any size goes"
    )
    parser.add_argument(
        "--device-cache-gb", type=float, default=0.0, help="the feature cache, if it is kept on the device"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of a configuration that brings its own"
    )
    parser.add_argument("--shared", action="store_true", help="one tower process for all API processes")
    return parser


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
