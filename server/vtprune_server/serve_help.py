# SPDX-License-Identifier: Apache-2.0
"""`vtprune serve --help`: our flags, the most used of vLLM's, and how to see the rest."""

from __future__ import annotations

import argparse

from vtprune_server.options import add_policy_options

#: Flag, metavar and meaning. vLLM has about three hundred, in groups that its own help lists by name alone.
VLLM_FLAGS = (
    ("--host", "HOST", "address to listen on (default: every interface)"),
    ("--port", "PORT", "port to listen on (default: 8000)"),
    ("--api-key", "KEY", "key that clients must send; also VLLM_API_KEY (default: none is asked for)"),
    ("--served-model-name", "NAME", "name that clients call the model by (default: MODEL)"),
    ("--max-model-len", "N", "most tokens of a prompt and its answer (default: the model's)"),
    ("--max-num-seqs", "N", "most requests decoded together (default: by the device)"),
    ("--dtype", "DTYPE", "precision of the language model (default: the checkpoint's)"),
    ("--gpu-memory-utilization", "SHARE", "share of a GPU's memory for the engine (default: 0.92)"),
    ("--tensor-parallel-size", "N", "GPUs that one copy of the model is split over (default: 1)"),
    ("--api-server-count", "N", "API processes, each with a vision tower of its own (default: 1)"),
)


def serve_help() -> str:
    """The text."""
    parser = argparse.ArgumentParser(
        prog="vtprune serve",
        usage="vtprune serve [MODEL] [options]",
        description="vLLM's OpenAI-compatible server with per-request pruning of vision tokens.",
        epilog="Every flag of `vllm serve` works: --help=all lists them, --help=WORD those with WORD in "
        "their name, --help=vtprune ours. Ours are variables and keys of a YAML file, too: see "
        "docs/operating.md.",
        add_help=False,
    )
    parser.add_argument(
        "MODEL", nargs="?", help="folder or Hugging Face id (default: the embedded demo model)"
    )
    add_policy_options(parser)
    group = parser.add_argument_group("vLLM", "The most used of its flags")
    for flag, metavar, meaning in VLLM_FLAGS:
        group.add_argument(flag, metavar=metavar, help=meaning)
    return parser.format_help()
