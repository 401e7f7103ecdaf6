# SPDX-License-Identifier: Apache-2.0
"""A request's pruning settings: reading, validation and the canonical form.

The same code reads HTTP headers (strings), a request body's ``vtprune`` object (JSON values) and a
plain dict (offline use). Nothing here knows of vLLM or torch.

The data's way: raw input -> `Controls` (what the client said, each with the name to blame) ->
`PrunePolicy.resolve` (policy.py) -> `PruneSettings` (what will be done).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from vllm_vtprune.contract import FIELDS, HEADER_PREFIX, KWARG, KVScope, clip, kind_of
from vllm_vtprune.errors import SettingsError

#: The score that the model's family names (`families.base.Family.default_score`).
AUTO_SCORE = "auto"
#: Characters of a question that a method is given, the last ones: about four segments of CLIP's text tower.
LONGEST_QUESTION = 1200
#: Beside the contract's fields in `SamplingParams.extra_args`: `KVSettings.first_turn`, which no client says.
FIRST_TURN = "kv_first_turn"
_FIELD_OF_HEADER = {field.header.lower(): field for field in FIELDS.values()}


@dataclass(frozen=True, slots=True)
class VisionSettings:
    """Stage 1: how many of an image's vision tokens stay, and which.

    Attributes:
        method: name of a selection method (`vllm_vtprune.selection`).
        aggressiveness: in [0, 1]; the inflection point decides the count. None with `keep_ratio`.
        keep_ratio: in (0, 1]; a fixed share of the tokens. None with `aggressiveness`.
        min_tokens: tokens every image, and every frame of a video, keeps at least.
        score: what ranks the tokens: `cosine` to CLS, `cls_attention`, `received` attention, or `auto`.
        max_share: in (0, 1]; of each image no more than this share stays (but `min_tokens`), whatever the
            curve says.
        question: what is asked, for a method that reads it (`asking`); else empty.

    Raises:
        ValueError: a value is out of its range.
    """

    method: str = "inflection"
    aggressiveness: float | None = 0.0
    keep_ratio: float | None = None
    min_tokens: int = 1
    score: str = "cosine"
    max_share: float = 1.0
    question: str = ""

    def __post_init__(self) -> None:
        if self.aggressiveness is not None and not 0.0 <= self.aggressiveness <= 1.0:
            raise ValueError(f"aggressiveness must be between 0 and 1, not {self.aggressiveness}")
        if self.keep_ratio is not None and not 0.0 < self.keep_ratio <= 1.0:
            raise ValueError(f"keep_ratio must be above 0 and at most 1, not {self.keep_ratio}")
        if self.min_tokens < 1:
            raise ValueError(f"min_tokens must be at least 1, not {self.min_tokens}")
        if not 0.0 < self.max_share <= 1.0:
            raise ValueError(f"max_share must be above 0 and at most 1, not {self.max_share}")

    @property
    def keeps_all(self) -> bool:
        """Whether every vision token stays, whatever the image."""
        if self.keep_ratio is not None:
            return self.keep_ratio >= 1.0
        return not self.aggressiveness

    def asking(self, text: str) -> VisionSettings:
        """These settings with a question: its end, up to `LONGEST_QUESTION` characters, in single spaces.

        It becomes a part of what stays, and so of the picture's key in vLLM's caches; not of the key of the
        tower's output.
        """
        if self.keeps_all:
            return self
        words = " ".join(text.split())
        return replace(self, question=words[-LONGEST_QUESTION:].lstrip())

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
        if self.max_share < 1.0:
            amount["max_share"] = float(self.max_share)
        fields = {"method": self.method, "min_tokens": self.min_tokens, "score": self.score, **amount}
        if self.question:
            fields["question"] = self.question
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
        gate: whether the server's gate may decide that all visual tokens leave.
        reuse: whether later turns may go on from what the first one kept, on an engine that offers it
            (`policy.PrunePolicy.kv_reuse`).
        first_turn: there, tokens of the prompt that its first turn ended with: those behind them all stay. 0
            for a prompt that is its first turn.
    """

    keep: float = 1.0
    scope: KVScope = "all"
    above: tuple[float, ...] = ()
    gate: bool = True
    reuse: bool = True
    first_turn: int = 0

    @staticmethod
    def of(
        shares: Sequence[float],
        scope: KVScope = "all",
        *,
        gate: bool = True,
        reuse: bool = True,
        first_turn: int = 0,
    ) -> KVSettings:
        """From the shares of one or more prune layers."""
        keep, *above = shares
        return KVSettings(keep, scope, tuple(above), gate, reuse, first_turn)

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
        refused = {} if self.gate else {"kv_gate": "off"}
        if not self.reuse:
            refused["kv_reuse"] = "off"
        turn = {FIRST_TURN: self.first_turn} if self.first_turn else {}
        return {KWARG: {"kv_keep": keep, "kv_scope": self.scope, **refused, **turn}}

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
        fields = ("kv_keep", "kv_scope", "kv_gate", "kv_reuse")
        first_turn = entry.get(FIRST_TURN, 0)
        if not isinstance(first_turn, int) or isinstance(first_turn, bool) or first_turn < 0:
            name = f"extra_args.{KWARG}.{FIRST_TURN}"
            raise SettingsError(f"{name} must be a whole number of tokens, not {kind_of(first_turn)}.", name)
        said = {key: value for key, value in entry.items() if key != FIRST_TURN}
        controls = Controls.from_mapping(said, where=f"extra_args.{KWARG}", fields=fields)
        return KVSettings.of(
            controls.get("kv_keep", (1.0,)),
            controls.get("kv_scope", "all"),
            gate=controls.is_on("kv_gate"),
            reuse=controls.is_on("kv_reuse"),
            first_turn=first_turn,
        )


@dataclass(frozen=True, slots=True)
class PruneSettings:
    """Everything one request asked for, resolved against the operator's policy.

    Attributes:
        preset: the preset whose settings these are, or ``custom``.
        vision: stage 1.
        kv: stage 2.
        level: under `auto`, the preset that it was.
    """

    preset: str = "off"
    vision: VisionSettings = VisionSettings()
    kv: KVSettings = KVSettings()
    level: str | None = None

    def prunes_as(self, other: PruneSettings) -> bool:
        """Whether the two keep the same tokens of any request."""
        same_kv = self.kv == other.kv or not (self.kv.drops or other.kv.drops)
        return same_kv and self.vision.canonical() == other.vision.canonical()

    def as_dict(self) -> dict[str, Any]:
        """The contract's names, for logs and for `/vtprune/config`."""
        return {
            "preset": self.preset,
            "method": self.vision.method,
            "aggressiveness": self.vision.aggressiveness,
            "keep_ratio": self.vision.keep_ratio,
            "kv_keep": list(self.kv.shares) if self.kv.above else self.kv.keep,
            "kv_scope": self.kv.scope,
            **({} if self.kv.gate else {"kv_gate": "off"}),
            **({} if self.kv.reuse else {"kv_reuse": "off"}),
            **({"level": self.level} if self.level is not None else {}),
        }


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
                    f"Unknown header {clip(_text(raw_name))}: "
                    f"the headers are {', '.join(field.header for field in FIELDS.values())}.",
                    clip(_text(raw_name)),
                )
            if field.name in found:
                raise SettingsError(f"{field.header} was sent more than once; send it once.", field.header)
            value = field.parse(_text(raw_value).strip(), field.header, text=True)
            found[field.name] = (value, field.header)
        return Controls(found)

    @staticmethod
    def from_mapping(
        values: Mapping[str, Any] | None, where: str = KWARG, fields: Iterable[str] = tuple(FIELDS)
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
                f'{where} must be an object such as {{"aggressiveness": 0.5}}, not {kind_of(values)}.', where
            )
        allowed = tuple(fields)
        found: dict[str, tuple[Any, str]] = {}
        for key, value in values.items():
            name = f"{where}.{clip(str(key))}"
            if key not in allowed:
                raise SettingsError(f"Unknown field {name}: the fields are {', '.join(allowed)}.", name)
            if value is not None:
                found[key] = (FIELDS[key].parse(value, name, text=False), name)
        return Controls(found)

    def over(self, other: Controls) -> Controls:
        """These controls, and the other's where these say nothing (a header wins over the body)."""
        return Controls({**other.fields, **self.fields})

    def get(self, field: str, default: Any = None) -> Any:
        """The field's value, or the default when the client did not say."""
        return self.fields[field][0] if field in self.fields else default

    def is_on(self, field: str) -> bool:
        """Whether a field of `on` and `off` is on, which it is when the client did not say."""
        return bool(self.get(field, "on") == "on")

    def name(self, field: str) -> str:
        """The field as the client wrote it; the contract's name when they did not."""
        return self.fields[field][1] if field in self.fields else field


def _text(raw: bytes | str) -> str:
    return raw.decode("latin-1") if isinstance(raw, bytes) else raw
