# SPDX-License-Identifier: Apache-2.0
"""Where an operator's settings come from: flags and variables (text), a YAML file, vLLM's configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    YamlConfigSettingsSource,
)
from yaml import YAMLError

from vllm_vtprune.errors import PolicyError
from vllm_vtprune.operator_model import OperatorModel, refusal

Model = TypeVar("Model", bound=OperatorModel)


@dataclass(frozen=True)
class Source:
    """One place that settings come from.

    Attributes:
        read: makes pydantic's source for a model.
        spelling: how the place spells a setting, for errors.
    """

    read: Callable[[type[BaseSettings]], PydanticBaseSettingsSource]
    spelling: Callable[[str], str]


def texts(values: Mapping[str, str], spelling: Callable[[str], str]) -> Source:
    """Settings given as text; lists are separated by commas.

    Args:
        values: text by setting.
        spelling: see `Source`.
    """

    def read(model: type[BaseSettings]) -> PydanticBaseSettingsSource:
        source = _Texts(model)
        source.env_vars = values
        return source

    return Source(read, spelling)


def values(given: Mapping[str, Any], spelling: Callable[[str], str] = str) -> Source:
    """Settings given as values, such as vLLM's own configuration holds."""
    return Source(lambda model: InitSettingsSource(model, dict(given)), spelling)


def yaml_file(path: Path) -> Source:
    """The settings of a YAML file of ``name: value`` lines.

    Raises:
        PolicyError: when read, if there is no such file.
    """

    def read(model: type[BaseSettings]) -> PydanticBaseSettingsSource:
        if not path.is_file():
            raise PolicyError(f"The policy file {path} cannot be read: there is no such file.")
        try:
            return YamlConfigSettingsSource(model, path)
        except (OSError, YAMLError, ValueError, TypeError) as error:
            raise PolicyError(
                f"The policy file {path} must hold `name: value` lines, in YAML: {error}"
            ) from error

    return Source(read, lambda name: f"{name} in {path}")


def gather(model: type[Model], *sources: Source) -> Model:
    """Read a model's settings; of a setting that stands in several sources the first one's holds.

    Raises:
        PolicyError: a value that cannot work, or a file that cannot be read; the message names it as its
            source spells it.
    """
    read: list[PydanticBaseSettingsSource] = []

    class Gathered(model, BaseSettings):  # type: ignore[valid-type,misc]
        @classmethod
        def settings_customise_sources(  # type: ignore[override]
            cls, settings_cls: type[BaseSettings], **_: PydanticBaseSettingsSource
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            read.extend(source.read(settings_cls) for source in sources)
            return tuple(read)

    def spelt(name: str) -> str:
        return next((s.spelling(name) for s, r in zip(sources, read, strict=True) if name in r()), name)

    try:
        gathered = Gathered()
    except ValidationError as error:
        raise refusal(error, model, spelt) from error
    return part_of(gathered, model)


def part_of(settings: OperatorModel, model: type[Model]) -> Model:
    """The settings of a model out of those of a larger one."""
    return model(**{name: getattr(settings, name) for name in model.model_fields})


class _Texts(EnvSettingsSource):
    def prepare_field_value(
        self, field_name: str, field: FieldInfo, value: Any, value_is_complex: bool
    ) -> Any:
        if isinstance(value, str) and get_origin(field.annotation) is tuple:
            return [part.strip() for part in value.split(",") if part.strip()]
        # a strict model's numbers and truth values are read out of text here
        return super().prepare_field_value(field_name, field, value, value_is_complex)
