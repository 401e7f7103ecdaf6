# SPDX-License-Identifier: Apache-2.0
"""The operator's policy and limits from flags, environment and a YAML file.

Each field of `PrunePolicy` and `ServerLimits` is a flag ``--vtprune-<field>``, a variable ``VTPRUNE_<FIELD>``
and a key of the file. A flag wins over the environment, the environment over the file, and all of them over
``--additional-config``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vllm_vtprune.policy import CONFIG_KEY, PolicyError, PrunePolicy
from vtprune_server.limits import ENV_PREFIX, ServerLimits, parse_text

_DEST = "vtprune_"
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
    "max_body_mb": "largest request body in MiB (0: no limit)",
    "max_images": "images per prompt",
    "max_image_megapixels": "largest decoded image, in millions of pixels",
    "media_domains": "hosts an image_url may name, separated by commas (empty: every public one)",
    "allow_private_media": "whether an image_url may lead to a private or loopback address: true or false",
    "log_requests": "whether each request is logged as a JSON line, without its content: true or false",
}
_Field = dataclasses.Field[Any]
_POLICY: tuple[_Field, ...] = dataclasses.fields(PrunePolicy)
_LIMITS: tuple[_Field, ...] = dataclasses.fields(ServerLimits)


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser."""
    group = parser.add_argument_group("vtprune", "Pruning policy and limits")
    for field in (*_POLICY, *_LIMITS):
        flags = [_flag(field)]
        if field.name == "prune_layer":
            flags.insert(0, "--prune-layer")
        group.add_argument(
            *flags,
            dest=_DEST + field.name,
            metavar=field.name.rsplit("_", 1)[-1].upper(),
            help=f"{_HELP[field.name]}; default {_shown(field.default)}",
        )
    group.add_argument("--vtprune-config", metavar="FILE", help="YAML file with any of the above")


def policy_from_options(
    args: argparse.Namespace, environ: Mapping[str, str], additional_config: Mapping[str, Any] | None = None
) -> tuple[PrunePolicy, ServerLimits]:
    """Gather policy and limits.

    Args:
        args: parsed by a parser that `add_policy_options` extended.
        environ: usually `os.environ`.
        additional_config: vLLM's own; its ``vtprune`` entry is the weakest source, of the policy alone.

    Raises:
        PolicyError: a value that cannot work, or a file that cannot be read; the message names it.
    """
    policy: dict[str, Any] = dict((additional_config or {}).get(CONFIG_KEY) or {})
    limits: dict[str, Any] = {}
    limit_names = {field.name for field in _LIMITS}
    path = args.vtprune_config or environ.get(ENV_PREFIX + "CONFIG")
    for name, value in (_from_file(Path(path)) if path else {}).items():
        (limits if name in limit_names else policy)[name] = value
    for values, fields in ((policy, _POLICY), (limits, _LIMITS)):
        for field in fields:
            variable = ENV_PREFIX + field.name.upper()
            for source, text in (
                (variable, environ.get(variable)),
                (_flag(field), getattr(args, _DEST + field.name)),
            ):
                if text is not None:
                    values[field.name] = parse_text(str(field.type), text, source)
    return PrunePolicy.from_config({CONFIG_KEY: policy}), ServerLimits(**limits)


def _flag(field: _Field) -> str:
    return f"--vtprune-{field.name.replace('_', '-')}"


def _from_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise PolicyError(f"The policy file {path} cannot be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise PolicyError(f"The policy file {path} must hold `name: value` lines.")
    known = {field.name for field in (*_POLICY, *_LIMITS)}
    for name in content:
        if name not in known:
            raise PolicyError(f"Unknown key {name!r} in {path}; the keys are {', '.join(sorted(known))}.")
    return content


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return "all" if default else "empty"
    if isinstance(default, bool):
        return str(default).lower()
    return "off" if default is None else str(default)
