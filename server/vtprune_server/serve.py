# SPDX-License-Identifier: Apache-2.0
"""`vtprune serve [MODEL] [any vLLM flag]`: vLLM's server with the plugin loaded, and a default model.

vLLM's own `vllm` script works too where it runs (``VLLM_PLUGINS=vtprune vllm serve MODEL``); this command
adds the embedded model, the policy's flags, and errors as sentences.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_vtprune import demo_model
from vllm_vtprune.compat import (
    check_cpu_kernels,
    check_front_end,
    check_hooks,
    check_vllm_version,
    serve_parser,
)
from vllm_vtprune.errors import UnsupportedError
from vtprune_server.ready_hint import announce_when_ready

if TYPE_CHECKING:
    from argparse import Namespace


def main(rest: list[str]) -> int:
    """Run `vtprune serve` with these arguments.

    Returns:
        The exit status: 0, or 2 with one sentence on standard error when something cannot work.
    """
    if {"-h", "--help"} & set(rest):
        from vtprune_server.serve_help import serve_help

        print(serve_help(), end="")
        return 0
    prepare_environment()
    try:
        check_vllm_version()
        check_front_end()
        check_hooks()
        check_cpu_kernels()
    except UnsupportedError as error:
        return _refuse(error)

    from vllm.entrypoints.cli.serve import ServeSubcommand

    try:
        args = parse(rest)
        if args.served_model_name and demo_model.embedded(args.model_tag or ""):
            announce_when_ready(args, demo_model.EXAMPLE, demo_model.QUESTION)
        ServeSubcommand().cmd(args)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return _refuse(reason(error))
        return _refuse(f"Port {args.port} is taken: stop what listens there, or choose another by --port.")
    except (ValueError, TypeError) as error:
        return _refuse(reason(error))
    except KeyboardInterrupt:
        return 130
    return 0


def parse(rest: list[str]) -> Namespace:
    """Read the arguments of `vtprune serve` into those of vLLM's server, the policy among them.

    Sets the variables that vLLM's processes read: after `prepare_environment`, before an engine.

    Args:
        rest: the command line after `vtprune serve`.

    Raises:
        ValueError: a flag or a setting that cannot work, in a sentence; vLLM's own may be a TypeError, and a
            file that cannot be read is an OSError.
        SystemExit: argparse's, for an unknown flag, a value it cannot read or `--help`.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import init_logger
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_vtprune.policy import CONFIG_KEY
    from vtprune_server.limits import apply_to_vllm
    from vtprune_server.options import add_policy_options, policy_from_options

    init_logger(__name__)
    make_arg_parser, cli_env_setup = serve_parser()
    cli_env_setup()
    parser = make_arg_parser(
        FlexibleArgumentParser(prog="vtprune serve", usage="vtprune serve [MODEL] [options]")
    )
    add_policy_options(parser)
    args: Namespace = parser.parse_args(rest)
    if args.model_tag is None and not _given(rest, "--model") and not _given(rest, "--config"):
        args.model_tag = "demo"
    if demo := demo_model.NAMES.get(args.model_tag):
        _use_demo_model(args, rest, demo)
    _check_folder(args.model_tag)
    policy, limits = policy_from_options(args, os.environ, args.additional_config)
    args.additional_config = {**(args.additional_config or {}), CONFIG_KEY: policy.to_config()}
    limits.export(os.environ)
    apply_to_vllm(limits, args, flags_given(rest), os.environ)
    ServeSubcommand().validate(args)
    return args


def _check_folder(model: str | None) -> None:
    """Refuse a folder that is not there, which vLLM would take for the id of a repository."""
    if model is None or Path(model).exists():
        return
    # an id is `name` or `owner/name`
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {model}: check the path, or name a Hugging Face id.")


def _use_demo_model(args: Any, rest: list[str], demo: demo_model.DemoModel) -> None:
    """An embedded model, with settings that suit it on a machine without an accelerator."""
    from vllm_vtprune.policy import CONFIG_KEY

    args.model = args.model_tag = str(demo.folder)
    defaults: dict[str, Any] = {
        "served_model_name": [demo.served_name],
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "dtype": "float32",
        # the model is too small for compiling to pay, and compiling needs a C++ compiler
        "enforce_eager": True,
    }
    if not demo.videos:
        defaults["limit_mm_per_prompt"] = {"video": 0}
    for name, value in defaults.items():
        if not _given(rest, "--" + name.replace("_", "-")):
            setattr(args, name, value)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # the weakest source of the policy: flag, environment and file win
    given = (args.additional_config or {}).get(CONFIG_KEY) or {}
    policy = {"prune_layer": demo.prune_layer, **given}
    args.additional_config = {**(args.additional_config or {}), CONFIG_KEY: policy}


def prepare_environment() -> None:
    """Set what must be set before vLLM is imported or starts a process."""
    # one list filters all of vLLM's plugin groups, and endpoint plugins load only when named in it
    names = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join([*names, *(["vtprune"] if "vtprune" not in names else [])])
    if not _cpu_build():
        return
    # The tower's threads shall sleep while they wait for each other: spinning, they take the cores that the
    # engine decodes on. libgomp reads this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    # vLLM compiles some functions when a request first needs them, logprobs among them
    # (`vllm.v1.sample.ops.logprobs.batched_count_greater_than`): without the C++ compiler that torch then
    # calls, that request ends the engine. Not compiled they do the same.
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # vLLM's CPU workers run faster on Intel's OpenMP, which the CPU wheel depends on; children inherit this
    openmp = _intel_openmp()
    preload = os.environ.get("LD_PRELOAD", "")
    # one OpenMP library is enough; with two of them vLLM refuses to start
    if openmp is not None and not any(name in preload for name in ("libiomp", "libomp", "libgomp")):
        os.environ["LD_PRELOAD"] = f"{openmp}:{preload}".rstrip(":")


def _cpu_build() -> bool:
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def _intel_openmp() -> Path | None:
    """The library where its package is installed, which need not be the environment that runs."""
    try:
        files = distribution("intel-openmp").files or []
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())).resolve() for file in files if file.name == "libiomp5.so"), None)


def flags_given(rest: list[str]) -> frozenset[str]:
    """The flags given, in their spelling with dashes and without the keys of JSON flags (``--flag.key``)."""
    return frozenset(
        argument.split("=")[0].split(".")[0].replace("_", "-")
        for argument in rest
        if argument.startswith("--")
    )


def _given(rest: list[str], flag: str) -> bool:
    return flag in flags_given(rest)


def reason(error: Exception) -> str:
    """The sentence of whatever refused; vLLM's configuration classes wrap it in a `ValidationError`."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(str(one.get("msg", one)).removeprefix("Value error, ") for one in error.errors())


def _refuse(reason: object) -> int:
    # the engine's own errors begin with it too, since offline nothing else says where they come from
    print(f"vtprune: {str(reason).removeprefix('vtprune: ')}", file=sys.stderr)
    return 2
