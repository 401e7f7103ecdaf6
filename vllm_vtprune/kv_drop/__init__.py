# SPDX-License-Identifier: Apache-2.0
"""Stage 2: irrelevant prompt tokens leave the decoder, and the KV cache, at the prune layer.

The data's way: `budget` (how many tokens stay, a pure function) -> `scheduler` and `cache` (blocks) -> `step`
(one step's geometry) -> `relevance` (which tokens stay) -> `attention` (metadata of the layers above).
"""
