# SPDX-License-Identifier: Apache-2.0
"""Around every route.

The innermost first: errors, body limit, drain, the API key; then vLLM's own; then Anthropic's errors, the log
of refusals, request ids.
"""
