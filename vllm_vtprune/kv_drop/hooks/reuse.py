# SPDX-License-Identifier: Apache-2.0
"""Later turns go on from what the first one kept: pruned prompts in vLLM's prefix cache, by their own names.

A pruned prompt's blocks hold what one passage of its first turn through the prune layers kept, so their names
are made of that passage and of vLLM's own hashes of the tokens up to each block's end. Whole blocks were
dropped (`plan.KVDropConfig.reuse_block`), so that behind the first turn a block's edge in one band is one in
all: band b's block i ends where vLLM's hash i + dropped / block ends. A later turn knows how long its first
turn was (`settings.KVSettings.first_turn`), so it can be computed from its first token with the same outcome,
and the cache decides how much of that is work and nothing else.

Each passage has its own names, although equal prompts keep equal tokens: rounding may tip a tie between two
ratings, and blocks of two passages must not be mixed.

Relies on `vllm.v1.core.kv_cache_utils.generate_block_hash_extra_keys`, `vllm.v1.request.Request.block_hashes`
and `vllm.v1.core.block_pool.BlockPool.get_cached_block` of vLLM 0.32.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import BlockHash, generate_block_hash_extra_keys

from vllm_vtprune.kv_drop.plan import PromptPlan

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.request import Request


@dataclass
class NamedBlocks:
    """A request to `FullAttentionManager.cache_blocks`, which reads no more of one than this.

    Attributes:
        request_id: the request's.
        block_hashes: the names of a band's blocks, from the first on.
        shared_prefix_boundary: for groups that publish some of their blocks only, which ours are not.
    """

    request_id: str
    block_hashes: Sequence[BlockHash]
    shared_prefix_boundary: int = 0


@dataclass
class _Passage:
    """One request's part in a passage of its first turn through the prune layers.

    Attributes:
        prompt: the first turn's, with its settings.
        settled: the first position from which on every token stays: no later turn goes on before it.
        number: of the passage; None before the request was first looked up.
        open: whether others are to be sent to this passage once something of it is published.
        names: of the blocks that end with each of vLLM's hashes so far.
    """

    prompt: bytes
    settled: int
    number: int | None = None
    open: bool = False
    names: list[BlockHash] = field(default_factory=list)

    def take(self, number: int, *, is_open: bool) -> None:
        """Belong to a passage from now on."""
        if number != self.number:
            self.names = []
        self.number, self.open = number, is_open

    def extend(self, hashes: Sequence[BlockHash]) -> list[BlockHash]:
        """The names that go with vLLM's hashes of the request's tokens so far."""
        salt = self.prompt + str(self.number).encode()
        self.names += [_digest(salt, block) for block in hashes[len(self.names) :]]
        return self.names


class Passages:
    """The passages that the prefix cache may hold blocks of, and the requests that take part in them."""

    def __init__(self, block_size: int, most: int) -> None:
        """Begin with none.

        Args:
            block_size: tokens of a block, of every KV-cache group and of vLLM's hashes.
            most: passages to remember: no more than there are blocks can have any.
        """
        self._block_size, self._most = block_size, most
        self._numbers: OrderedDict[bytes, int] = OrderedDict()
        self._requests: dict[str, _Passage] = {}
        self._begun = 0

    def add(self, request: Request, plan: PromptPlan, settled: int, settings: str) -> None:
        """Have a request go on from its first turn's passage, or begin one.

        Args:
            request: the request, not yet looked up.
            plan: its plan.
            settled: see `plan.settled_from`.
            settings: all that decides which of the first turn's tokens stay.
        """
        whole = plan.tokens // self._block_size
        rest = whole * self._block_size
        keys, _ = generate_block_hash_extra_keys(request, rest, plan.tokens, 0)
        end = (list(request.all_token_ids[rest : plan.tokens]), keys, plan.tokens, settings)
        before = request.block_hashes[whole - 1] if whole else b""
        self._requests[request.request_id] = _Passage(_digest(before, repr(end).encode()), settled)

    def remove(self, request_id: str) -> None:
        """Forget a request that ended; what it published stays."""
        self._requests.pop(request_id, None)

    def __contains__(self, request_id: str) -> bool:
        """Whether the request takes part in a passage."""
        return request_id in self._requests

    def find(
        self,
        request: Request,
        managers: Sequence[SingleTypeKVCacheManager],
        dropped: Sequence[int],
        *,
        may_read: bool = True,
    ) -> tuple[list[list[KVCacheBlock]], int]:
        """What the cache holds of the passage of the request's first turn.

        Args:
            request: a request that holds no blocks.
            managers: of every KV-cache group.
            dropped: tokens that left below each group's layers.
            may_read: whether the request lets vLLM read its prefix cache.

        Returns:
            The blocks of each group, and how many of the request's tokens need not be computed: none, or
            all up to an edge of a block behind which every token stays.
        """
        passage = self._requests[request.request_id]
        # the last token is computed in any case, for its logits
        most = (request.num_tokens - 1) // self._block_size * self._block_size
        number = self._numbers.get(passage.prompt)
        if number is not None and may_read:
            passage.take(number, is_open=False)
            names = passage.extend(request.block_hashes)
            found = [
                _run(manager, names[lost // self._block_size : most // self._block_size])
                for manager, lost in zip(managers, dropped, strict=True)
            ]
            runs = zip(found, dropped, strict=True)
            end = min(most, *(len(blocks) * self._block_size + lost for blocks, lost in runs))
            if end >= passage.settled:
                self._numbers.move_to_end(passage.prompt)
                kept = [(end - lost) // self._block_size for lost in dropped]
                return [blocks[:count] for blocks, count in zip(found, kept, strict=True)], end
            # what lies there may still serve a longer turn: where none of it is missing, leave it to them
            self._begin(passage, is_open=end < most)
        else:
            self._begin(passage, is_open=True)
        return [[] for _ in managers], 0

    def _begin(self, passage: _Passage, *, is_open: bool) -> None:
        self._begun += 1
        passage.take(self._begun, is_open=is_open)

    def names(self, request: Request, lost: int) -> NamedBlocks:
        """The names under which a band's blocks are published; others find them from now on.

        Args:
            request: a request that was looked up, and that blocks were given to.
            lost: tokens that left below the band.
        """
        passage = self._requests[request.request_id]
        assert passage.number is not None
        if passage.open:
            self._numbers[passage.prompt] = passage.number
            self._numbers.move_to_end(passage.prompt)
            passage.open = False
            while len(self._numbers) > self._most:
                self._numbers.popitem(last=False)
        names = passage.extend(request.block_hashes)
        return NamedBlocks(request.request_id, names[lost // self._block_size :])

    def close(self, request_id: str) -> list[str]:
        """Forget the passage of a request that the worker could not serve.

        Returns:
            The requests that took part in it, which may have read what was never written.
        """
        failed = self._requests.get(request_id)
        if failed is None or failed.number is None:
            return [request_id]
        if self._numbers.get(failed.prompt) == failed.number:
            del self._numbers[failed.prompt]
        mates = [name for name, one in self._requests.items() if one.number == failed.number]
        for name in mates:
            self._requests[name].open = False
        return mates


def _run(manager: SingleTypeKVCacheManager, names: Sequence[BlockHash]) -> list[KVCacheBlock]:
    """The blocks of a group under these names, up to the first that is not there."""
    blocks: list[KVCacheBlock] = []
    for name in names:
        found = manager.block_pool.get_cached_block(name, [manager.kv_cache_group_id])
        if not found:
            break
        blocks += found
    return blocks


def _digest(*parts: bytes) -> BlockHash:
    return BlockHash(hashlib.sha256(b"\0".join(parts)).digest())
