# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a large fleet, with and without pruning: the page docs/fleet.md.

    python -m benchmarks.fleet > docs/fleet.md
    python -m benchmarks.fleet --picture      # measures what the page takes for a picture

Nothing of it was measured on an accelerator: times are the roofline's (`benchmarks.roofline`) divided by a
share of it that a server is assumed to reach. What the page takes for granted stands on it in one table.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.models import CLIP_L, LLAVA_7B
from benchmarks.roofline import MachineLimits, total_seconds
from vtprune_eval.flops import CostShape, RequestShape, kv_bytes, request_work

#: NVIDIA H100 SXM: dense bfloat16 and HBM3, from its data sheet.
H100 = MachineLimits(peak_flops=989e12, bandwidth=3.35e12)
H100_BYTES = 80e9
#: Of the roofline, that a server is planned to reach. Assumed: benchmarks/gpu/run.sh would measure it.
SHARE = 0.4
#: How much of what it can do a replica is planned to be asked for; the rest is for peaks.
UTILISATION = 0.7
#: Of the GPU's memory that vLLM takes, and the most requests at once: its defaults on an H100.
MEMORY_SHARE, MOST_REQUESTS = 0.92, 1024
#: A photograph of 1024 x 768 pixels as JPEG of quality 85.
PICTURE_BYTES = 136_000
#: Processor seconds to decode and resize it: `--picture`, AMD EPYC, 27 November 2026.
PICTURE_SECONDS = 0.009
#: Bytes of one chunk of a stream, a token each.
CHUNK_BYTES = 250
#: A photograph as phones take them.
PHONE_BYTES = 3_000_000
#: The cache of tower outputs (`--vtprune-feature-cache-gb`), and bytes a second of a gateway's link.
CACHE_BYTES, LINK = 1 << 30, 25e9 / 8
#: What `python -m benchmarks.compare --model demo` wrote: the page takes a request's processor time from it.
DEMO_RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "demo-concurrency.json"
#: Requests an hour.
LOADS = (1_000, 100_000, 10_000_000)

LLAVA = CostShape(
    patches=(CLIP_L.image // CLIP_L.patch) ** 2,
    patch_inputs=3 * CLIP_L.patch**2,
    tower_hidden=CLIP_L.hidden,
    tower_intermediate=CLIP_L.intermediate,
    tower_layers=CLIP_L.layers - 1,  # LLaVA reads the last but one
    hidden=LLAVA_7B.hidden,
    intermediate=LLAVA_7B.intermediate,
    layers=LLAVA_7B.layers,
    q_width=LLAVA_7B.hidden,
    kv_width=LLAVA_7B.hidden,
    vocab=LLAVA_7B.vocab,
    element=2,
)
#: Bytes of one cached tower output: patches and CLS.
ENTRY_BYTES = (LLAVA.patches + 1) * LLAVA.tower_hidden * LLAVA.element
FULL = RequestShape(images=1, text_tokens=64, kept=LLAVA.patches, output=128)
_KEPT = replace(FULL, kept=round(0.22 * LLAVA.patches))
SETTINGS = {
    "nothing pruned": FULL,
    "22 % of the vision tokens": _KEPT,
    "and half the prompt from layer 8 on": replace(_KEPT, bands=((8, math.ceil(0.5 * _KEPT.prompt)),)),
}


@dataclass(frozen=True)
class Replica:
    """One GPU under one setting.

    Attributes:
        kv_bytes: KV cache of one request at its end.
        at_once: requests that fit the cache, or that the scheduler takes.
        seconds: GPU seconds per request, planned.
        tower: the vision tower's share of them.
        decode: the decode's.
        hand_over: bytes of embeddings from the API process to the engine, per request.
    """

    kv_bytes: float
    at_once: int
    seconds: float
    tower: float
    decode: float
    hand_over: float

    @property
    def requests_per_s(self) -> float:
        """Requests per second, planned."""
        return 1 / self.seconds


def replica(request: RequestShape, shape: CostShape = LLAVA, machine: MachineLimits = H100) -> Replica:
    """Plan one GPU for one kind of request."""
    per_token = 2 * shape.kv_width * shape.element
    kv = kv_bytes(shape, request) + per_token * shape.layers * request.output
    weights = shape.layers * shape.layer_weights + 2 * shape.hidden * shape.vocab
    free = MEMORY_SHARE * H100_BYTES - weights * shape.element - 2 * shape.tower_weights * shape.element
    at_once = min(MOST_REQUESTS, int(free / kv))
    work = request_work(shape, request, at_once)
    least = total_seconds(work, machine)
    return Replica(
        kv_bytes=kv,
        at_once=at_once,
        seconds=least / SHARE,
        tower=work["tower"].seconds(machine.peak_flops, machine.bandwidth) / least,
        decode=work["decode"].seconds(machine.peak_flops, machine.bandwidth) / least,
        hand_over=request.images * request.kept * shape.hidden * shape.element,
    )


def replicas(requests_per_hour: float, one: Replica) -> int:
    """GPUs for a load, one of them to spare."""
    return math.ceil(requests_per_hour / 3600 / (UTILISATION * one.requests_per_s)) + 1


def request_bytes(images: int = FULL.images, output: int = FULL.output) -> tuple[float, float]:
    """Bytes of a request with its pictures in base64, and of its answer as a stream."""
    return images * PICTURE_BYTES * 4 / 3 + 500, output * CHUNK_BYTES


def page() -> str:
    """docs/fleet.md."""
    plans = {name: replica(request) for name, request in SETTINGS.items()}
    base, stage1, both = plans.values()
    into, out = request_bytes()
    busiest = LOADS[-1] / 3600
    server_s = json.loads(DEMO_RESULTS.read_text())["models"]["demo"]["16"]["arms"]["off"]["median"]["cpu_s"]
    return _PAGE.format(
        assumptions=_table(_ASSUMPTIONS),
        one=_table(_one_replica(plans, into, out)),
        many=_table(_loads(plans, into, out)),
        utilisation=_percent(UTILISATION),
        text=FULL.text_tokens,
        output=FULL.output,
        gain1=f"{stage1.requests_per_s / base.requests_per_s:.1f}",
        gain2=f"{both.requests_per_s / base.requests_per_s:.1f}",
        fit=base.at_once,
        fit1=stage1.at_once,
        fit2=both.at_once,
        tower=_percent(base.tower),
        tower2=_percent(both.tower),
        saved_ms=f"{1000 * base.tower * base.seconds:.1f}",
        entry_mib=f"{ENTRY_BYTES / 2**20:.1f}",
        rps=f"{both.requests_per_s:.0f}",
        core=_percent(both.requests_per_s * PICTURE_SECONDS),
        core0=_percent(base.requests_per_s * PICTURE_SECONDS),
        server_ms=f"{1000 * server_s:.0f}",
        cores=f"{both.requests_per_s * server_s:.1f}",
        cached=f"{CACHE_BYTES / ENTRY_BYTES:.0f}",
        cached_s=f"{CACHE_BYTES / ENTRY_BYTES / both.requests_per_s:.0f}",
        load=f"{LOADS[-1]:,}",
        gpus0=f"{replicas(LOADS[-1], base):,}",
        gpus=f"{replicas(LOADS[-1], both):,}",
        by_chance=_percent(1 / replicas(LOADS[-1], both)),
        mb_in=f"{busiest * into / 1e6:,.0f}",
        link=_percent(busiest * into / LINK),
        links=f"{busiest * PHONE_BYTES * 4 / 3 / LINK:.1f}",
        phone_mb=f"{PHONE_BYTES / 1e6:.0f}",
    )


_ASSUMPTIONS = (
    ("taken for granted", "", "from"),
    ("arithmetic and bandwidth", f"{H100.peak_flops / 1e12:.0f} TFLOP/s, {H100.bandwidth / 1e12:.2f} TB/s",
     "data sheet, H100 SXM, dense bfloat16"),
    ("operations and bytes of a request", "", "`vtprune_eval/flops.py`"),
    ("share of that roofline reached", f"{100 * SHARE:.0f} %",
     "assumed; `benchmarks/gpu/run.sh` measures on a GPU"),
    ("memory for the KV cache",
     f"{100 * MEMORY_SHARE:.0f} % of {H100_BYTES / 1e9:.0f} GB, less all weights, the tower's twice",
     "vLLM's default; the tower's activations assumed"),
    ("requests at once", f"what fits, at most {MOST_REQUESTS:,}", "`--max-num-seqs`, vLLM's default there"),
    ("a picture", f"{PICTURE_BYTES / 1000:.0f} kB of JPEG, 1024 x 768 pixels, in base64", "quality 85"),
    ("decoding and resizing it", f"{1000 * PICTURE_SECONDS:.0f} ms of one core",
     "`python -m benchmarks.fleet --picture`, AMD EPYC, 27 November 2026"),
    ("a chunk of a stream", f"{CHUNK_BYTES} bytes", "one token"),
)  # fmt: skip

_PAGE = """\
# A large fleet, by arithmetic

Printed by `python -m benchmarks.fleet`; a test compares. **No number here was measured on a
GPU;** what was is [elsewhere](gpu.md).
LLaVA-1.5-7B in bfloat16, one H100 a replica, one picture, {text} text tokens and {output} tokens of
answer a request, no cache hits.

{assumptions}

Ratios between the columns do not depend on the share assumed; all else scales with it. On two cores the
measured ratios came to 85 to 112 % of the roofline's ([benchmarks](benchmarks.md)).

## One replica

{one}

- Stage 1 serves {gain1} times the requests, both stages {gain2} times. Prefill shrinks with the prompt;
  decoding shrinks because fewer keys and values are read, and because {fit1} and {fit2} requests share each
  reading of the weights where {fit} fitted.
- The tower costs the same whatever is kept: {tower} of the GPU's time unpruned, {tower2} with both
  stages. A picture asked about again saves {saved_ms} ms of GPU time, for {entry_mib} MiB of memory.

## GPUs for a load

At {utilisation} of what a replica can do, and one to spare. Take the load of your busiest hour, not the
day's mean.

{many}

## What breaks first

1. **The API process.** It decodes pictures, tokenises, runs HTTP and drives the tower, in one Python
   interpreter a replica. At {rps} requests a second pictures alone take {core} of a core (unpruned
   {core0}). The whole demo server, engine and tower on the CPU included, takes {server_ms} ms of
   processor time a request ([benchmarks](benchmarks.md#the-demo-model-under-load)), which would be
   {cores} cores. [On an H100](gpu.md) one API process fed some 45 requests a second, 48 ms of processor
   time each in all of the server's processes, while the GPU waited. Pruning brings this limit nearer,
   since it makes the GPU faster and not the front end. `--api-server-count 2` or more, each with a tower
   of its own; watch `vtprune_tower_waiting_images`.
2. **The KV cache.** A replica holds {fit} requests unpruned, {fit1} and {fit2} pruned; beyond that they wait.
   Longer answers and more pictures a request lower all three.
3. **The cache of tower outputs** (1 GiB by default) holds {cached} pictures, {cached_s} s of distinct
   ones. It pays within a conversation; across users only with routing by picture, and with memory to
   match.
4. **Routing.** {load} requests an hour are {gpus} replicas with both stages: without affinity a second
   question finds its picture's tower output {by_chance} of the time. With a consistent hash on the
   picture it always does, but a popular picture loads one replica: bound the load of each and let it fall
   over to the next.
5. **The network at the gateways.** {load} requests an hour bring {mb_in} MB/s of such pictures in, {link}
   of a link of 25 Gbit/s; photographs of {phone_mb} MB, as phones take them, fill {links} of them. URLs
   move a quarter less than base64, and move the fetching into the replicas. A gateway that hashes bodies
   must hold them; a digest in a header spares it that.
6. **The control plane.** {load} requests an hour are {gpus0} GPUs unpruned. Nothing here was tried beyond
   two nodes, so build cells of some tens of replicas, each with its own Ray cluster or ingress and its
   own Prometheus, and split users over cells.
"""


def _one_replica(plans: Mapping[str, Replica], into: float, out: float) -> Iterator[Sequence[str]]:
    found = list(plans.values())
    base = found[0].requests_per_s
    yield "", *plans
    yield "prompt tokens", *(f"{r.prompt:.0f}" for r in SETTINGS.values())
    yield "KV cache of a request at its end", *(f"{p.kv_bytes / 2**20:.0f} MiB" for p in found)
    yield "requests at once", *(str(p.at_once) for p in found)
    yield "GPU time of a request", *(f"{1000 * p.seconds:.0f} ms" for p in found)
    yield "of it the vision tower", *(_percent(p.tower) for p in found)
    yield "of it decoding", *(_percent(p.decode) for p in found)
    yield "**requests, and pictures, a second**", *(f"**{p.requests_per_s:.1f}**" for p in found)
    yield "over nothing pruned", *(f"{p.requests_per_s / base:.1f} x" for p in found)
    yield "tokens of answer a second", *(f"{p.requests_per_s * FULL.output:,.0f}" for p in found)
    yield "cores that decode pictures", *(f"{p.requests_per_s * PICTURE_SECONDS:.2f}" for p in found)
    yield "network in", *(f"{p.requests_per_s * into / 1e6:.1f} MB/s" for p in found)
    yield "network out", *(f"{p.requests_per_s * out / 1e6:.1f} MB/s" for p in found)
    handed = (p.requests_per_s * p.hand_over / 1e6 for p in found)
    yield "embeddings handed to the engine", *(f"{rate:.0f} MB/s" for rate in handed)


def _loads(plans: Mapping[str, Replica], into: float, out: float) -> Iterator[Sequence[str]]:
    yield "requests an hour", "a second", "network in", "network out", *(f"GPUs: {name}" for name in plans)
    for load in LOADS:
        rate = load / 3600
        traffic = (f"{rate * size / 1e6:,.1f} MB/s" for size in (into, out))
        yield f"{load:,}", f"{rate:,.1f}", *traffic, *(f"{replicas(load, p):,}" for p in plans.values())


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _table(rows: Iterable[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def measure_picture() -> tuple[int, float]:
    """Bytes of the page's picture, and processor seconds to decode and resize it, the best of some."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import CLIPImageProcessor

    torch.set_num_threads(1)
    pixels = np.random.RandomState(0).randint(0, 255, (48, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((1024, 768), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    side = {"height": CLIP_L.image, "width": CLIP_L.image}
    resize = CLIPImageProcessor(size={"shortest_edge": CLIP_L.image}, crop_size=side)
    best = math.inf
    for _ in range(20):
        start = time.process_time()
        with Image.open(io.BytesIO(buffer.getvalue())) as picture:
            resize(picture.convert("RGB"), return_tensors="pt")
        best = min(best, time.process_time() - start)
    return len(buffer.getvalue()), best


def main(argv: Sequence[str] | None = None, prog: str = "python -m benchmarks.fleet") -> int:
    """Print the page; gives the exit status."""
    parser = argparse.ArgumentParser(prog=prog, description="The arithmetic of a large fleet.")
    parser.add_argument("--picture", action="store_true", help="measure a picture's decoding instead")
    if parser.parse_args(argv).picture:
        size, seconds = measure_picture()
        print(f"{size} bytes, {1000 * seconds:.1f} ms of one core")
    else:
        sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
