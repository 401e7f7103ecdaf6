# SPDX-License-Identifier: Apache-2.0
"""Which vLLM this plugin fits, checked before anything of it is touched."""

from __future__ import annotations

import os

from vllm_vtprune.errors import UnsupportedError

#: The hooks were read and run against this release; another one may move them.
SUPPORTED_VLLM = "0.32"


def check_vllm_version(version: str = "") -> None:
    """Refuse a vLLM release other than the supported one.

    Args:
        version: the version to check; empty asks the installed vLLM.

    Raises:
        UnsupportedError: vLLM is missing or another release.
    """
    if not version:
        try:
            from vllm.version import __version__ as installed
        except ImportError as error:
            raise UnsupportedError(
                f"vtprune needs vLLM {SUPPORTED_VLLM}, which is not installed: "
                "pip install 'vtprune[cuda]' on a GPU machine, 'vtprune[cpu]' without one."
            ) from error
        version = installed
    if version.split("+")[0].split(".")[:2] != SUPPORTED_VLLM.split("."):
        raise UnsupportedError(
            f"vtprune supports vLLM {SUPPORTED_VLLM}.x and found {version}: install vLLM {SUPPORTED_VLLM}.x, "
            "or a vtprune release made for the one you have, or set VLLM_PLUGINS='' to run without vtprune."
        )


def check_front_end() -> None:
    """Refuse vLLM's Rust front end, which bypasses the Python processor and routes.

    Raises:
        UnsupportedError: `VLLM_USE_RUST_FRONTEND` is set.
    """
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0").strip().lower() not in ("", "0", "false"):
        raise UnsupportedError(
            "vtprune prunes in vLLM's Python front end, which VLLM_USE_RUST_FRONTEND=1 bypasses: unset it."
        )


def check_cpu_kernels() -> None:
    """Refuse a CPU build of vLLM whose compiled kernels do not load.

    `vllm.platforms.cpu.CpuPlatform.import_kernels` logs a warning about that and goes on; the worker dies of
    it a minute later. Slim Debian images lack a library that they are linked to.

    Raises:
        UnsupportedError: they are not there after vLLM tried.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch

    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "init_cpu_memory_env"):
        raise UnsupportedError(
            "vLLM's compiled CPU kernels (vllm._C) cannot be loaded, as a rule because libnuma.so.1 is not "
            "there: apt-get install libnuma1 on Debian and Ubuntu, numactl-libs on Fedora and its kin."
        )
