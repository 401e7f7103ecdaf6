# SPDX-License-Identifier: Apache-2.0
"""Stage 1 inside vLLM's multimodal processor: the vision tower, its cache, and the processor."""
