# SPDX-License-Identifier: Apache-2.0
"""The level of our loggers in a server, which is not to be the root logger's."""

from __future__ import annotations

import logging

_OURS = ("vllm_vtprune", "vtprune_server")


def keep_warnings() -> None:
    """Have our warnings said where the root logger's level would lose them.

    vLLM's server imports `model_hosting_container_standards`, which sets the root logger to ERROR. Around
    it, `vllm.entrypoints.serve.sagemaker.api_router` keeps the levels of handlers and not the logger's, from
    which ours take theirs. A level that the operator gave ours stays.
    """
    for name in _OURS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET and logger.getEffectiveLevel() > logging.WARNING:
            logger.setLevel(logging.WARNING)
