# SPDX-License-Identifier: Apache-2.0
"""The grid of settings under test, and the order in which they take turns.

A setting is a set of request headers. Settings are compared in one run: each block of the order holds every
setting once, shuffled, so a machine that warms up or slows down meets all of them alike (a randomised
complete block design). Two combinations of headers that cannot differ, such as two methods of choosing when
everything stays, are one setting and run once.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from vllm_vtprune.contract import HEADER_PREFIX, HEADERS, PRESETS
from vllm_vtprune.errors import SettingsError
from vllm_vtprune.settings import Controls
from vtprune_loadtest.errors import LoadTestError

PRESET_HEADER = HEADERS["preset"]
#: Ahead of a share in `--sweep`: not a preset but the picture itself made smaller.
DOWNSCALE = "downscale"
#: Headers and share of the pixels.
_Point = tuple[tuple[tuple[str, str], ...], float]
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a header's name, RFC 9110 section 5.6.2


@dataclass(frozen=True)
class SweepSetting:
    """One point of the grid.

    Attributes:
        label: what the reports call it.
        headers: what its requests carry.
        stands_for: the combinations, as they were asked for, that this one is; empty if only itself.
        pixels: share of each picture's pixels that is sent: below 1, the same picture, smaller.
    """

    label: str
    headers: tuple[tuple[str, str], ...] = ()
    stands_for: tuple[str, ...] = ()
    pixels: float = 1.0


def parse_settings(presets: str | None, header_sweeps: Sequence[str]) -> list[SweepSetting]:
    """The product of the presets and of every swept header; one setting without headers if nothing is swept.

    Args:
        presets: comma-separated values of X-VTPrune-Preset; `downscale0.22` among them is `off` with pictures
            of so many times the pixels.
        header_sweeps: items `NAME=value,value`, or `NAME=value;value` where values hold commas; an empty
            value leaves the header out.

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
        return [SweepSetting("default")]
    found: dict[_Point, list[str]] = {}
    labels: dict[_Point, str] = {}
    for chosen in product(*(values for _, values in axes)):
        asked_for = [(name, value) for (name, _), value in zip(axes, chosen, strict=True)]
        point, pixels = _smaller(asked_for)
        idle = _idle_headers([(name, value) for name, value in point if value])
        acting = [(name, value) for name, value in point if name.lower() not in idle]
        headers = tuple((name, value) for name, value in acting if value)
        found.setdefault((headers, pixels), []).append(_label(asked_for))
        shown = [(name, dict(asked_for)[name]) for name, _ in acting]
        labels.setdefault((headers, pixels), _label(shown))
    return [
        SweepSetting(labels[key], key[0], tuple(asked) if asked != [labels[key]] else (), key[1])
        for key, asked in found.items()
    ]


def _smaller(point: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], float]:
    """The headers, and the share of the pixels where the preset is `downscale0.22`.

    Raises:
        LoadTestError: the share is not above 0 and below 1.
    """
    preset = dict(point).get(PRESET_HEADER, "")
    if not preset.startswith(DOWNSCALE):
        return point, 1.0
    try:
        pixels = float(preset.removeprefix(DOWNSCALE))
    except ValueError:
        pixels = 0.0
    if not 0 < pixels < 1:
        raise LoadTestError(
            f"--sweep has {preset!r}: write the share of the pixels behind it, like {DOWNSCALE}0.22."
        )
    return [(name, "off" if name == PRESET_HEADER else value) for name, value in point], pixels


def _idle_headers(headers: Sequence[tuple[str, str]]) -> set[str]:
    """The headers, in lower case, that change nothing beside the others."""
    try:
        said = Controls.from_headers(headers)
    except SettingsError:
        return set()  # the server says what is wrong with them
    preset = PRESETS.get(said.get("preset"))
    idle = set()
    share = said.get("keep_ratio")
    aggressiveness = said.get("aggressiveness", preset and preset.aggressiveness)
    if share == 1 or (share is None and aggressiveness == 0):
        idle.add("method")  # of choosing what stays: everything does
    shares = said.get("kv_keep", preset and (preset.kv_keep,))
    if shares is not None and min(shares) == 1:
        idle.add("kv_scope")
    return {HEADERS[field].lower() for field in idle}


def balanced_order(settings: int, rng: np.random.Generator) -> Iterator[int]:
    """Setting indices without end, block after block, each block a fresh shuffle of all of them.

    After any number of requests two settings' counts differ by at most one.
    """
    while True:
        yield from rng.permutation(settings).tolist()


def _values(option: str, text: str) -> list[str]:
    values = [value.strip() for value in text.split(";" if ";" in text else ",")]
    if len(set(values)) != len(values):
        raise LoadTestError(f"{option} names a value twice in {text!r}: every value may appear once.")
    for value in values:
        if not value.isascii() or not value.isprintable():
            raise LoadTestError(
                f"{option} has the value {value!r}: a header holds printable ASCII characters only."
            )
    return values


def _label(point: Sequence[tuple[str, str]]) -> str:
    return " ".join(
        value if name == PRESET_HEADER else f"{name.lower().removeprefix(HEADER_PREFIX)}={value or 'unset'}"
        for name, value in point
    )
