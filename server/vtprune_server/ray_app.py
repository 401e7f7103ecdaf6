# SPDX-License-Identifier: Apache-2.0
"""vtprune on Ray Serve: `import_path: vtprune_server.ray_app:app`, with Ray's `ray[serve]` 2.60.

Each replica is one vLLM engine with its whole server in front of it (`ray_replica`), so the contract is that
of `vtprune serve`. Replicas, resources and autoscaling are options of the deployment `VTPrune` in Serve's own
file; see deploy/ray/README.md. `ray.serve.llm` is something else: it drops the contract without a word.
"""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig, RequestRouterConfig
from ray.serve.exceptions import RayServeException

from vtprune_server.ray_replica import VTPruneReplica
from vtprune_server.serve import flags_given, parse, prepare_environment, reason

#: The deployment's name in Serve's file and status.
DEPLOYMENT = "VTPrune"

#: What the file's `deployments:` may replace, option by option.
_OPTIONS: dict[str, Any] = {
    # vLLM batches and queues by itself; what is beyond waits in the proxies, and beyond that is refused
    "max_ongoing_requests": 256,
    "max_queued_requests": 512,
    "backpressure_config": BackpressureConfig(status_code=503, retry_after_s=2),
    # the same session id, which is a picture's digest, goes to the same replica; the next one if that is full
    "request_router_config": RequestRouterConfig(
        request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
    ),
    # the second line behind the replica's own watchdog: three failed checks, and Serve replaces it
    "health_check_period_s": 5,
    "health_check_timeout_s": 30,
    # as long as a request may take: Serve waits for those in flight before it stops a replica
    "graceful_shutdown_timeout_s": 120,
    "graceful_shutdown_wait_loop_s": 1,
    # a model that cannot be loaded is said after this many tries, not after twenty
    "max_constructor_retry_count": 3,
    "ray_actor_options": {"num_cpus": 1},
}

#: Flags that mean nothing inside a replica, and what to use in their place.
_NOT_HERE = {
    **dict.fromkeys(
        ("--host", "--port", "--uds", "--root-path"),
        "whose proxies listen: use http_options in Serve's file",
    ),
    **dict.fromkeys(
        ("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--ssl-cert-reqs", "--ssl-ciphers"),
        "whose proxies listen: end TLS before them",
    ),
    **dict.fromkeys(
        ("--headless", "--api-server-count", "--data-parallel-size", "-dp", "--data-parallel-rank"),
        "where a replica is one engine: raise num_replicas",
    ),
    "--api-key": "where it would stand in the file and on the dashboard: set VLLM_API_KEY on every node",
}


def app(args: Mapping[str, Any]) -> Application:
    """Build the application; what Serve's file calls by `import_path`.

    Args:
        args: `flags`: the arguments of `vtprune serve`, as a list or as one line of a shell; without a model
            the embedded demo model.

    Raises:
        RayServeException: flags that cannot work, in a sentence. Serve shows it as the application's status;
            after any other exception it would try again.
    """
    try:
        flags = checked_flags(args)
    except (ValueError, TypeError, OSError) as error:
        raise RayServeException(reason(error)) from error
    replica = serve.ingress()(VTPruneReplica)
    return serve.deployment(replica, name=DEPLOYMENT, **_OPTIONS).bind(flags)


def checked_flags(args: Mapping[str, Any]) -> list[str]:
    """Read the flags as a replica will, so that a mistake is seen before any replica starts.

    Raises:
        ValueError: flags that cannot work, in a sentence; a TypeError or OSError where vLLM raises those.
    """
    unknown = sorted(set(args) - {"flags"})
    if unknown:
        raise ValueError(
            f"Unknown argument {unknown[0]!r} of vtprune_server.ray_app:app: it takes `flags`, the arguments "
            "of `vtprune serve`."
        )
    given = args.get("flags") or []
    flags = shlex.split(given) if isinstance(given, str) else [str(flag) for flag in given]
    for flag in sorted(flags_given(flags) | ({"-dp"} & set(flags))):
        if flag in _NOT_HERE:
            raise ValueError(f"{flag} cannot be used on Ray Serve, {_NOT_HERE[flag]}.")
    prepare_environment()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse(flags)
    except SystemExit:
        # argparse prints its sentence after the usage
        sentence = said.getvalue().strip().rsplit("error: ", 1)[-1]
        raise ValueError(f"The flags of `vtprune serve` cannot be read: {sentence}") from None
    return flags
