# SPDX-License-Identifier: Apache-2.0
"""Rows of text as aligned columns for a terminal."""

from collections.abc import Sequence

TERMINAL_WIDTH = 80
_GAP = "  "


def columns(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    width: int = TERMINAL_WIDTH,
) -> list[str]:
    """Lines of aligned cells, the header first; the first `left` columns are left-aligned.

    Where lines would be wider than `width`, first cells that are too long stand on a line of their own, above
    the rest of their row.
    """
    rest = [max(len(line[at]) for line in (header, *rows)) for at in range(1, len(header))]
    room = max(len(header[0]), width - sum(len(_GAP) + cell for cell in rest))
    first = max(len(line[0]) for line in (header, *rows) if len(line[0]) <= room)
    lines = []
    for cells in (header, *rows):
        if len(cells[0]) > room:
            lines.append(cells[0])
            cells = ["", *cells[1:]]
        padded = [
            cell.ljust(wide) if at < left else cell.rjust(wide)
            for at, (cell, wide) in enumerate(zip(cells, (first, *rest), strict=True))
        ]
        lines.append(_GAP.join(padded).rstrip())
    return lines
