# SPDX-License-Identifier: Apache-2.0
"""The operator's policy: how a request resolves against the operator's defaults and caps.

It travels as ``additional_config={"vtprune": {...}}``, the dict vLLM keeps for plugins
(`VllmConfig.additional_config`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from pydantic import ValidationError, model_validator

from vllm_vtprune.contract import AUTO, CUSTOM, KWARG, PRESETS
from vllm_vtprune.errors import PolicyError, SettingsError
from vllm_vtprune.operator_model import refusal
from vllm_vtprune.policy_fields import AUTO_METHOD, FIRST_TURN, PolicyFields
from vllm_vtprune.selection.registry import DEFAULT_METHOD, METHODS
from vllm_vtprune.settings import Controls, KVSettings, PruneSettings, VisionSettings

CONFIG_KEY = "vtprune"


class PrunePolicy(PolicyFields):
    """What the operator decides, and what that makes of a request."""

    @model_validator(mode="after")
    def _within_caps(self) -> PrunePolicy:
        names = list(PRESETS)
        if names.index(self.auto_floor) > names.index(self.auto_ceiling):
            raise ValueError(
                f"auto_floor {self.auto_floor!r} prunes more than auto_ceiling {self.auto_ceiling!r}: the "
                "floor is what auto is without load"
            )
        if self.auto_floor not in self.auto_levels:
            raise ValueError(f"auto_floor {self.auto_floor!r} is beyond the caps")
        try:
            _ = self.default_settings
        except SettingsError as error:
            raise ValueError(f"default_preset {self.default_preset!r} is beyond the caps: {error}") from error
        return self

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
        try:
            return PrunePolicy(**values)
        except ValidationError as error:
            raise refusal(error, PrunePolicy) from error

    def to_config(self) -> dict[str, Any]:
        """The keys that differ from the defaults, as JSON values; inverse of `from_config`."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def method_named_by_none(self, families: str = DEFAULT_METHOD) -> str:
        """The method of a request that names none.

        Args:
            families: the model family's own.
        """
        if self.default_method != AUTO_METHOD:
            return self.default_method
        return families if families in self.methods else self.methods[0]

    @cached_property
    def default_settings(self) -> PruneSettings:
        """What a request gets that says nothing."""
        return self._resolve(Controls())

    @cached_property
    def auto_levels(self) -> tuple[str, ...]:
        """The presets that `auto` moves between, the least pruning first: those that the caps allow."""
        names = list(PRESETS)
        ladder = names[names.index(self.auto_floor) : names.index(self.auto_ceiling) + 1]
        return tuple(name for name in ladder if self._allows(name))

    def _allows(self, preset: str) -> bool:
        try:
            self._resolve(Controls({"preset": (preset, "preset")}))
        except SettingsError:
            return False
        return True

    @cached_property
    def _default_of_later_turns(self) -> PruneSettings:
        return self._resolve(Controls(), later_turn=True)

    def resolve(
        self, controls: Controls, level: str | None = None, *, later_turn: bool = False
    ) -> PruneSettings:
        """What the client asked for, checked against this policy.

        Args:
            controls: the request's.
            level: the preset that `auto` is now; its floor where nobody follows the load.
            later_turn: the request carries an earlier answer of its conversation; see `preset_kv_keep`.

        Raises:
            SettingsError: fields that exclude each other, a cap, a method that is not allowed, controls
                that are switched off, or `kv_keep` below 1 on a server without a prune layer.
        """
        if not controls.fields:
            if self.default_preset != AUTO:
                return self._default_of_later_turns if later_turn else self.default_settings
            return self._resolve(controls, level, later_turn=later_turn)
        if not self.client_controls:
            name = controls.name(next(iter(controls.fields)))
            raise SettingsError(f"{name} cannot be set: the operator of this server fixed the pruning.", name)
        return self._resolve(controls, level, later_turn=later_turn)

    def check_extra_args(self, extra_args: Mapping[str, Any] | None) -> None:
        """Judge second-stage settings in `SamplingParams.extra_args`, as `KVSettings` writes them.

        Raises:
            SettingsError: they cannot be read, or are beyond this policy.
        """
        default = self.default_settings.kv
        # what is left whole behind a first turn is beyond no policy
        kv = replace(KVSettings.from_extra_args(extra_args, default), first_turn=0)
        if kv == default:
            return
        where = f"extra_args.{KWARG}"
        controls = Controls(
            {
                name: (value, f"{where}.{name}")
                for name, value in {"kv_keep": kv.shares, "kv_scope": kv.scope}.items()
            }
        )
        if not self.client_controls:
            raise SettingsError(
                f"{where} cannot be set: the operator of this server fixed the pruning.", where
            )
        self._check_caps(controls, self.default_settings.vision, self._resolve_kv(controls, 1.0))

    def _resolve(
        self, controls: Controls, level: str | None = None, *, later_turn: bool = False
    ) -> PruneSettings:
        later = later_turn and self.preset_kv_keep == FIRST_TURN
        settings = self._combine(controls, level, later=later)
        self._check_caps(controls, settings.vision, settings.kv)
        if controls.fields.keys() <= {"preset"}:
            return settings
        # what was named besides the preset must not be counted under the preset's name
        alone = self._combine(Controls({"preset": (settings.preset, "preset")}), level, later=later)
        return settings if settings.prunes_as(alone) else replace(settings, preset=CUSTOM)

    def _combine(self, controls: Controls, level: str | None, *, later: bool = False) -> PruneSettings:
        keep_ratio = controls.get("keep_ratio")
        if keep_ratio is not None and controls.get("aggressiveness") is not None:
            name = controls.name("keep_ratio")
            raise SettingsError(
                f"{name} and {controls.name('aggressiveness')} exclude each other: the first asks for a "
                "fixed share, the second for the inflection point. Send one of them.",
                name,
            )
        preset_name = controls.get("preset", self.default_preset)
        by_load = preset_name == AUTO
        level = (level or self.auto_levels[0]) if by_load else None
        preset = self.presets[level or preset_name]
        method = controls.get("method", self.method_named_by_none())
        if method not in METHODS or method not in self.methods:
            name = controls.name("method")
            raise SettingsError(
                f"{name} must be one of {', '.join(self.methods)}, not {str(method)[:60]!r}.", name
            )
        aggressiveness = controls.get("aggressiveness")
        of_preset = keep_ratio is None and aggressiveness in (None, preset.aggressiveness)
        vision = VisionSettings(
            method=method,
            aggressiveness=preset.aggressiveness if of_preset else aggressiveness,
            keep_ratio=keep_ratio,
            min_tokens=self.min_tokens,
            score=self.score,
            # who says how much is to stay means it
            max_share=preset.max_share if of_preset else 1.0,
        )
        kv = self._resolve_kv(controls, 1.0 if later else preset.kv_keep)
        return PruneSettings(preset_name, vision, kv, level)

    def _resolve_kv(self, controls: Controls, preset_keep: float) -> KVSettings:
        asked = controls.get("kv_keep")
        scope = controls.get("kv_scope", "all")
        gate, reuse = controls.is_on("kv_gate"), controls.is_on("kv_reuse")
        if self.prune_layer is not None:
            if asked is not None and len(asked) > len(self.schedule) > 0:
                name = controls.name("kv_keep")
                raise SettingsError(
                    f"{name} names {len(asked)} shares, and this server has {len(self.schedule)} prune "
                    f"layer{'s' if len(self.schedule) > 1 else ''}: send at most one for each.",
                    name,
                )
            shares = asked if asked is not None else (preset_keep,)
            return KVSettings.of(shares, scope, gate=gate, reuse=reuse)
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
