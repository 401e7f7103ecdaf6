# SPDX-License-Identifier: Apache-2.0
"""The fields of the operator's policy: bounds, default, and the words of help and documents.

What a request gets of them: `vllm_vtprune.policy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from vllm_vtprune.contract import AUTO, PRESETS, Preset
from vllm_vtprune.kv_drop.relevance import RELEVANCE
from vllm_vtprune.kv_drop.schedule import PruneLayer, ScheduleError, is_reference, parse
from vllm_vtprune.operator_model import OperatorModel, one_of
from vllm_vtprune.selection.registry import METHODS
from vllm_vtprune.selection.scores import SCORES
from vllm_vtprune.settings import AUTO_SCORE

#: The method that the model's family names (`families.base.Family.default_method`).
AUTO_METHOD = "auto"
#: A prompt that loses tokens in the decoder can neither read nor fill the prefix cache, which otherwise holds
#: all but the last question of a later turn (docs/benchmarks.md counts what that costs).
FIRST_TURN, EVERY_TURN = "first_turn", "every_turn"
PRESET_TURNS = (FIRST_TURN, EVERY_TURN)


def _none_for_off(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() in ("", "none", "off") else value


def _methods(names: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ValueError(f"names {', '.join(unknown) or 'nothing'}; the methods are {', '.join(METHODS)}")
    return names


def _ratings(names: str) -> str:
    found = [name.strip() for name in names.split(",")]
    if any(name not in RELEVANCE for name in found) or RELEVANCE[found[0]].inherits:
        raise ValueError(
            f"must be one of {', '.join(RELEVANCE)}, or one for each prune layer, separated by commas, of "
            f"which the first cannot inherit, not {names!r}"
        )
    return ",".join(found)


def _amounts(text: str) -> dict[str, float]:
    """`light=0.3,balanced=0.55` as numbers by preset."""
    found = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, amount = part.partition("=")
        try:
            found[name] = float(amount)
            fits = name in PRESETS and name != "off" and 0 <= found[name] <= 1
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"must be names of presets with a number in [0, 1] each, such as balanced=0.55, not {part!r}"
            )
    return found


def _preset_amounts(text: str) -> str:
    _amounts(text)
    return text


class PolicyFields(OperatorModel):
    """What the operator decides. Every field is a key of ``additional_config["vtprune"]``."""

    prune_layer: Annotated[int | None, BeforeValidator(_none_for_off)] = Field(
        default=None, ge=1, description="decoder layer K of the second stage, which is off without one"
    )
    prune_layers: str = Field(
        default="",
        description="several prune layers in place of one, each with the largest share kept above it "
        "(8:0.5,16:vision=0.25,24:0), or a schedule: aim, pyramid, exit, or a JSON file",
    )
    prune_schedule: str = Field(
        default="",
        description="file of a schedule that `vtprune calibrate` wrote, in place of prune layers; refused "
        "for another model",
    )
    prune_gate: str = Field(
        default="",
        description="file of a gate that `vtprune calibrate --gate` trained: at its prune layer it decides "
        "for each request whether all visual tokens leave; refused for another model",
    )
    window: int = Field(
        default=8, ge=1, description="last prompt tokens, which rate the others and always stay"
    )
    relevance: Annotated[str, AfterValidator(_ratings)] = Field(
        default="attention",
        description=f"how the second stage rates tokens: {', '.join(RELEVANCE)}; names separated by commas "
        "are for one prune layer each",
    )
    score: Annotated[str, one_of((AUTO_SCORE, *SCORES))] = Field(
        default=AUTO_SCORE,
        description=f"what ranks vision tokens: {', '.join(SCORES)}; auto is the model family's own",
    )
    min_tokens: int = Field(default=1, ge=1, description="vision tokens every image keeps at least")
    default_preset: Annotated[str, one_of((*PRESETS, AUTO))] = Field(
        default="off", description="the preset of a request that says nothing"
    )
    auto_floor: Annotated[str, one_of(PRESETS)] = Field(
        default="off", description="the preset auto is without load"
    )
    auto_ceiling: Annotated[str, one_of(PRESETS)] = Field(
        default="balanced", description="the preset auto is under any load, if within the caps"
    )
    auto_waiting: int = Field(
        default=8,
        ge=0,
        description="waiting requests at which auto prunes more; 0 ignores them",
    )
    auto_kv_use: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="share of the KV cache in use at which auto prunes more; 0 ignores it",
    )
    auto_images: int = Field(
        default=16,
        ge=0,
        description="images waiting for the vision tower at which auto prunes more; 0 ignores them",
    )
    auto_ttft_ms: int = Field(
        default=0,
        ge=0,
        description="goal for the time to first token, in ms: auto prunes more when a request may expect to "
        "miss it; 0 for none",
    )
    auto_calm_s: float = Field(
        default=10.0,
        gt=0,
        description="seconds below half of every mark after which auto prunes less, one preset at a time",
    )
    preset_aggressiveness: Annotated[str, AfterValidator(_preset_amounts)] = Field(
        default="",
        description="the aggressiveness of presets where it is not the built-in one, such as "
        "light=0.3,balanced=0.55; `vtprune calibrate` finds it",
    )
    preset_kv_keep: Annotated[str, one_of(PRESET_TURNS)] = Field(
        default=FIRST_TURN,
        description="at which turns of a conversation a preset's kv_keep holds: first_turn (not in a request "
        "that carries an earlier answer) or every_turn",
    )
    kv_reuse: bool = Field(
        default=False,
        description="whether later turns of a chat go on from what the first turn kept in the KV cache, "
        "instead of dropping anew; counts are then rounded to whole blocks, and a preset's kv_keep holds at "
        "every turn",
    )
    client_controls: bool = Field(default=True, description="whether clients may choose at all")
    # strict=False: JSON and YAML have lists
    methods: Annotated[tuple[str, ...], AfterValidator(_methods)] = Field(
        default=tuple(METHODS),
        strict=False,
        description="selection methods clients may name, separated by commas",
    )
    default_method: Annotated[str, one_of((AUTO_METHOD, *METHODS))] = Field(
        default=AUTO_METHOD,
        description="the method of a request that names none; auto is the model family's own, or the first "
        "of the methods where that is not among them",
    )
    max_aggressiveness: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="most aggressiveness a request may have; beyond it 400, and the preset is no model name",
    )
    min_keep_ratio: float = Field(
        default=0.0, ge=0, le=1, description="smallest keep_ratio a request may have; below it 400"
    )
    min_kv_keep: float = Field(
        default=0.0, ge=0, le=1, description="smallest kv_keep a request may have; below it 400"
    )
    encoder_device: str = Field(
        default="auto", description="where tower and projector run: auto, cpu, cuda:0"
    )
    tower: Annotated[str, one_of(("in-process", "shared"))] = Field(
        default="in-process",
        description="in-process: each API process has a vision tower; shared: one process per GPU, or on a "
        "machine without one, holds the tower of all API processes",
    )
    encoder_dtype: str = Field(
        default="auto", description="their precision: auto (the model's), float32, bfloat16, float16"
    )
    text_tower: str = Field(
        default="",
        description="folder or Hugging Face id of the CLIP model that the vision tower is from: its text "
        "tower rates questions for methods that read them; without one the language model's embeddings do",
    )
    encoder_threads: int = Field(default=0, ge=0, description="the tower's CPU threads; 0 leaves it to torch")
    encoder_batch: int = Field(default=16, ge=1, description="most images in one pass of the tower")
    encoder_graphs: bool = Field(
        default=True,
        description="whether the tower's passes are captured as CUDA graphs, where it runs on a GPU and its "
        "pictures have one size",
    )
    feature_cache_gb: float = Field(
        default=1.0, ge=0, description="GiB per API process for cached tower outputs; 0 for no cache"
    )
    feature_cache_on: Annotated[str, one_of(("host", "device"))] = Field(
        default="host",
        description="where they are kept: host (pinned for a GPU), or device, out of the KV cache's memory",
    )
    # off, since a forged id would be answered with somebody else's picture
    trust_image_ids: bool = Field(
        default=False, description="whether a client's uuid or an EXIF image id may name a cached picture"
    )

    @model_validator(mode="before")
    @classmethod
    def _first_prune_layer(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        text, file = (values.get(name) for name in ("prune_layers", "prune_schedule"))
        if isinstance(file, str) and file.strip():
            if isinstance(text, str) and text.strip():
                raise ValueError("prune_schedule and prune_layers exclude each other: leave one out")
            # as for a name of a schedule below
            return {**values, "prune_layer": None}
        if not isinstance(text, str) or not text.strip():
            return values
        if is_reference(text):
            # what a name means is known with the model
            return {**values, "prune_layer": None}
        try:
            return {**values, "prune_layer": parse(text)[0].layer}
        except ScheduleError as error:
            raise ValueError(f"prune_layers: {error}") from error

    @model_validator(mode="after")
    def _default_method_is_offered(self) -> PolicyFields:
        if self.default_method not in (AUTO_METHOD, *self.methods):
            raise ValueError(
                f"default_method {self.default_method!r} is not among the methods {', '.join(self.methods)}"
            )
        return self

    @model_validator(mode="after")
    def _gate_has_a_prune_layer(self) -> PolicyFields:
        if self.prune_gate.strip() and not self.has_prune_layer:
            raise ValueError("prune_gate needs its prune layer among prune_layers, such as 3:vision=1")
        return self

    @model_validator(mode="after")
    def _reuse_has_what_it_needs(self) -> PolicyFields:
        if self.kv_reuse and not self.has_prune_layer:
            raise ValueError("kv_reuse needs a prune layer, such as prune_layer 8: leave it out without one")
        if self.kv_reuse and self.prune_gate.strip():
            raise ValueError(
                "kv_reuse cannot be used with prune_gate, whose decision is not known when blocks are looked "
                "up: leave one out"
            )
        return self

    @property
    def asks_for_pruning(self) -> bool:
        """Whether the operator wants something pruned that no client asks for."""
        return self.has_prune_layer or self.default_preset != "off"

    @property
    def shares_tower(self) -> bool:
        """Whether a process of its own holds the tower."""
        return self.tower == "shared"

    @property
    def has_prune_layer(self) -> bool:
        """Whether the second stage is on."""
        return self.prune_layer is not None or bool(self.named_schedule)

    @property
    def named_schedule(self) -> str:
        """The prune layers, the name or the file of a schedule; empty where there is none."""
        return self.prune_schedule.strip() or self.prune_layers.strip()

    @property
    def gate(self) -> tuple[int, str] | None:
        """Prune layer and file of the gate, of an engine that has one: the start-up check wrote the layer."""
        layer, _, path = self.prune_gate.partition("=")
        return (int(layer), path) if layer.isdigit() and path else None

    @cached_property
    def presets(self) -> Mapping[str, Preset]:
        """The presets, with this server's aggressiveness."""
        amounts = _amounts(self.preset_aggressiveness)
        own = {name: replace(PRESETS[name], aggressiveness=amount) for name, amount in amounts.items()}
        return {**PRESETS, **own}

    @property
    def relevances(self) -> tuple[str, ...]:
        """How each prune layer rates tokens; the last holds for the rest."""
        return tuple(self.relevance.split(","))

    @cached_property
    def schedule(self) -> tuple[PruneLayer, ...]:
        """The prune layers, of an engine that has them: names and files have been resolved by then."""
        if self.prune_layer is None:
            return ()
        return parse(self.prune_layers) if self.prune_layers.strip() else (PruneLayer(self.prune_layer),)
