# SPDX-License-Identifier: Apache-2.0
"""How much of the load the server answered from its caches, and whether that was asked for.

A picture that the server has met before costs it little, in an unpruned prompt least of all: then a test
measures the caches. `--repeat-share` asks for that; a second run with the same seed gets it unasked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vtprune_loadtest.record import RequestRecord

#: Counters of vLLM and of vtprune: (hits, queries), in pictures, pictures, prompt tokens.
_PICTURES = ("vllm:mm_cache_hits_total", "vllm:mm_cache_queries_total")
_TOWER = ("vtprune_tower_cache_hits_total", "vtprune_tower_cache_misses_total")
_PREFIX = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")
_SLACK_PICTURES = 0.01
#: Prompts may share a chat template's first tokens.
_SLACK_PREFIX = 0.05


def cache_use(counters: Mapping[str, float], records: Sequence[RequestRecord]) -> dict[str, Any] | None:
    """Cache hits of a stretch of load beside the pictures sent again on purpose; None without such counters.

    Args:
        counters: how much the server's counters grew meanwhile.
        records: every request sent meanwhile, ramps included.
    """
    hits, queries = (_sum(counters, name) for name in _PICTURES)
    tower_hits, tower_misses = (_sum(counters, name) for name in _TOWER)
    prefix_hits, prefix_queries = (_sum(counters, name) for name in _PREFIX)
    if not (queries or tower_hits or tower_misses or prefix_queries):
        return None
    sent = sum(record.images for record in records)
    repeated = sum(record.repeated_images for record in records)
    asked_share = repeated / sent if sent else 0.0
    too_many = max(hits, tower_hits) > repeated + _SLACK_PICTURES * sent
    too_long = prefix_hits > (asked_share + _SLACK_PREFIX) * prefix_queries
    return {
        "pictures_sent": sent,
        "pictures_repeated": repeated,
        "picture_cache_hits": round(hits),
        "tower_cache_hits": round(tower_hits),
        "prefix_cache_hit_tokens": round(prefix_hits),
        "prefix_cache_queried_tokens": round(prefix_queries),
        "beyond_what_was_asked": too_many or too_long,
    }


def cache_note(use: Mapping[str, Any]) -> str:
    """The sentence about hits that nobody asked for."""
    return (
        f"The server's caches answered more than was asked for, so these throughputs are not those of new "
        f"pictures: of {use['pictures_sent']} pictures, {use['pictures_repeated']} of them sent again on "
        f"purpose, it had {max(use['picture_cache_hits'], use['tower_cache_hits'])} already, and of "
        f"{use['prefix_cache_queried_tokens']} prompt tokens {use['prefix_cache_hit_tokens']} were in its "
        "prefix cache. Leave out --seed, send other pictures (--images, --questions), make prompts differ "
        "(--prompt-words), or start the server anew."
    )


def _sum(counters: Mapping[str, float], name: str) -> float:
    """A counter over all of its labels."""
    return sum(value for key, value in counters.items() if key.partition("{")[0] == name)
