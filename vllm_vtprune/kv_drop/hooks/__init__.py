# SPDX-License-Identifier: Apache-2.0
"""Stage 2 inside vLLM: each file names the vLLM functions it replaces or overrides."""
