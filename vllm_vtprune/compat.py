# SPDX-License-Identifier: Apache-2.0
"""Which vLLM this plugin fits, checked before anything of it is touched."""

from __future__ import annotations

import os

#: The hooks were read and run against this release; another one may move them.
SUPPORTED_VLLM = "0.32"


class UnsupportedError(RuntimeError):
    """The installation cannot run the plugin; the message says what to change."""


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

    broken = broken_hooks(SUPPORTED_VLLM)
    if broken:
        first = broken[0]
        raise UnsupportedError(
            f"vtprune does not fit this build of vLLM {installed}: {first.symbol}, on which "
            f"{first.uses[0].where} relies, is {first.what if first.what == 'gone' else 'changed'} "
            f"({first.detail}), and {len(broken) - 1} more. Install an unpatched vLLM {SUPPORTED_VLLM}.x; "
            "python -m vllm_vtprune.hooks lists all."
        )
    os.environ[_CHECKED] = installed
