# SPDX-License-Identifier: Apache-2.0
"""The operator's policy: engine settings, defaults and caps, and how a request resolves against them.

It travels as ``additional_config={"vtprune": {...}}``, the dict vLLM keeps for plugins
(`VllmConfig.additional_config`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_vtprune.kv_drop.schedule import PruneLayer, ScheduleError, is_reference, parse
from vllm_vtprune.selection.registry import DEFAULT_METHOD, METHODS
from vllm_vtprune.settings import (
    PRESETS,
    SCORES,
    Controls,
    KVSettings,
    PruneSettings,
    SettingsError,
    VisionSettings,
)

CONFIG_KEY = "vtprune"
RELEVANCES = ("attention", "last_token", "no_rope", "pagerank", "key_norm", "inherited")


class PolicyError(ValueError):
    """An operator's setting that cannot work; the message says what to change."""


@dataclass(frozen=True)
class PrunePolicy:
    """What the operator decides. Every field is a key of ``additional_config["vtprune"]``.

    Attributes:
        prune_layer: decoder layer K of stage 2, 1 <= K < number of layers; None switches stage 2 off.
        prune_layers: several prune layers, each with the largest share kept above it
            (`vllm_vtprune.kv_drop.schedule`); `prune_layer` is then the first of them.
        window: last prompt tokens whose queries rate the others, and which always stay.
        relevance: how stage 2 rates tokens (`vllm_vtprune.kv_drop.relevance`); names separated by commas are
            for one prune layer each, and the last holds for the rest.
        score: what ranks vision tokens in stage 1.
        min_tokens: vision tokens every image keeps at least.
        default_preset: what a request gets that says nothing.
        max_aggressiveness: the most a client may ask for.
        min_keep_ratio: the smallest fixed share a client may ask for.
        min_kv_keep: the smallest share of the prompt a client may keep above the prune layer.
        client_controls: whether clients may choose at all.
        methods: the selection methods clients may name; the first stands in for `inflection` where that is
            not among them.
        encoder_device: where tower and projector run: `auto`, `cpu`, `cuda:0`, ...
        encoder_dtype: their precision: `auto` (the model's), `float32`, `bfloat16`, `float16`.
        encoder_threads: CPU threads of the tower; 0 leaves torch's choice.
        encoder_batch: most images in one pass of the tower.
        trust_image_ids: whether a client's `uuid` or an EXIF image id may name a cached picture; off, since a
            forged id would be answered with somebody else's picture.
        feature_cache_gb: bound of the tower-output cache, in GiB per API process; 0 switches it off.
    """

    prune_layer: int | None = None
    prune_layers: str = ""
    window: int = 8
    relevance: str = "attention"
    score: str = "cosine"
    min_tokens: int = 1
    default_preset: str = "off"
    max_aggressiveness: float = 1.0
    min_keep_ratio: float = 0.0
    min_kv_keep: float = 0.0
    client_controls: bool = True
    methods: tuple[str, ...] = tuple(METHODS)
    encoder_device: str = "auto"
    encoder_dtype: str = "auto"
    encoder_threads: int = 0
    encoder_batch: int = 16
    feature_cache_gb: float = 1.0
    trust_image_ids: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.methods, list):
            object.__setattr__(self, "methods", tuple(self.methods))
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        self._check_prune_layers()
        _require(self.window >= 1, "window must be at least 1")
        _require(self.min_tokens >= 1, "min_tokens must be at least 1")
        _require(self.encoder_threads >= 0, "encoder_threads must not be negative")
        _require(self.encoder_batch >= 1, "encoder_batch must be at least 1")
        _require(self.feature_cache_gb >= 0, "feature_cache_gb must not be negative")
        _require(self.score in SCORES, f"score must be one of {', '.join(SCORES)}")
        wrong = [name for name in self.relevances if name not in RELEVANCES]
        _require(
            not wrong and self.relevances[0] != "inherited",
            f"relevance must be one of {', '.join(RELEVANCES)}, or one a prune layer separated by commas, "
            "the first of which is not inherited",
        )
        _require(self.default_preset in PRESETS, f"default_preset must be one of {', '.join(PRESETS)}")
        for name in ("max_aggressiveness", "min_keep_ratio", "min_kv_keep"):
            _require(0.0 <= getattr(self, name) <= 1.0, f"{name} must be in [0, 1]")
        unknown = [m for m in self.methods if m not in METHODS]
        _require(
            bool(self.methods) and not unknown,
            f"methods names {', '.join(unknown) or 'nothing'}; the methods are {', '.join(METHODS)}",
        )
        _require(
            self.prune_layer is None or self.prune_layer >= 1,
            "prune_layer must be at least 1 (leave it out to switch the second stage off)",
        )
        try:
            self.default_settings  # noqa: B018  (a default beyond the caps is the operator's mistake)
        except SettingsError as error:
            raise PolicyError(
                f"default_preset {self.default_preset!r} is beyond the caps: {error}"
            ) from error

    def _check_prune_layers(self) -> None:
        if not self.prune_layers:
            return
        first = None
        if not is_reference(self.prune_layers):
            try:
                first = self.schedule[0].layer
            except ScheduleError as error:
                raise PolicyError(f"vtprune: prune_layers: {error}.") from error
        _require(self.prune_layer in (None, first), "give prune_layer or prune_layers, not both")
        object.__setattr__(self, "prune_layer", first)

    @property
    def has_prune_layer(self) -> bool:
        """Whether stage 2 is on."""
        return self.prune_layer is not None or bool(self.prune_layers)

    @staticmethod
    def from_config(additional_config: Any) -> PrunePolicy:
        """Read ``additional_config["vtprune"]``.

        Raises:
            PolicyError: an unknown key or a value that cannot work.
        """
        values = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
        if values is None:
            return PrunePolicy()
        if not isinstance(values, Mapping):
            raise PolicyError(f'additional_config["{CONFIG_KEY}"] must be an object.')
        names = [f.name for f in dataclasses.fields(PrunePolicy)]
        for key in values:
            if key not in names:
                raise PolicyError(
                    f'Unknown key {key!r} in additional_config["{CONFIG_KEY}"]; '
                    f"the keys are {', '.join(names)}."
                )
        return PrunePolicy(**values)

    def to_config(self) -> dict[str, Any]:
        """The keys that differ from the defaults, as JSON values; inverse of `from_config`."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                out[field.name] = list(value) if isinstance(value, tuple) else value
        return out

    @property
    def relevances(self) -> tuple[str, ...]:
        """How each prune layer rates tokens; the last holds for the rest."""
        return tuple(name.strip() for name in self.relevance.split(","))

    @cached_property
    def schedule(self) -> tuple[PruneLayer, ...]:
        """The prune layers of an engine that has them; names and files have been resolved by then."""
        if self.prune_layers:
            return parse(self.prune_layers)
        return () if self.prune_layer is None else (PruneLayer(self.prune_layer),)

    @cached_property
    def default_settings(self) -> PruneSettings:
        """What a request gets that says nothing."""
        return self._resolve(Controls())

    def resolve(self, controls: Controls) -> PruneSettings:
        """What the client asked for, checked against this policy.

        Raises:
            SettingsError: fields that exclude each other, a cap, a method that is not allowed, controls
                that are switched off, or `kv_keep` below 1 on a server without a prune layer.
        """
        if not controls.fields:
            return self.default_settings
        if not self.client_controls:
            name = controls.name(next(iter(controls.fields)))
            raise SettingsError(f"{name} cannot be set: the operator of this server fixed the pruning.", name)
        return self._resolve(controls)

    def _resolve(self, controls: Controls) -> PruneSettings:
        keep_ratio = controls.get("keep_ratio")
        if keep_ratio is not None and controls.get("aggressiveness") is not None:
            name = controls.name("keep_ratio")
            raise SettingsError(
                f"{name} and {controls.name('aggressiveness')} exclude each other: the first asks for a "
                "fixed share, the second for the inflection point. Send one of them.",
                name,
            )
        preset_name = controls.get("preset", self.default_preset)
        preset = PRESETS[preset_name]
        method = controls.get("method", DEFAULT_METHOD if DEFAULT_METHOD in self.methods else self.methods[0])
        if method not in METHODS or method not in self.methods:
            name = controls.name("method")
            raise SettingsError(
                f"{name} must be one of {', '.join(self.methods)}, not {str(method)[:60]!r}.", name
            )
        vision = VisionSettings(
            method=method,
            aggressiveness=None
            if keep_ratio is not None
            else controls.get("aggressiveness", preset.aggressiveness),
            keep_ratio=keep_ratio,
            min_tokens=self.min_tokens,
            score=self.score,
        )
        kv = self._resolve_kv(controls, preset.kv_keep)
        self._check_caps(controls, vision, kv)
        return PruneSettings(preset_name, vision, kv)

    def _resolve_kv(self, controls: Controls, preset_keep: float) -> KVSettings:
        asked = controls.get("kv_keep")
        scope = controls.get("kv_scope", "all")
        if self.prune_layer is not None:
            if asked is not None and len(asked) > max(1, len(self.schedule)):
                name = controls.name("kv_keep")
                raise SettingsError(
                    f"{name} names {len(asked)} shares, and this server has {len(self.schedule)} prune "
                    "layers: send at most one for each.",
                    name,
                )
            return KVSettings.of(asked if asked is not None else (preset_keep,), scope)
        if asked is not None and min(asked) < 1.0:
            name = controls.name("kv_keep")
            raise SettingsError(
                f"{name} below 1 needs a prune layer, and this server has none; leave it out, "
                "or ask the operator to start the server with --prune-layer.",
                name,
            )
        return KVSettings(1.0, scope)

    def _check_caps(self, controls: Controls, vision: VisionSettings, kv: KVSettings) -> None:
        def blame(field: str) -> str:
            return controls.name(field if field in controls.fields else "preset")

        if vision.aggressiveness is not None and vision.aggressiveness > self.max_aggressiveness:
            raise SettingsError(
                f"{blame('aggressiveness')} asks for aggressiveness {vision.aggressiveness:g}; "
                f"this server's cap (max_aggressiveness) is {self.max_aggressiveness:g}.",
                blame("aggressiveness"),
            )
        if vision.keep_ratio is not None and vision.keep_ratio < self.min_keep_ratio:
            raise SettingsError(
                f"{blame('keep_ratio')} asks for {vision.keep_ratio:g}; this server keeps at least "
                f"{self.min_keep_ratio:g} (min_keep_ratio).",
                blame("keep_ratio"),
            )
        if min(kv.shares) < self.min_kv_keep:
            raise SettingsError(
                f"{blame('kv_keep')} asks for kv_keep {min(kv.shares):g}; this server keeps at least "
                f"{self.min_kv_keep:g} (min_kv_keep).",
                blame("kv_keep"),
            )


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise PolicyError(f"vtprune: {sentence}.")


_TYPES: dict[str, tuple[type, ...]] = {
    "int | None": (int, type(None)),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "tuple[str, ...]": (tuple,),
}


def _check_type(field: dataclasses.Field[Any], value: Any) -> None:
    allowed = _TYPES[str(field.type)]
    # bool is an int: `prune_layer: true` must not mean layer 1
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise PolicyError(f"vtprune: {field.name} must be {field.type}, not {type(value).__name__}.")
