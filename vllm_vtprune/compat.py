# SPDX-License-Identifier: Apache-2.0
"""Which vLLM this plugin fits, checked before anything of it is touched."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from vllm_vtprune.errors import UnsupportedError

#: The hooks were read and run against these releases; another one may move them. 0.33 was run as its Python
#: sources over the CPU build of 0.32, since it has no CPU build of its own yet; on CUDA it was not run.
SUPPORTED_VLLM = ("0.32", "0.33")
_NAMED = " and ".join(SUPPORTED_VLLM)


def check_vllm_version(version: str = "") -> None:
    """Refuse a vLLM release other than the supported ones.

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
                f"vtprune needs vLLM {SUPPORTED_VLLM[0]}, which is not installed: "
                "pip install 'vtprune[cuda]' on a GPU machine, 'vtprune[cpu]' without one."
            ) from error
        version = installed
    if release_of(version) not in SUPPORTED_VLLM:
        raise UnsupportedError(
            f"vtprune supports vLLM {_NAMED} and found {version}: install vLLM {SUPPORTED_VLLM[0]}.x, or a "
            "vtprune release made for the one you have, or set VLLM_PLUGINS='' to run without vtprune."
        )


def release_of(version: str) -> str:
    """The release of a version: "0.32" of "0.32.1+cpu"."""
    return ".".join(version.split("+")[0].split(".")[:2])


def check_front_end() -> None:
    """Refuse vLLM's Rust front end, which bypasses the Python processor and routes.

    Raises:
        UnsupportedError: `VLLM_USE_RUST_FRONTEND` is set.
    """
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0").strip().lower() not in ("", "0", "false"):
        raise UnsupportedError(
            "vtprune prunes in vLLM's Python front end, which VLLM_USE_RUST_FRONTEND=1 bypasses: unset it."
        )


#: Set once the hooks were checked, for the processes that this one starts.
_CHECKED = "VTPRUNE_HOOKS_CHECKED"


def check_hooks() -> None:
    """Refuse a vLLM in which a method that the plugin overrides or replaces is not as it was read.

    The version alone does not tell: builds are patched, and nightlies carry the last release's number.

    Raises:
        UnsupportedError: naming the first such hook and how many there are.
    """
    from vllm.version import __version__ as installed

    if os.environ.get(_CHECKED) == installed:
        return
    from vllm_vtprune.hooks.record import broken_hooks

    broken = broken_hooks(release_of(installed))
    if broken:
        first = broken[0]
        raise UnsupportedError(
            f"vtprune does not fit this build of vLLM {installed}: {first.symbol}, on which "
            f"{first.uses[0].where} relies, is {first.what if first.what == 'gone' else 'changed'} "
            f"({first.detail}), and {len(broken) - 1} more. Install an unpatched vLLM {_NAMED}; "
            "python -m vllm_vtprune.hooks lists all."
        )
    os.environ[_CHECKED] = installed


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


def serve_parser() -> tuple[Any, Any]:
    """Give `make_arg_parser` and `cli_env_setup` of vLLM, wherever this release keeps them."""
    try:
        cli = import_module("vllm.entrypoints.common.cli_args")
        return cli.make_arg_parser, import_module("vllm.entrypoints.common.startup").cli_env_setup
    except ModuleNotFoundError:  # 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

        return make_arg_parser, cli_env_setup
