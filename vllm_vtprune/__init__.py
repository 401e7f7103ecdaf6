# SPDX-License-Identifier: Apache-2.0
"""vtprune: per-request vision-token pruning for vLLM.

`register` is the entry point of vLLM's `vllm.general_plugins` group; vLLM calls it in every process.
`engine_kwargs` and `request_kwargs` are all that offline use needs.
"""

from vllm_vtprune.offline import engine_kwargs, request_kwargs
from vllm_vtprune.version import __version__

__all__ = ["__version__", "engine_kwargs", "register", "request_kwargs"]


def register() -> None:
    """Register the plugin with vLLM. Idempotent; imports vLLM only when called.

    Raises:
        vllm_vtprune.compat.UnsupportedError: the vLLM version or front end is one the plugin does not fit.
    """
    from vllm_vtprune.plugin import register_with_vllm

    register_with_vllm()
