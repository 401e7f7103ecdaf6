# SPDX-License-Identifier: Apache-2.0
"""What a conversation's prefills cost turn by turn, counted: no server, no measurement.

    python -m benchmarks.turns                    # LLaVA-1.5-7B, one picture, five turns
    python -m benchmarks.turns --system 1024

A turn that loses nothing in the decoder finds the turns before it in the prefix cache and computes what is
new; one that does computes its whole prompt, and leaves nothing for the next. `benchmarks.conversations`
measures the same on a server.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import ceil

from benchmarks.commands import bench_parser
from benchmarks.fleet import LLAVA
from vtprune_eval.flops import CostShape, RequestShape, request_work
from vtprune_loadtest.columns import columns
from vtprune_loadtest.command import command

#: Of the presets and what they are compared with: share of the vision tokens, share of the prompt above the
#: prune layer, and whether the latter holds at the first turn alone.
ARMS = {
    "nothing pruned": (1.0, 1.0, False),
    "stage 1": (0.22, 1.0, False),
    "both, every turn": (0.22, 0.5, False),
    "both, first turn": (0.22, 0.5, True),
}
_WIDTH = 110


def turn_flops(shape: CostShape, prompt: int, cached: int, kept: int, prune_layer: int) -> float:
    """Operations of one turn's prefill.

    Args:
        shape: the model's.
        prompt: tokens of the prompt.
        cached: those of its beginning that the prefix cache holds; none where something is dropped.
        kept: tokens above the prune layer; `prompt` where nothing is dropped.
        prune_layer: K.
    """

    def whole(tokens: int, bands: tuple[tuple[int, float], ...] = ()) -> float:
        return request_work(shape, RequestShape(0, tokens, 0, 1, bands))["prefill"].flops

    if kept < prompt:
        return whole(prompt, ((prune_layer, kept),))
    head = 2 * shape.hidden * shape.vocab
    # what is new, each token attending to all before it
    return whole(prompt) - (whole(cached) - head if cached else 0.0)


def conversation(
    shape: CostShape,
    arm: tuple[float, float, bool],
    *,
    turns: int,
    system: int,
    question: int,
    answer: int,
    visual: int,
    prune_layer: int,
    block: int,
) -> list[float]:
    """Operations of each turn's prefill.

    Args:
        shape: the model's.
        arm: see `ARMS`.
        turns: of the conversation.
        system: tokens ahead of the picture, in the prefix cache beforehand.
        question: tokens of each question.
        answer: tokens of each answer.
        visual: vision tokens of the picture.
        prune_layer: K.
        block: tokens of a KV-cache block: the prefix cache holds whole ones.
    """
    share, keep, first_alone = arm
    flops, held = [], system // block * block
    for turn in range(turns):
        prompt = system + ceil(share * visual) + (turn + 1) * question + turn * answer
        drops = keep < 1 and not (first_alone and turn)
        kept = ceil(keep * prompt) if drops else prompt
        flops.append(turn_flops(shape, prompt, 0 if drops else held, kept, prune_layer))
        if not drops:
            # the answer's tokens were stored as they were generated
            held = (prompt + answer) // block * block
    return flops


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
        flops = conversation(
            LLAVA,
            arm,
            turns=options.turns,
            system=options.system,
            question=options.question,
            answer=options.answer,
            visual=LLAVA.patches,
            prune_layer=LLAVA.layers // 4,
            block=16,
        )
        tera = [f"{one / 1e12:.2f}" for one in (*flops, sum(flops))]
        so_far = [sum(flops[: turn + 1]) for turn in range(options.turns)]
        rows.append([name, *tera, f"{so_far[1] / 1e12:.2f}" if options.turns > 1 else ""])
    header = ["TFLOP of the prefill", *(f"turn {n + 1}" for n in range(options.turns)), "in all", "first two"]
    print(*columns(header, rows, width=_WIDTH), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
