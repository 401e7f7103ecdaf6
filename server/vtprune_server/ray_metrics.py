# SPDX-License-Identifier: Apache-2.0
"""The metrics of all replicas.

Through Serve a request for /metrics reaches one replica, another one each time: to Prometheus, counters that
jump. So every replica also serves its own metrics at a port of its own, written down in Ray's store (the
key-value table of the GCS), and

- `/metrics` answers for all replicas, each sample with the label `replica`;
- `/vtprune/metrics-targets` lists those ports for Prometheus's `http_sd_configs`, for clusters where one
  scrape of everything is too much.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import httpx
import ray
import uvicorn
from prometheus_client import CollectorRegistry, generate_latest
from ray.experimental import internal_kv
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from vtprune_server.exposition import merged

_NAMESPACE = b"vtprune_metrics"
#: A replica that does not answer within this time, in seconds, is left out and said to be down.
_TIMEOUT_SECONDS = 5.0
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ReplicaMetrics:
    """One replica's port for metrics, and the routes that speak for all of them.

    Args:
        replica: its full id, which is also its Ray actor's name.
    """

    def __init__(self, replica: str) -> None:
        self.replica = replica

    async def start(self, stack: contextlib.AsyncExitStack) -> None:
        """Listen on the node's address at a free port, and write that down; undone with the stack."""
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        registry: CollectorRegistry = get_prometheus_registry()

        async def own(_: Request) -> Response:
            return PlainTextResponse(generate_latest(registry), media_type=_CONTENT_TYPE)

        address = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, 0), family=family)
        app = Starlette(routes=[Route("/metrics", own)])
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        serving = asyncio.create_task(server.serve([listener]))
        port = listener.getsockname()[1]
        host = f"[{address}]" if ":" in address else address
        internal_kv._internal_kv_put(self.replica, f"{host}:{port}", namespace=_NAMESPACE)

        async def stop() -> None:
            internal_kv._internal_kv_del(self.replica, namespace=_NAMESPACE)
            server.should_exit = True
            await serving

        stack.push_async_callback(stop)

    def attach(self, app: Any) -> None:
        """Put `/metrics` and `/vtprune/metrics-targets` before the app's routes, inside its key check."""
        app.router.routes[:0] = [
            Route("/metrics", self._all),
            Route("/vtprune/metrics-targets", self._targets),
        ]

    async def _all(self, _: Request) -> Response:
        targets = await asyncio.to_thread(living_targets)
        async with httpx.AsyncClient(timeout=_TIMEOUT_SECONDS, trust_env=False) as client:
            texts = await asyncio.gather(*(_scrape(client, target) for target in targets.values()))
        return PlainTextResponse(
            merged({_short(replica): text for replica, text in zip(targets, texts, strict=True)}),
            media_type=_CONTENT_TYPE,
        )

    async def _targets(self, _: Request) -> Response:
        targets = await asyncio.to_thread(living_targets)
        return JSONResponse(
            [{"targets": [target], "labels": {"replica": _short(name)}} for name, target in targets.items()]
        )


def living_targets() -> dict[str, str]:
    """The replicas that run, by full id, and where each serves its metrics as ``host:port``."""
    actors = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    targets = {}
    for key in internal_kv._internal_kv_list(b"", namespace=_NAMESPACE):
        target = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
        if key.decode() in actors and target is not None:
            targets[key.decode()] = target.decode()
        else:  # killed, so that nobody took it out
            internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
    return dict(sorted(targets.items()))


async def _scrape(client: httpx.AsyncClient, target: str) -> str | None:
    with contextlib.suppress(httpx.HTTPError):
        response = await client.get(f"http://{target}/metrics")
        if response.status_code == 200:
            return response.text
    return None


def _short(replica: str) -> str:
    return replica.rsplit("#", 1)[-1]
