# SPDX-License-Identifier: Apache-2.0
"""The OpenAI-compatible front end: vLLM's own server plus per-request pruning headers."""
