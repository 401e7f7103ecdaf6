# SPDX-License-Identifier: Apache-2.0
"""The contract's words, each once: what a request may ask for, by header or body field, and the presets.

Parsing, OpenAPI, the names in errors, the documents' tables and the tools that send headers all read
`FIELDS`. Nothing here knows of vLLM or torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from vllm_vtprune.errors import SettingsError

KVScope = Literal["all", "vision"]
HEADER_PREFIX = "x-vtprune-"
#: The key of the body's object; under it the settings travel in `mm_processor_kwargs` and
#: `SamplingParams.extra_args`, too.
KWARG = "vtprune"


@dataclass(frozen=True, slots=True)
class Preset:
    """A whole set of settings under one name.

    Attributes:
        aggressiveness: of the cut; a request's own replaces it, and `max_share` with it.
        kv_keep: applies where the server has a prune layer, at the first turn of a conversation alone
            unless the operator says otherwise (`policy.PrunePolicy.preset_kv_keep`, `kv_reuse`).
        max_share: of each image no more than this share stays.
    """

    aggressiveness: float
    kv_keep: float = 1.0
    max_share: float = 1.0


#: The aggressiveness keeps a third, 22 % and 11 % of the tokens on average over the validation split of the
#: demo model's scenes; other pictures and towers keep other shares. kv_keep then costs 0.3, 0.8 and 5 points
#: there, and a quarter 4 to 12 (docs/evaluation.md).
#:
#: A curve without a long tail has no knee, and a cut of it can keep everything: photographs did so at `light`
#: in the demo model's tower. max_share bounds a preset at half again the share it is calibrated to, so that
#: its name is a promise on any picture. A ceiling was chosen rather than a calibration picture by picture,
#: which would keep as much of a plain picture as of a crowded one and give up what the curve is for.
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "off": Preset(aggressiveness=0.0),
        "light": Preset(aggressiveness=0.23, kv_keep=0.75, max_share=0.5),
        "balanced": Preset(aggressiveness=0.54, kv_keep=0.5, max_share=0.33),
        "aggressive": Preset(aggressiveness=0.7, kv_keep=0.5, max_share=0.165),
    }
)
#: The preset of those above that the load demands, on a server (`vtprune_server.auto`).
AUTO = "auto"
#: How metrics and logs call settings that are no preset's.
CUSTOM = "custom"
#: The response header that says which preset `auto` was.
LEVEL_HEADER = "X-VTPrune-Level"


@dataclass(frozen=True, slots=True)
class ContractField:
    """One thing a request may say.

    Attributes:
        name: key in the body's `vtprune` object, and of the offline helper.
        header: the request header that carries it.
        description: what it means, in one line of Markdown.
        bounds: of a number; None for a word.
        choices: the words there are; empty where the server's policy knows them.
        most: how many numbers there may be, separated by commas in a header, a list in a body.
    """

    name: str
    header: str
    description: str
    bounds: Literal["[0, 1]", "(0, 1]"] | None = None
    choices: tuple[str, ...] = ()
    most: int = 1

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of a value, for OpenAPI."""
        if self.bounds is None:
            return {"type": "string", **({"enum": list(self.choices)} if self.choices else {})}
        least = "minimum" if self.bounds.startswith("[") else "exclusiveMinimum"
        number = {"type": "number", least: 0, "maximum": 1}
        if self.most == 1:
            return number
        return {"anyOf": [number, {"type": "array", "items": number, "minItems": 1, "maxItems": self.most}]}

    def parse(self, value: Any, name: str, *, text: bool) -> Any:
        """A value as the client sent it, checked: a number, a word in lower case, or a tuple of numbers.

        Args:
            value: a header's text, or a JSON value.
            name: the header or body field to blame.
            text: whether a number comes as text.

        Raises:
            SettingsError: it is none of the field's values.
        """
        if self.bounds is not None and self.most > 1:
            return self._numbers(value, name, text=text)
        if self.bounds is not None:
            return self._number(value, name, text=text)
        if not isinstance(value, str):
            raise SettingsError(f"{name} must be a string, not {kind_of(value)}.", name)
        word = value.strip().lower()
        if self.choices and word not in self.choices:
            raise SettingsError(f"{name} must be one of {', '.join(self.choices)}, not {clip(word)!r}.", name)
        return word

    def _numbers(self, value: Any, name: str, *, text: bool) -> tuple[float, ...]:
        values = [value]
        if text:
            values = [part.strip() for part in value.split(",")]
        elif isinstance(value, list | tuple):
            values = list(value)
        if not 1 <= len(values) <= self.most:
            raise SettingsError(f"{name} must be 1 to {self.most} numbers, not {len(values)}.", name)
        return tuple(self._number(one, name, text=text) for one in values)

    def _number(self, value: Any, name: str, *, text: bool) -> float:
        number = math.nan
        if text:
            # float() takes '1_0', which no HTTP client means as a number
            with suppress(ValueError):
                number = float(value) if "_" not in value else math.nan
        elif isinstance(value, int | float) and not isinstance(value, bool):
            # an int too large for a float is out of range all the same
            number = float(value) if abs(value) <= 2 else math.inf
        else:
            raise SettingsError(f"{name} must be a number in {self.bounds}, not {kind_of(value)}.", name)
        low_ok = number >= 0.0 if self.bounds == "[0, 1]" else number > 0.0
        if not (low_ok and number <= 1.0):  # NaN fails both comparisons
            raise SettingsError(f"{name} must be a number in {self.bounds}, not {clip(str(value))}.", name)
        return number + 0.0  # -0.0 becomes 0.0


FIELDS: Mapping[str, ContractField] = MappingProxyType(
    {
        field.name: field
        for field in (
            ContractField(
                "preset",
                "X-VTPrune-Preset",
                "`off`, `light`, `balanced` or `aggressive`: a whole set of settings; `auto`: the one "
                "that the load demands",
                choices=(*PRESETS, AUTO),
            ),
            ContractField(
                "aggressiveness",
                "X-VTPrune-Aggressiveness",
                "0 to 1: 0 keeps everything, 0.5 cuts at the knee, 1 keeps the minimum",
                bounds="[0, 1]",
            ),
            ContractField(
                "keep_ratio",
                "X-VTPrune-Keep-Ratio",
                "above 0, up to 1: a fixed share of each image instead of the inflection point",
                bounds="(0, 1]",
            ),
            ContractField("method", "X-VTPrune-Method", "a selection method's name; default `inflection`"),
            ContractField(
                "kv_keep",
                "X-VTPrune-KV-Keep",
                "0 to 1: share of the prompt kept above the prune layer, or one for each prune layer; 1 "
                "drops nothing there, 0 every visual token",
                bounds="[0, 1]",
                most=4,
            ),
            ContractField(
                "kv_scope",
                "X-VTPrune-KV-Scope",
                "`all`: every token competes; `vision`: text tokens stay",
                choices=get_args(KVScope),
            ),
            ContractField(
                "kv_gate",
                "X-VTPrune-KV-Gate",
                "`off`: a server's trained gate does not decide on this request; default `on`",
                choices=("on", "off"),
            ),
            ContractField(
                "kv_reuse",
                "X-VTPrune-KV-Reuse",
                "`off`: a later turn does not go on from what the first one kept, where a server offers it; "
                "default `on`",
                choices=("on", "off"),
            ),
        )
    }
)
#: Field of the contract -> header that carries it.
HEADERS: Mapping[str, str] = MappingProxyType({name: field.header for name, field in FIELDS.items()})


def body_schema() -> dict[str, Any]:
    """The JSON schema of the body's `vtprune` object; null counts as absent, for the whole too."""
    properties = {
        name: {"anyOf": [field.schema, {"type": "null"}], "description": field.description}
        for name, field in FIELDS.items()
    }
    return {
        "anyOf": [
            {"type": "object", "additionalProperties": False, "properties": properties},
            {"type": "null"},
        ]
    }


def header_parameters() -> list[dict[str, Any]]:
    """The request headers as OpenAPI's `parameters`."""
    return [
        {
            "name": field.header,
            "in": "header",
            "required": False,
            "description": field.description,
            "schema": field.schema,
        }
        for field in FIELDS.values()
    ]


def clip(text: str, limit: int = 60) -> str:
    """A client's text, shortened for an error."""
    return text if len(text) <= limit else text[:limit] + "..."


def kind_of(value: Any) -> str:
    """What a JSON value is, for an error."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
