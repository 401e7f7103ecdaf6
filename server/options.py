# SPDX-License-Identifier: Apache-2.0
"""The operator's policy from flags, environment and a YAML file.

Each field of `PrunePolicy` is a flag ``--vtprune-<field>`` and a variable ``VTPRUNE_<FIELD>``; a flag wins over
the environment, the environment over the file, and all of them over ``--additional-config``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vllm_vtprune.policy import CONFIG_KEY, PolicyError, PrunePolicy

_PREFIX = "vtprune_"
_HELP = {
    "prune_layer": "decoder layer K of the second stage (off unless given)",
    "window": "last prompt tokens whose queries rate the others, and which always stay",
    "relevance": "how the second stage rates tokens: attention, last_token or no_rope",
    "score": "what ranks vision tokens: cosine, cls_attention or received",
    "min_tokens": "vision tokens every image keeps at least",
    "default_preset": "preset of a request that says nothing",
    "max_aggressiveness": "the most aggressiveness a client may ask for",
    "min_keep_ratio": "the smallest keep_ratio a client may ask for",
    "min_kv_keep": "the smallest kv_keep a client may ask for",
    "client_controls": "whether clients may choose their settings: true or false",
    "methods": "selection methods clients may name, separated by commas",
    "encoder_device": "device of the vision tower: auto, cpu, cuda:0, ...",
    "encoder_dtype": "precision of the vision tower: auto, float32, bfloat16 or float16",
    "encoder_threads": "CPU threads of the vision tower (0: torch's choice)",
    "encoder_batch": "most images in one pass of the vision tower",
    "trust_image_ids": "whether a client's uuid or an EXIF image id may name a cached picture: true or false",
    "feature_cache_gb": "GiB per API process for cached tower outputs",
}


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """Add the policy's flags to a parser."""
    group = parser.add_argument_group("vtprune", "Pruning policy")
    for field in dataclasses.fields(PrunePolicy):
        flags = [f"--vtprune-{field.name.replace('_', '-')}"]
        if field.name == "prune_layer":
            flags.insert(0, "--prune-layer")
        group.add_argument(
            *flags,
            dest=_PREFIX + field.name,
            metavar=field.name.rsplit("_", 1)[-1].upper(),
            help=f"{_HELP[field.name]}; default {_shown(field.default)}",
        )
    group.add_argument("--vtprune-config", metavar="FILE", help="YAML file with any of the above")


def policy_from_options(
    args: argparse.Namespace, environ: Mapping[str, str], additional_config: Mapping[str, Any] | None = None
) -> PrunePolicy:
    """Gather the policy.

    Args:
        args: parsed by a parser that `add_policy_options` extended.
        environ: usually `os.environ`.
        additional_config: vLLM's own; its ``vtprune`` entry is the weakest source.

    Raises:
        PolicyError: a value that cannot work, or a file that cannot be read; the message names it.
    """
    values: dict[str, Any] = dict((additional_config or {}).get(CONFIG_KEY) or {})
    path = args.vtprune_config or environ.get("VTPRUNE_CONFIG")
    if path:
        values |= _from_file(Path(path))
    for field in dataclasses.fields(PrunePolicy):
        variable = (_PREFIX + field.name).upper()
        for source, text in (
            (variable, environ.get(variable)),
            (f"--vtprune-{field.name.replace('_', '-')}", getattr(args, _PREFIX + field.name)),
        ):
            if text is not None:
                values[field.name] = _value(field, text, source)
    return PrunePolicy.from_config({CONFIG_KEY: values})


def _from_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise PolicyError(f"The policy file {path} cannot be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise PolicyError(f"The policy file {path} must hold `name: value` lines.")
    return content


def _value(field: dataclasses.Field[Any], text: str, source: str) -> Any:
    kind = str(field.type)
    text = text.strip()
    if kind == "int | None" and text.lower() in ("", "none", "off"):
        return None
    if kind == "bool":
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise PolicyError(f"{source} must be true or false, not {text!r}.")
    try:
        if kind.startswith("int"):
            return int(text)
        if kind == "float":
            return float(text)
    except ValueError as error:
        raise PolicyError(f"{source} must be a number, not {text!r}.") from error
    return (
        tuple(name.strip() for name in text.split(",") if name.strip()) if kind.startswith("tuple") else text
    )


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return "all"
    return (
        {None: "off", True: "true", False: "false"}.get(default, str(default))
        if default is None or isinstance(default, bool)
        else str(default)
    )
