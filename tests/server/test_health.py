# SPDX-License-Identifier: Apache-2.0
"""`/health` with a tower elsewhere: vLLM's own application with the plugin in it, no engine and no tower."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from vtprune_server.health import TowerHealth


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_vtprune.compat import serve_parser

    make_arg_parser, _ = serve_parser()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "vtprune")
        yield build_app(make_arg_parser(FlexibleArgumentParser()).parse_args([]), ("generate",))


class Engine:
    def __init__(self, dead: bool = False) -> None:
        self.dead = dead

    async def check_health(self) -> None:
        if self.dead:
            raise EngineDeadError()


class Tower:
    def __init__(self, pid: int | None) -> None:
        self.pid = pid
        self.revived = 0
        self.go = threading.Event()

    def state(self) -> dict[str, Any]:
        return {"pid": self.pid, "restarts": 2}

    def revive(self) -> None:
        self.revived += 1
        self.go.wait(20)
        self.pid = 8


async def health(app: Any, engine: Engine, tower: TowerHealth | None) -> httpx.Response:
    app.state.engine_client, app.state.vtprune_tower_health = engine, tower
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get("/health")


@pytest.mark.parametrize("dead,status", [(False, 200), (True, 503)])
async def test_without_a_shared_tower_it_is_vllms(app: Any, dead: bool, status: int) -> None:
    response = await health(app, Engine(dead), None)
    assert (response.status_code, response.content) == (status, b"")


async def test_it_tells_of_a_tower_that_runs(app: Any) -> None:
    response = await health(app, Engine(), TowerHealth(Tower(7)))  # type: ignore[arg-type]
    assert response.status_code == 200
    assert response.json() == {"tower": {"state": "running", "pid": 7, "restarts": 2}}
    dead = await health(app, Engine(dead=True), TowerHealth(Tower(7)))  # type: ignore[arg-type]
    assert (dead.status_code, dead.content) == (503, b"")


async def test_a_tower_that_is_gone_is_a_503_and_is_started_once(app: Any) -> None:
    tower = Tower(None)
    told = TowerHealth(tower)  # type: ignore[arg-type]
    for _ in range(3):
        response = await health(app, Engine(), told)
        assert response.status_code == 503
        assert response.json()["tower"] == {"state": "restarting", "pid": None, "restarts": 2}
    assert tower.revived == 1
    tower.go.set()
    while tower.pid is None:
        pass
    assert (await health(app, Engine(), told)).status_code == 200
