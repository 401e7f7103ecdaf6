# SPDX-License-Identifier: Apache-2.0
"""Joining what several processes say to Prometheus, in its text format."""

from __future__ import annotations

import json
import re

#: A gauge that says which of them answered.
UP = "vtprune_replica_up"
#: A sample: its name, its labels without the braces, and its value with what follows.
_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (.+)")


def merged(texts: dict[str, str | None]) -> str:
    """Join expositions of Prometheus's text format, each sample labelled with its replica.

    Args:
        texts: by replica; None where it did not answer. `vtprune_replica_up` says which did.
    """
    heads: dict[str, list[str]] = {UP: [f"# HELP {UP} Whether the replica answered.", f"# TYPE {UP} gauge"]}
    samples: dict[str, list[str]] = {UP: []}
    for replica, text in texts.items():
        label = f"replica={json.dumps(replica)}"
        samples[UP].append(f"{UP}{{{label}}} {int(text is not None)}")
        family = ""
        for line in (text or "").splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                head = heads.setdefault(family, [])
                samples.setdefault(family, [])
                if line not in head and len(head) < 2:
                    head.append(line)
            elif match := _SAMPLE.fullmatch(line):
                name, labels, value = match.groups()
                inside = f"{label},{labels}" if labels else label
                samples.setdefault(family, []).append(f"{name}{{{inside}}} {value}")
    lines = [line for family in heads for line in (*heads[family], *samples[family])]
    return "\n".join(lines) + "\n"
