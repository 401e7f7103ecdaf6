# SPDX-License-Identifier: Apache-2.0
"""Ten minutes of mixed requests against a server of its own, watching errors, memory and file descriptors.

    python -m benchmarks.soak_http [--minutes 10] [--concurrency 4] [--json OUT]

Pictures are drawn from a seed, most of them new, some repeated; presets, single settings, streams, dropped
connections, text-only requests, explanations and bad requests are mixed. Every minute one known request is
asked again and must be answered as at first. After a warm-up a line is fitted through memory (anonymous and
shared, of all the server's processes) and the file descriptors; the exit status is 1 if anything failed or
grew.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

from benchmarks.commands import bench_parser, write_json
from vtprune_loadtest.command import command
from vtprune_loadtest.images import DrawnPictures
from vtprune_loadtest.processes import ServerProcess
from vtprune_loadtest.prometheus import parse_counters

#: Growth that counts as flat, per hour of the fitted line.
FLAT_MIB_PER_HOUR = 120.0
FLAT_FDS_PER_HOUR = 60.0
_SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"preset": "light"},
    {"preset": "balanced"},
    {"preset": "aggressive"},
    {"aggressiveness": 0.37},
    {"keep_ratio": 0.25, "method": "topk"},
    {"keep_ratio": 0.5, "method": "divprune"},
    {"aggressiveness": 0.5, "method": "inflection_diverse"},
)
#: How often each kind of request is drawn.
_KINDS = {
    "plain": 50,
    "stream": 20,
    "dropped stream": 8,
    "text": 7,
    "explain": 5,
    "two pictures": 5,
    "bad": 5,
}
_SAMPLE_S, _REPEAT_S = 2.0, 60.0
_COUNTED = ("Pss_Anon:", "Pss_Shmem:")
_PICTURES = DrawnPictures(168, 168, "jpeg", seed=0)


@dataclass
class ProcessSample:
    """The server's processes at one moment."""

    seconds: float
    mib: float
    descriptors: int


@dataclass
class Soak:
    """What was seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    samples: list[ProcessSample] = field(default_factory=list)
    resent: float = 0.0

    def progress(self) -> str:
        """One line on the last sample."""
        last = self.samples[-1]
        return (
            f"{last.seconds / 60:5.1f} min  {last.mib:7.0f} MiB  {last.descriptors:4d} files  "
            f"{self.outcomes.total()} requests"
        )


def main(argv: list[str] | None = None, prog: str = "python -m benchmarks.soak_http") -> int:
    """Run the soak; 0 if nothing failed or grew."""
    return command(prog, lambda: _run(argv, prog))


def _run(argv: list[str] | None, prog: str) -> int:
    parser = bench_parser(
        prog, "Mixed requests against a server of its own, errors and growth watched.", models=False
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--warm-up", type=float, default=0.3, help="share of the time left out of the fit")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep the server's output here")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        server = start_server(Path(folder))
        try:
            soak = asyncio.run(run(server, options))
        finally:
            server.stop()
            if options.log is not None:
                shutil.copy(server.log, options.log)
    return report(soak, options)


def start_server(folder: Path) -> ServerProcess:
    """`vtprune serve` on the embedded model, once it is healthy.

    Raises:
        LoadTestError: it did not start.
    """
    # Small caches are full when the warm-up is over, so that what grows afterwards is a leak; and vLLM's
    # processor cache evicts all the time, so that its halves drift apart (`vtprune_server.resend`).
    flags = ["--vtprune-feature-cache-gb", "0.01", "--mm-processor-cache-gb", "0.0005"]
    flags += ["--num-gpu-blocks-override", "256"]
    command = [sys.executable, "-m", "vtprune_server.cli", "serve", *flags]
    # oneDNN keeps a compiled kernel per matrix shape, 1024 of them by default, which takes long to fill
    environ = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
    return ServerProcess.start(command, folder / "server.log", environ, within_s=300, cwd=folder)


async def run(server: ServerProcess, options: argparse.Namespace) -> Soak:
    """Keep `concurrency` requests in flight until the time is over."""
    soak = Soak()
    deadline = time.monotonic() + options.minutes * 60
    limits = httpx.Limits(max_connections=options.concurrency * 2)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        workers = (
            ask_until(deadline, client, random.Random(options.seed * 1000 + number), soak)
            for number in range(options.concurrency)
        )
        await asyncio.gather(watch_until(deadline, client, server, soak), *workers)
        soak.resent = await resent(client)
    if server.process.poll() is not None:
        soak.failures.append("the server died")
    return soak


async def ask_until(deadline: float, client: httpx.AsyncClient, chooser: random.Random, soak: Soak) -> None:
    """Send one request after another."""
    while time.monotonic() < deadline:
        try:
            soak.outcomes[await one_request(client, chooser)] += 1
        except Exception as error:
            soak.failures.append(f"{type(error).__name__}: {error}")


async def watch_until(deadline: float, client: httpx.AsyncClient, server: ServerProcess, soak: Soak) -> None:
    """Sample the server's processes, and ask the known request again every minute."""
    first = await known_answer(client)
    started = asked = time.monotonic()
    while time.monotonic() < deadline:
        soak.samples.append(sample(server, time.monotonic() - started))
        if time.monotonic() - asked > _REPEAT_S:
            asked = time.monotonic()
            if await known_answer(client) != first:
                soak.failures.append("the known request was answered differently")
            print(soak.progress(), flush=True)
        await asyncio.sleep(_SAMPLE_S)


async def one_request(client: httpx.AsyncClient, chooser: random.Random) -> str:
    """Send one request of a kind drawn by chance, and name it; raises where the answer is wrong."""
    (kind,) = chooser.choices(list(_KINDS), list(_KINDS.values()))
    settings = chooser.choice(_SETTINGS)
    body = chat(chooser, 0 if kind == "text" else 2 if kind == "two pictures" else 1, vtprune=settings)
    path = "/v1/chat/completions"
    if kind == "explain":
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        path, body = "/vtprune/explain", {"image_url": url, "vtprune": settings}
    elif kind == "bad":
        body |= chooser.choice(({"vtprune": {"aggressiveness": 9}}, {"messages": [{}]}, {"max_tokens": -1}))
    elif "stream" in kind:
        body |= {"stream": True}
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                await response.aread()
            expect(response, 200, kind)
            async for line in response.aiter_lines():
                if line.startswith('data: {"error"'):
                    raise RuntimeError(f"{kind}: {line[:300]}")
                if kind == "dropped stream" and line:
                    return kind
        return kind
    response = await client.post(path, json=body)
    expect(response, 400 if kind == "bad" else 200, kind)
    return kind


def expect(response: httpx.Response, wanted: int, kind: str) -> None:
    """Refuse another status."""
    if response.status_code != wanted:
        raise RuntimeError(
            f"{kind}: status {response.status_code} instead of {wanted}: {response.text[:300]}"
        )


def chat(chooser: random.Random, pictures: int, **fields: Any) -> dict[str, Any]:
    """A chat completion about drawn pictures, one in four of which was sent before."""
    content: list[dict[str, Any]] = []
    for _ in range(pictures):
        seed = chooser.randrange(8) if chooser.random() < 0.25 else chooser.randrange(10**9)
        picture = _PICTURES.picture(seed)
        url = f"data:{picture.mime_type};base64,{base64.b64encode(picture.data).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": "what color is the circle ?"})
    return {
        "max_tokens": chooser.randint(1, 24),
        "messages": [{"role": "user", "content": content}],
        **fields,
    }


async def known_answer(client: httpx.AsyncClient) -> Any:
    """Text and counts of a request that never changes."""
    body = chat(random.Random(1), 1, vtprune={"preset": "balanced"}) | {"temperature": 0, "max_tokens": 8}
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]


async def resent(client: httpx.AsyncClient) -> float:
    """Requests that were sent to the engine again because its cache had lost their image."""
    counters = parse_counters((await client.get("/metrics")).text)
    return counters.get("vtprune_images_resent_total", 0.0)


def sample(server: ServerProcess, seconds: float) -> ProcessSample:
    """Anonymous and shared memory, and descriptors, of the server and the processes it started.

    Pages of files are left out: what they count for depends on who else on the machine maps them.
    """
    kib, descriptors = 0, 0
    for member in server.members():
        try:
            rollup = Path(f"/proc/{member.pid}/smaps_rollup").read_text()
            kib += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith(_COUNTED))
            descriptors += member.num_fds()
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue
    return ProcessSample(seconds, kib / 1024, descriptors)


def slope_per_hour(samples: list[ProcessSample], name: str) -> float:
    """Least-squares slope of a field over time."""
    times = [s.seconds / 3600 for s in samples]
    return linear_regression(times, [float(getattr(s, name)) for s in samples]).slope


def report(soak: Soak, options: argparse.Namespace) -> int:
    """Print the verdict; 0 if nothing failed or grew."""
    kept = [s for s in soak.samples if s.seconds >= options.warm_up * options.minutes * 60]
    memory, files = slope_per_hour(kept, "mib"), slope_per_hour(kept, "descriptors")
    print(f"requests: {soak.outcomes.total()} " + ", ".join(f"{k} {n}" for k, n in soak.outcomes.items()))
    print(f"memory after warm-up: {kept[0].mib:.0f} to {kept[-1].mib:.0f} MiB, slope {memory:+.1f} MiB/h")
    print(f"file descriptors: {kept[0].descriptors} to {kept[-1].descriptors}, slope {files:+.1f}/h")
    print(f"sent to the engine again with their images: {soak.resent:.0f}")
    print(f"failures: {len(soak.failures)}", *soak.failures[:10], sep="\n  ")
    flat = memory <= FLAT_MIB_PER_HOUR and files <= FLAT_FDS_PER_HOUR
    verdict = {"memory_mib_per_hour": memory, "files_per_hour": files, "failures": soak.failures}
    samples = [asdict(s) for s in soak.samples]
    write_json(options.json, {**verdict, "outcomes": soak.outcomes, "samples": samples})
    return 0 if flat and not soak.failures else 1


if __name__ == "__main__":
    sys.exit(main())
