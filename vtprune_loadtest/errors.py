# SPDX-License-Identifier: Apache-2.0
"""The one error a user sees."""


class LoadTestError(ValueError):
    """The load test cannot start or go on; the message is a sentence that says what to change."""
