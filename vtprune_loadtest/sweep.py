# SPDX-License-Identifier: Apache-2.0
"""The grid of settings under test, and the order in which they take turns.

A setting is a set of request headers. Settings are compared in one run: each block of the order holds every
setting once, shuffled, so a machine that warms up or slows down meets all of them alike (a randomised
complete block design).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from vllm_vtprune.contract import HEADER_PREFIX, HEADERS
from vtprune_loadtest.errors import LoadTestError

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a header's name, RFC 9110 section 5.6.2


@dataclass(frozen=True)
class Setting:
    """One point of the grid: what the reports call it, and the headers its requests carry."""

    label: str
    headers: tuple[tuple[str, str], ...] = ()


def parse_settings(presets: str | None, header_sweeps: Sequence[str]) -> list[Setting]:
    """The product of the presets and of every swept header; one setting without headers if nothing is swept.

    Args:
        presets: comma-separated values of X-VTPrune-Preset.
        header_sweeps: items `NAME=value,value`; an empty value leaves the header out.

    Raises:
        LoadTestError: malformed item, header swept twice, or the same value twice.
    """
    axes: list[tuple[str, list[str]]] = []
    if presets is not None:
        axes.append((HEADERS["preset"], _values("--sweep", presets)))
        if "" in axes[0][1]:
            raise LoadTestError(
                f"--sweep has an empty preset name in {presets!r}: write it like off,balanced."
            )
    for item in header_sweeps:
        name, equals, values = item.partition("=")
        name = name.strip()
        if not equals or not _TOKEN.fullmatch(name):
            raise LoadTestError(f"--sweep-header takes NAME=value,value and got {item!r}.")
        axes.append((name, _values(f"--sweep-header {name}", values)))
    names = [name.lower() for name, _ in axes]
    if len(set(names)) != len(names):
        raise LoadTestError("A header is swept twice: give all its values in one --sweep or --sweep-header.")
    if not axes:
        return [Setting("default")]
    return [
        Setting(
            label=" ".join(_label(name, value) for (name, _), value in zip(axes, point, strict=True)),
            headers=tuple((name, value) for (name, _), value in zip(axes, point, strict=True) if value),
        )
        for point in product(*(values for _, values in axes))
    ]


def balanced_order(settings: int, rng: np.random.Generator) -> Iterator[int]:
    """Setting indices without end, block after block, each block a fresh shuffle of all of them.

    After any number of requests two settings' counts differ by at most one.
    """
    while True:
        yield from rng.permutation(settings).tolist()


def _values(option: str, text: str) -> list[str]:
    values = [value.strip() for value in text.split(",")]
    if len(set(values)) != len(values):
        raise LoadTestError(f"{option} names a value twice in {text!r}: every value may appear once.")
    for value in values:
        if not value.isascii() or not value.isprintable():
            raise LoadTestError(
                f"{option} has the value {value!r}: a header holds printable ASCII characters only."
            )
    return values


def _label(name: str, value: str) -> str:
    if name == HEADERS["preset"]:
        return value
    return f"{name.lower().removeprefix(HEADER_PREFIX)}={value or 'unset'}"
