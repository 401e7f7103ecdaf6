# SPDX-License-Identifier: Apache-2.0
"""The one error a user sees."""

from vllm_vtprune.errors import VTPruneError


class LoadTestError(VTPruneError, ValueError):
    """The load test cannot start or go on; the message is a sentence that says what to change."""
