# SPDX-License-Identifier: Apache-2.0
"""What all models of an operator's settings have in common, and what pydantic finds in them as sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from vllm_vtprune.errors import PolicyError


class OperatorModel(BaseModel):
    """Settings of an operator: of the types they are declared with, under the names there are."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def one_of(names: Iterable[str]) -> AfterValidator:
    """Of a setting that must be one of some names."""

    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}, not {value!r}")
        return value

    return AfterValidator(check)


def refusal(
    error: ValidationError, model: type[OperatorModel], source: Callable[[str], str] = str
) -> PolicyError:
    """What pydantic found, as sentences.

    Args:
        error: pydantic's.
        model: what was read.
        source: from a setting's name to where it was set, e.g. ``--vtprune-window``.
    """
    return PolicyError(" ".join(_sentence(one, model, source) for one in error.errors()))


_MUST_BE = {"int": "a whole number", "float": "a number", "finite": "a number", "bool": "true or false"}
_MUST_BE |= {"string": "text", "tuple": "a list"}


def _sentence(error: ErrorDetails, model: type[OperatorModel], source: Callable[[str], str]) -> str:
    if not error["loc"]:
        return error["msg"].removeprefix("Value error, ").removesuffix(".") + "."
    name, value, bounds = str(error["loc"][0]), error["input"], error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return f"Unknown setting {source(name)}: the settings are {', '.join(model.model_fields)}."
    if error["type"] == "value_error":
        return f"{source(name)} {error['msg'].removeprefix('Value error, ')}."
    if "ge" in bounds:
        must = f"must be at least {bounds['ge']}"
    elif "le" in bounds:
        must = f"must be at most {bounds['le']}"
    elif error["type"].split("_")[0] in _MUST_BE:
        must = f"must be {_MUST_BE[error['type'].split('_')[0]]}"
    else:
        must = error["msg"].replace("Input should", "must", 1)
    return f"{source(name)} {must}, not {value!r}."
