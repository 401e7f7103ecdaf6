# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster over `nodes`, and vtprune deployed on it as deploy/ray/README.md says."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.conftest import REPOSITORY, WARM, python_path
from tests.deploy.nodes import Node, machines

FILES = REPOSITORY / "deploy" / "ray"
_BIN = Path(sys.executable).parent
_PORT = 8000
#: An update starts one engine after the other, each beside one that serves.
_START_SECONDS = 600

#: Asks for each path on its standard input: a process for each question would take a core by itself.
_ASK = """
import json, sys, urllib.request
for path in sys.stdin:
    try:
        headers = {"Authorization": "Bearer " + sys.argv[2]}
        request = urllib.request.Request(sys.argv[1] + path.strip(), headers=headers)
        answer = {"text": urllib.request.urlopen(request, timeout=20).read().decode()}
    except Exception as error:
        answer = {"error": repr(error)}
    print(json.dumps(answer))
"""


class RayCluster:
    """A head and its workers.

    Args:
        nodes: the machines, the head's first.
        folder: for logs and the token; short, since Ray puts sockets below it.
        warm: the socket of `warm_process`.
        env: of every node, beside deploy/ray/node.env.
    """

    def __init__(self, nodes: list[Node], folder: Path, warm: Path, env: Mapping[str, str]) -> None:
        self.nodes = nodes
        self.folder = folder
        self.warm = warm
        self.token = secrets.token_hex(32)
        self.deployed: dict[str, Any] = {}
        self._asking: subprocess.Popen[bytes] | None = None
        (folder / "token").write_text(self.token)
        self.env = {
            **os.environ,
            **node_environment(),
            # Ray's workers are at 15 otherwise: beside anything else that runs, an engine would hardly start
            "RAY_worker_niceness": "0",
            **env,
            WARM: str(warm),
            "RAY": str(_BIN / "ray"),
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            # the checkout's packages, wherever the environment's install points
            "PYTHONPATH": python_path(REPOSITORY, REPOSITORY / "server"),
        }
        if nodes[0].namespace is None:  # one host: the second proxy needs another port
            self.env["RAY_SERVE_WORKER_PROXY_HTTP_PORT"] = str(_PORT + 1)

    def url(self, node: int) -> str:
        """Serve's proxy on a node."""
        port = _PORT if node == 0 or self.nodes[0].namespace else _PORT + 1
        return f"http://{self.nodes[node].address}:{port}"

    def start_node(self, number: int) -> None:
        """`ray start` on a machine."""
        node, head = self.nodes[number], self.nodes[0].address
        where = ["--head", "--port", "6379", "--dashboard-host", "127.0.0.1"]
        if number:
            where = ["--address", f"{head}:6379"]
        with (self.folder / f"node{number}.log").open("ab") as log:
            node.start(
                # as an init system does: on a busy machine Ray gives up on a start after 30 s
                *("sh", "-c", 'until "$@"; do sleep 1; done', "sh"),
                *(str(_BIN / "ray"), "start", "--block", "--node-ip-address", node.address, *where),
                *("--num-cpus", "4", "--object-store-memory", "100000000"),
                *("--temp-dir", str(self.folder / f"n{number}")),
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def api(self, path: str) -> Any:
        """Ask the dashboard, from the head, where alone it listens."""
        if self._asking is None or self._asking.poll() is not None:
            command = (sys.executable, "-I", "-u", "-c", _ASK, "http://127.0.0.1:8265", self.token)
            self._asking = self.nodes[0].start(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._asking.stdin is not None and self._asking.stdout is not None
        self._asking.stdin.write(f"{path}\n".encode())
        self._asking.stdin.flush()
        answer = json.loads(self._asking.stdout.readline() or '{"error": "it has ended"}')
        if "error" in answer:
            raise ConnectionError(answer["error"])
        return json.loads(answer["text"])

    def nodes_alive(self) -> int:
        """How many nodes Ray counts."""
        nodes = self.api("/nodes?view=summary")["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def deploy(self, config: Mapping[str, Any]) -> None:
        """`serve deploy FILE` on the head; `deployed` is what was deployed last."""
        self.deployed = dict(config)
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(self.deployed))
        self.serve_command("deploy", str(file))

    def serve_command(self, *arguments: str) -> str:
        """`serve ARGUMENTS` on the head; what it prints."""
        command = self.nodes[0].command(str(_BIN / "serve"), *arguments)
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return done.stdout

    def serve(self, config: dict[str, Any], replicas: int = 2) -> float:
        """`deploy`, unless that is what was deployed last, and `wait_running`; the seconds it took."""
        if self.deployed != config:
            self.deploy(config)
        return self.wait_running(replicas)

    @property
    def flags(self) -> str:
        """Of `vtprune serve`, as deployed last: others would be a rolling update."""
        return str(self.deployed["applications"][0]["args"]["flags"]) if self.deployed else ""

    def application(self) -> dict[str, Any]:
        """Serve's details of the application `vtprune`."""
        details: dict[str, Any] = self.details()["applications"].get("vtprune", {})
        return details

    def details(self) -> dict[str, Any]:
        """Serve's details of everything."""
        details: dict[str, Any] = self.api("/api/serve/applications/")
        return details

    def replicas(self, state: str = "RUNNING") -> list[dict[str, Any]]:
        """Replicas in a state: their `pid`, `node_ip`, `replica_id`, ..."""
        deployment = self.application().get("deployments", {}).get("VTPrune", {})
        return [replica for replica in deployment.get("replicas", []) if replica["state"] == state]

    def running(self, replicas: int) -> bool:
        """Whether so many replicas run, no more and no fewer, each node of theirs with a proxy that answers.

        Raises:
            RuntimeError: the application cannot be deployed.
        """
        details = self.details()
        application = details["applications"].get("vtprune", {})
        if application.get("status") == "DEPLOY_FAILED":
            raise RuntimeError(application.get("message"))
        every = application.get("deployments", {}).get("VTPrune", {}).get("replicas", [])
        if application.get("status") != "RUNNING" or [r["state"] for r in every] != ["RUNNING"] * replicas:
            return False
        healthy = {node for node, proxy in details["proxies"].items() if proxy["status"] == "HEALTHY"}
        return healthy >= {replica["node_id"] for replica in every}

    def wait_running(self, replicas: int, timeout: float = _START_SECONDS) -> float:
        """Wait for `running`; the seconds it took."""
        return wait_until(lambda: self.running(replicas), timeout, self.describe)

    def describe(self) -> str:
        """Status and the ends of logs, for a failure's message."""
        said = [json.dumps(self.application(), indent=1)[-4000:]]
        for log in sorted(self.folder.glob("n*/session_latest/logs/serve/replica*.log")):
            said.append(f"--- {log}\n{log.read_text(errors='replace')[-1500:]}")
        return "\n".join(said)

    def engine_of(self, replica: dict[str, Any]) -> psutil.Process:
        """A replica's EngineCore process."""
        started = Path(f"{self.warm}.{replica['pid']}").read_text().splitlines()
        return psutil.Process(int(dict(line.split() for line in started)["EngineCore"]))

    def proxy_of(self, number: int) -> psutil.Process:
        """The process of Serve's proxy on a node."""
        port = httpx.URL(self.url(number)).port
        # psutil sees the sockets of its own network namespace only
        listening = self.nodes[number].command("ss", "-Hltnp", f"sport = :{port}")
        told = subprocess.run(listening, capture_output=True, text=True, check=True).stdout
        if found := re.search(r"pid=(\d+)", told):
            return psutil.Process(int(found[1]))
        raise LookupError("the node has no proxy")

    def logs(self) -> str:
        """What replicas have printed, on all nodes."""
        files = sorted(self.folder.glob("n*/session_latest/logs/*.err"))
        return "\n".join(file.read_text(errors="replace") for file in files)


def node_environment() -> dict[str, str]:
    """deploy/ray/node.env."""
    lines = (FILES / "node.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def serve_file(flags: str = "", **deployment: Any) -> dict[str, Any]:
    """deploy/ray/serve.yaml with other flags or options of the deployment."""
    config: dict[str, Any] = yaml.safe_load((FILES / "serve.yaml").read_text())
    (application,) = config["applications"]
    application["args"]["flags"] = flags
    application["deployments"][0] |= deployment
    return config


def wait_until(
    holds: Callable[[], bool], timeout: float, describe: Callable[[], str] = str, every: float = 0.5
) -> float:
    """Wait until something holds, and give the seconds; an error in between counts as no."""
    began, last = time.monotonic(), ""
    while time.monotonic() - began < timeout:
        try:
            if holds():
                return time.monotonic() - began
        except (httpx.HTTPError, OSError, LookupError, subprocess.SubprocessError) as error:
            last = repr(error)
        time.sleep(every)
    raise TimeoutError(f"not within {timeout} s; {last}\n{describe()}")


@contextmanager
def warm_process() -> Iterator[Path]:
    """A process that others are forked from (tests/helpers/site/warm_start.py): its socket's path."""
    with tempfile.TemporaryDirectory(prefix="vtpw") as folder:
        path = Path(folder, "socket")
        env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as Ray gives a replica of one CPU
        env["PYTHONPATH"] = python_path(REPOSITORY, REPOSITORY / "server")
        process = subprocess.Popen([sys.executable, "-m", "warm_start", str(path)], env=env)
        try:
            wait_until(lambda: path.exists() or process.poll() is not None, _START_SECONDS, every=0.1)
            if process.poll() is not None:
                raise RuntimeError(f"the process to fork from has ended with {process.returncode}")
            yield path
        finally:
            process.terminate()
            process.wait()


@contextmanager
def ray_cluster(warm: Path, count: int = 2, env: Mapping[str, str] | None = None) -> Iterator[RayCluster]:
    """Machines with Ray on them, nothing deployed yet."""
    folder = Path(tempfile.mkdtemp(prefix="vtp"))
    try:
        with machines(count) as nodes:
            cluster = RayCluster(nodes, folder, warm, env or {})
            cluster.start_node(0)
            wait_until(lambda: "version" in cluster.api("/api/version"), _START_SECONDS, cluster_log(cluster))
            for number in range(1, count):
                cluster.start_node(number)
            wait_until(lambda: cluster.nodes_alive() == count, _START_SECONDS, cluster_log(cluster))
            yield cluster
    finally:
        if not os.environ.get("VTPRUNE_KEEP_LOGS"):
            shutil.rmtree(folder, ignore_errors=True)


def cluster_log(cluster: RayCluster) -> Callable[[], str]:
    """What `ray start` said on the nodes."""
    return lambda: "\n".join(
        log.read_text(errors="replace")[-3000:] for log in sorted(cluster.folder.glob("node*.log"))
    )
