# SPDX-License-Identifier: Apache-2.0
"""The operator's policy and limits from flags, environment and a YAML file.

Each field of `PrunePolicy` and `ServerLimits` is a flag ``--vtprune-<field>``, a variable ``VTPRUNE_<FIELD>``
and a key of the file. A flag wins over the environment, the environment over the file, and all of them over
``--additional-config``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_vtprune.errors import PolicyError
from vllm_vtprune.policy import CONFIG_KEY, PrunePolicy
from vtprune_server.limits import ENV_PREFIX, ServerLimits, variables
from vtprune_server.sources import gather, part_of, texts, values, yaml_file

_DEST = "vtprune_"
#: Settings whose flag goes without the project's name, too.
_SHORT = ("prune_layer", "prune_layers", "prune_schedule", "prune_gate")


# pydantic lists the fields of the last base first
class OperatorSettings(ServerLimits, PrunePolicy):
    """Policy and limits together, as flags, variables and the file name them."""


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser."""
    group = parser.add_argument_group("vtprune", "Pruning policy and limits")
    group.add_argument(
        "--vtprune-config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML file with any of the settings below, by the flags' names without --vtprune-",
    )
    for name, field in OperatorSettings.model_fields.items():
        group.add_argument(
            *([flag(name), f"--vtprune-{_dashed(name)}"] if name in _SHORT else [flag(name)]),
            dest=_DEST + name,
            metavar=name.rsplit("_", 1)[-1].upper(),
            default=argparse.SUPPRESS,
            help=f"{field.description} (default: {shown(field.default)})",
        )


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--{_dashed(name)}" if name in _SHORT else f"--vtprune-{_dashed(name)}"


def shown(default: Any) -> str:
    """A default, as flags and documents write it."""
    if isinstance(default, tuple):
        return "all" if default else "none"
    if isinstance(default, bool):
        return str(default).lower()
    return "off" if default in (None, "") else f"{default:g}" if isinstance(default, float) else str(default)


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
    config = dict((additional_config or {}).get(CONFIG_KEY) or {})
    if limits := ServerLimits.model_fields.keys() & config:
        raise PolicyError(
            f'additional_config["{CONFIG_KEY}"] holds the policy alone: set {", ".join(sorted(limits))} by '
            f"{', '.join(map(flag, sorted(limits)))}."
        )
    given = {name.removeprefix(_DEST): value for name, value in vars(args).items() if name.startswith(_DEST)}
    path = given.pop("config", None) or environ.get(ENV_PREFIX + "CONFIG")
    settings = gather(
        OperatorSettings,
        texts(given, flag),
        variables(environ),
        *([yaml_file(Path(path))] if path else []),
        values(config, lambda name: f'additional_config["{CONFIG_KEY}"]["{name}"]'),
    )
    return part_of(settings, PrunePolicy), part_of(settings, ServerLimits)


def _dashed(name: str) -> str:
    return name.replace("_", "-")
