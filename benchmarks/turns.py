# SPDX-License-Identifier: Apache-2.0
"""What a conversation's prefills cost turn by turn, counted: no server, no measurement.

    python -m benchmarks.turns                    # LLaVA-1.5-7B, one picture, five turns
    python -m benchmarks.turns --system 1024

A turn that loses nothing in the decoder finds the turns before it in the prefix cache and computes what is
new; one that does computes its whole prompt, and leaves nothing for the next. `benchmarks.conversations`
measures the same on a server. The last arm is a server with `--vtprune-kv-reuse`: later turns go on from what
the first one kept, and whole blocks are dropped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import ceil

from benchmarks.commands import bench_parser
from benchmarks.fleet import LLAVA
from vtprune_eval.flops import CostShape, RequestShape, kv_bytes, request_work
from vtprune_loadtest.columns import columns
from vtprune_loadtest.command import command


class Drops(Enum):
    """The turns at which stage 2 drops tokens of the prompt."""

    EVERY = "every turn"
    FIRST = "first turn"
    #: At the first, and the others go on from what it kept.
    REUSED = "reused"


#: Of the presets and what they are compared with: share of the vision tokens, share of the prompt above the
#: prune layer, and the turns at which tokens are dropped there.
ARMS = {
    "nothing pruned": (1.0, 1.0, Drops.EVERY),
    "stage 1": (0.22, 1.0, Drops.EVERY),
    "both, every turn": (0.22, 0.5, Drops.EVERY),
    "both, first turn": (0.22, 0.5, Drops.FIRST),
    "both, going on": (0.22, 0.5, Drops.REUSED),
}
_WIDTH = 110


@dataclass(frozen=True)
class Turn:
    """One turn's prefill.

    Attributes:
        prompt: tokens of the prompt.
        above: those that layers above the prune layer hold.
        cached: tokens of its beginning that are computed already.
        cached_above: those of them that layers above the prune layer hold.
    """

    prompt: int
    above: int
    cached: int
    cached_above: int

    def flops(self, shape: CostShape, prune_layer: int) -> float:
        """Operations: what is new, each token attending to all that its layer holds."""

        def whole(tokens: int, above: int) -> float:
            bands = ((prune_layer, above),) if above < tokens else ()
            return request_work(shape, RequestShape(0, tokens, 0, 1, bands))["prefill"].flops

        head = 2 * shape.hidden * shape.vocab
        done = whole(self.cached, self.cached_above) - head if self.cached else 0.0
        return whole(self.prompt, self.above) - done

    def kv_bytes(self, shape: CostShape, prune_layer: int) -> float:
        """KV cache that the prompt takes."""
        return kv_bytes(shape, RequestShape(0, self.prompt, 0, 1, ((prune_layer, self.above),)))


def conversation(
    arm: tuple[float, float, Drops],
    *,
    turns: int,
    system: int,
    question: int,
    answer: int,
    visual: int,
    block: int,
) -> list[Turn]:
    """Each turn's prefill.

    Args:
        arm: see `ARMS`.
        turns: of the conversation.
        system: tokens ahead of the picture, in the prefix cache beforehand.
        question: tokens of each question.
        answer: tokens of each answer.
        visual: vision tokens of the picture.
        block: tokens of a KV-cache block: the prefix cache holds whole ones.
    """
    share, keep, when = arm
    found, held, lost = [], system // block * block, 0
    for number in range(turns):
        prompt = system + ceil(share * visual) + (number + 1) * question + number * answer
        drops = keep < 1 and (number == 0 or when is Drops.EVERY)
        if drops:
            lost = prompt - ceil(keep * prompt)
            if when is Drops.REUSED:
                lost = lost // block * block
            found.append(Turn(prompt, prompt - lost, 0, 0))
            held = 0
        else:
            if when is Drops.FIRST:
                lost = 0
            found.append(Turn(prompt, prompt - lost, held, max(0, held - lost)))
        if not drops or when is Drops.REUSED:
            # the answer's tokens were stored as they were generated
            held = (prompt + answer) // block * block
        elif when is Drops.FIRST:
            held = system // block * block
    return found


def main(argv: Sequence[str] | None = None, prog: str = "python -m benchmarks.turns") -> int:
    """Print the table; gives the exit status."""
    return command(prog, lambda: _run(argv, prog))


def _run(argv: Sequence[str] | None, prog: str) -> None:
    parser = bench_parser(prog, "Count a conversation's prefills turn by turn.", models=False)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--system", type=int, default=64, help="tokens of the system prompt")
    parser.add_argument("--question", type=int, default=24, help="tokens of a question")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    options = parser.parse_args(argv)
    rows = []
    for name, arm in ARMS.items():
        turns = conversation(
            arm,
            turns=options.turns,
            system=options.system,
            question=options.question,
            answer=options.answer,
            visual=LLAVA.patches,
            block=16,
        )
        prune_layer = LLAVA.layers // 4
        flops = [turn.flops(LLAVA, prune_layer) for turn in turns]
        mebibytes = f"{turns[-1].kv_bytes(LLAVA, prune_layer) / 2**20:.0f}"
        rows.append([name, *(f"{one / 1e12:.2f}" for one in (*flops, sum(flops))), mebibytes])
    header = ["TFLOP of the prefill", *(f"turn {n + 1}" for n in range(options.turns)), "in all", "KV MiB"]
    print(*columns(header, rows, width=_WIDTH), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
