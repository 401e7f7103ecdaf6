# SPDX-License-Identifier: Apache-2.0
"""A request's pruning settings: parsing, validation, presets and the canonical form.

The same code reads HTTP headers (strings), a request body's ``vtprune`` object (JSON values) and a
plain dict (offline use). Nothing here knows of vLLM or torch.

The data's way: raw input -> `Controls` (what the client said, each with the name to blame) ->
`PrunePolicy.resolve` (policy.py) -> `PruneSettings` (what will be done).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

KVScope = Literal["all", "vision"]
KV_SCOPES: tuple[KVScope, ...] = ("all", "vision")
SCORES = ("cosine", "cls_attention", "received")

HEADER_PREFIX = "x-vtprune-"
#: Field of the contract -> header that carries it.
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "preset": "X-VTPrune-Preset",
        "aggressiveness": "X-VTPrune-Aggressiveness",
        "keep_ratio": "X-VTPrune-Keep-Ratio",
        "method": "X-VTPrune-Method",
        "kv_keep": "X-VTPrune-KV-Keep",
        "kv_scope": "X-VTPrune-KV-Scope",
    }
)
_FIELD_OF_HEADER = {header.lower(): field for field, header in HEADERS.items()}
_NUMBERS = frozenset({"aggressiveness", "keep_ratio"})
#: Shares that may be named at once: one a prune layer.
_MOST_SHARES = 4

#: The key under which the canonical vision settings travel in `mm_processor_kwargs`,
#: and the KV settings in `SamplingParams.extra_args`.
KWARG = "vtprune"


class SettingsError(ValueError):
    """Settings that cannot be served.

    Attributes:
        param: the header or body field to blame, as the client wrote it.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class VisionSettings:
    """Stage 1: how many of an image's vision tokens stay, and which.

    Attributes:
        method: name of a selection method (`vllm_vtprune.selection`).
        aggressiveness: in [0, 1]; the inflection point decides the count. None with `keep_ratio`.
        keep_ratio: in (0, 1]; a fixed share of the tokens. None with `aggressiveness`.
        min_tokens: tokens every image keeps at least.
        score: what ranks the tokens: `cosine` to CLS, `cls_attention`, or `received` attention.
    """

    method: str = "inflection"
    aggressiveness: float | None = 0.0
    keep_ratio: float | None = None
    min_tokens: int = 1
    score: str = "cosine"

    @property
    def keeps_all(self) -> bool:
        """Whether every vision token stays, whatever the image."""
        if self.keep_ratio is not None:
            return self.keep_ratio >= 1.0
        return not self.aggressiveness

    def canonical(self) -> str:
        """One text per meaning: it enters vLLM's multimodal hash, which compares spelling.

        Settings that keep everything are all spelt ``off``, so they share their cache entries.
        """
        if self.keeps_all:
            return "off"
        amount = (
            {"keep_ratio": float(self.keep_ratio)}
            if self.keep_ratio is not None
            else {"aggressiveness": float(self.aggressiveness or 0.0)}
        )
        fields = {"method": self.method, "min_tokens": self.min_tokens, "score": self.score, **amount}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_canonical(text: str) -> VisionSettings:
        """Inverse of `canonical`.

        Raises:
            SettingsError: the text was not written by `canonical`.
        """
        if text == "off":
            return VisionSettings()
        try:
            fields = json.loads(text)
            settings = VisionSettings(**{"aggressiveness": None, **fields})
            if settings.canonical() == text:
                return settings
        except (TypeError, ValueError):
            pass
        raise SettingsError(
            f"mm_processor_kwargs['{KWARG}'] is {text!r}, which is not a canonical setting; "
            "build it with vllm_vtprune.request_kwargs(...).",
            f"mm_processor_kwargs.{KWARG}",
        )


@dataclass(frozen=True, slots=True)
class KVSettings:
    """Stage 2: which share of the prompt stays above each prune layer.

    Attributes:
        keep: in [0, 1], above the first prune layer; 1 drops nothing, 0 every visual token.
        scope: `all` (visual and text tokens compete) or `vision` (text tokens are protected).
        above: the same for further prune layers; the last share given holds for the rest.
    """

    keep: float = 1.0
    scope: KVScope = "all"
    above: tuple[float, ...] = ()

    @property
    def shares(self) -> tuple[float, ...]:
        """Every share, from the lowest prune layer up."""
        return (self.keep, *self.above)

    @property
    def drops(self) -> bool:
        """Whether anything may leave the cache."""
        return min(self.shares) < 1.0

    def extra_args(self) -> dict[str, Any]:
        """What `SamplingParams.extra_args` carries to scheduler and worker."""
        keep: float | list[float] = list(map(float, self.shares)) if self.above else float(self.keep)
        return {KWARG: {"kv_keep": keep, "kv_scope": self.scope}}

    @staticmethod
    def from_extra_args(extra_args: Mapping[str, Any] | None, default: KVSettings) -> KVSettings:
        """Inverse of `extra_args`; absent means the operator's default.

        Raises:
            SettingsError: the entry is not what `extra_args` writes.
        """
        entry = (extra_args or {}).get(KWARG)
        if entry is None:
            return default
        if not isinstance(entry, Mapping):
            raise SettingsError(
                f"extra_args['{KWARG}'] must be an object; build it with vllm_vtprune.request_kwargs(...).",
                f"extra_args.{KWARG}",
            )
        controls = Controls.from_mapping(entry, where=f"extra_args.{KWARG}", fields=("kv_keep", "kv_scope"))
        return KVSettings.of(controls.get("kv_keep", (1.0,)), controls.get("kv_scope", "all"))

    @staticmethod
    def of(shares: Sequence[float], scope: KVScope = "all") -> KVSettings:
        """From the shares of one or more prune layers."""
        keep, *above = shares
        return KVSettings(keep, scope, tuple(above))


@dataclass(frozen=True, slots=True)
class PruneSettings:
    """Everything one request asked for, resolved against the operator's policy."""

    preset: str = "off"
    vision: VisionSettings = VisionSettings()
    kv: KVSettings = KVSettings()

    def as_dict(self) -> dict[str, Any]:
        """The contract's names, for logs and for `/vtprune/config`."""
        return {
            "preset": self.preset,
            "method": self.vision.method,
            "aggressiveness": self.vision.aggressiveness,
            "keep_ratio": self.vision.keep_ratio,
            "kv_keep": list(self.kv.shares) if self.kv.above else self.kv.keep,
            "kv_scope": self.kv.scope,
        }


@dataclass(frozen=True, slots=True)
class Preset:
    """A whole set of settings under one name; `kv_keep` applies where the server has a prune layer."""

    aggressiveness: float
    kv_keep: float = 1.0


#: The aggressiveness keeps a third, 22 % and 11 % of the tokens on average over the validation split of the
#: demo model's scenes; other pictures and towers keep other shares. kv_keep then costs 0.3, 0.8 and 5 points
#: there, and a quarter 4 to 12 (docs/evaluation.md).
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "off": Preset(aggressiveness=0.0),
        "light": Preset(aggressiveness=0.23, kv_keep=0.75),
        "balanced": Preset(aggressiveness=0.54, kv_keep=0.5),
        "aggressive": Preset(aggressiveness=0.7, kv_keep=0.5),
    }
)


@dataclass(frozen=True, slots=True)
class Controls:
    """What a client said: field -> (value, the name to blame). Values are validated, not yet resolved."""

    fields: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    @staticmethod
    def from_headers(headers: Iterable[tuple[bytes | str, bytes | str]]) -> Controls:
        """Read the `X-VTPrune-*` headers out of raw header pairs; all others are passed over.

        Raises:
            SettingsError: an unknown or repeated `X-VTPrune-*` header, or a bad value.
        """
        found: dict[str, tuple[Any, str]] = {}
        for raw_name, raw_value in headers:
            name = _text(raw_name).lower()
            if not name.startswith(HEADER_PREFIX):
                continue
            field = _FIELD_OF_HEADER.get(name)
            if field is None:
                raise SettingsError(
                    f"Unknown header {_clip(_text(raw_name))}: "
                    f"the headers are {', '.join(HEADERS.values())}.",
                    _clip(_text(raw_name)),
                )
            header = HEADERS[field]
            if field in found:
                raise SettingsError(f"{header} was sent more than once; send it once.", header)
            found[field] = (_parse(field, _text(raw_value).strip(), header, text=True), header)
        return Controls(found)

    @staticmethod
    def from_mapping(
        values: Mapping[str, Any] | None, where: str = KWARG, fields: Iterable[str] = tuple(HEADERS)
    ) -> Controls:
        """Read a request body's `vtprune` object, or a plain dict. None values count as absent.

        Args:
            values: the object; None is an empty one.
            where: prefix of the names in errors, e.g. ``vtprune`` for ``vtprune.kv_keep``.
            fields: the fields that may appear.

        Raises:
            SettingsError: not an object, an unknown field, or a bad value.
        """
        if values is None:
            return Controls()
        if not isinstance(values, Mapping):
            raise SettingsError(
                f'{where} must be an object such as {{"aggressiveness": 0.5}}, not {_kind(values)}.', where
            )
        allowed = tuple(fields)
        found: dict[str, tuple[Any, str]] = {}
        for key, value in values.items():
            name = f"{where}.{_clip(str(key))}"
            if key not in allowed:
                raise SettingsError(f"Unknown field {name}: the fields are {', '.join(allowed)}.", name)
            if value is not None:
                found[key] = (_parse(key, value, name, text=False), name)
        return Controls(found)

    def over(self, other: Controls) -> Controls:
        """These controls, and the other's where these say nothing (a header wins over the body)."""
        return Controls({**other.fields, **self.fields})

    def get(self, field: str, default: Any = None) -> Any:
        """The field's value, or the default when the client did not say."""
        return self.fields[field][0] if field in self.fields else default

    def name(self, field: str) -> str:
        """The field as the client wrote it; the contract's name when they did not."""
        return self.fields[field][1] if field in self.fields else field


def _parse(field: str, value: Any, name: str, *, text: bool) -> Any:
    if field in _NUMBERS:
        return _number(field, value, name, text=text)
    if field == "kv_keep":
        return _shares(value, name, text=text)
    if not isinstance(value, str):
        raise SettingsError(f"{name} must be a string, not {_kind(value)}.", name)
    value = value.strip().lower()
    if field == "kv_scope" and value not in KV_SCOPES:
        raise SettingsError(f"{name} must be one of {', '.join(KV_SCOPES)}, not {_clip(value)!r}.", name)
    if field == "preset" and value not in PRESETS:
        raise SettingsError(f"{name} must be one of {', '.join(PRESETS)}, not {_clip(value)!r}.", name)
    return value


def _shares(value: Any, name: str, *, text: bool) -> tuple[float, ...]:
    """One share, or one a prune layer: ``0.5,0.25`` in a header, a list in a body."""
    values: Sequence[Any] = [value]
    if text:
        values = [part.strip() for part in value.split(",")]
    elif isinstance(value, list | tuple):
        values = value
    if not 1 <= len(values) <= _MOST_SHARES:
        raise SettingsError(f"{name} must be one share, or one a prune layer, not {len(values)}.", name)
    return tuple(_number("kv_keep", one, name, text=text) for one in values)


def _number(field: str, value: Any, name: str, *, text: bool) -> float:
    bounds = "(0, 1]" if field == "keep_ratio" else "[0, 1]"
    number = math.nan
    if text:
        # float() takes '1_0', which no HTTP client means as a number
        with suppress(ValueError):
            number = float(value) if "_" not in value else math.nan
    elif isinstance(value, int | float) and not isinstance(value, bool):
        # an int too large for a float is out of range all the same
        number = float(value) if abs(value) <= 2 else math.inf
    else:
        raise SettingsError(f"{name} must be a number in {bounds}, not {_kind(value)}.", name)
    low_ok = number > 0.0 if field == "keep_ratio" else number >= 0.0
    if not (low_ok and number <= 1.0):  # NaN fails both comparisons
        raise SettingsError(f"{name} must be a number in {bounds}, not {_clip(str(value))}.", name)
    return number + 0.0  # -0.0 becomes 0.0


def _text(raw: bytes | str) -> str:
    return raw.decode("latin-1") if isinstance(raw, bytes) else raw


def _clip(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
