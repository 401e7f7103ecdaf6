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
