# SPDX-License-Identifier: Apache-2.0
"""What a picture costs the API process beside vLLM: processor time of its processor and of ours, no server.

    python -m benchmarks.processor                      # LLaVA-1.5-7B's sizes, pictures of 640 x 480
    python -m benchmarks.processor --size 4032x3024 --pictures 4

Tower and projector cost nothing here but the memory that their results are written to, as on a GPU that
nobody waits for. Each picture is new: decoded from JPEG, preprocessed, made an item of vLLM's caches and
encoded for the engine. The arms take turns and ratios are paired by round. Not in it: HTTP, the event loop,
and the way from process to process.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.commands import bench_parser, write_json
from benchmarks.llava import DecoderShape, TowerShape, write_config
from benchmarks.rounds import Rounds, decimal, finite, quartiles, shuffled
from vtprune_loadtest.columns import columns
from vtprune_loadtest.command import command
from vtprune_loadtest.errors import LoadTestError

_PROG = "python -m benchmarks.processor"
#: As wide as LLaVA-1.5-7B's language model, which is what travels; the tower's work is left out.
_DECODER = DecoderShape(hidden=4096, intermediate=64, layers=1, heads=32, vocab=512, kv_heads=1)
_TOWER = TowerShape(hidden=32, intermediate=64, layers=2, heads=1)
_PROMPT = "USER: <image>\nWhat is in this picture? ASSISTANT:"
#: Arm -> fields of a request, in the contract's names; None is vLLM's own processor.
_ARMS: dict[str, dict[str, float] | None] = {"vllm": None, "off": {}, "keep0.22": {"keep_ratio": 0.22}}


@dataclass(frozen=True)
class Block:
    """One arm's block: means over its pictures.

    Attributes:
        cpu_ms: processor time of all threads.
        sent_bytes: what the engine is sent.
    """

    cpu_ms: float
    sent_bytes: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; gives the exit status."""
    return command(_PROG, lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(arguments: list[str]) -> None:
    parser = bench_parser(_PROG, "Compare vLLM's multimodal processor with ours.", models=False)
    parser.add_argument("--pictures", type=int, default=20, help="per block; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", default="640x480", metavar="WxH", help="default: %(default)s")
    options = parser.parse_args(arguments)
    size = _size(options.size)
    with tempfile.TemporaryDirectory(prefix="vtprune-") as folder:
        write_config(Path(folder), _DECODER, _TOWER, "bfloat16")
        rounds = compare(processors(Path(folder)), options.rounds, options.pictures, size)
    print(table(rounds, options.size))
    document = {label: [asdict(block) for block in rounds.blocks[label]] for label in rounds.labels}
    ratios = {label: finite(asdict(rounds.spread(label, "cpu_ms"))) for label in rounds.labels}
    write_json(options.json, {"machine": machine.describe(), "blocks": document, "ratios": ratios})


def compare(
    arms: dict[str, Callable[[bytes], int]], rounds: int, pictures: int, size: tuple[int, int]
) -> Rounds[Block]:
    """Blocks of so many new pictures of a size, after a round that warms up."""
    found: Rounds[Block] = Rounds(list(arms))
    rng = np.random.default_rng(0)
    picture = 0
    for number in range(rounds + 1):
        for label in shuffled(found.labels, rng):
            block = _block(arms[label], [_jpeg(picture + i, size) for i in range(pictures)])
            picture += pictures
            if number:
                found.blocks[label].append(block)
    return found


def processors(folder: Path) -> dict[str, Callable[[bytes], int]]:
    """Per arm what takes a JPEG to what the engine is sent, and tells the bytes; of one checkpoint."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.cache import LruKeyReplicatedSenderCache
    from vllm.plugins import load_general_plugins
    from vllm.tokenizers import get_tokenizer

    from vllm_vtprune import request_kwargs
    from vllm_vtprune.vision.processor import PrunedProcessor

    os.environ["VLLM_PLUGINS"] = "vtprune"
    load_general_plugins()
    args = EngineArgs(str(folder), dtype="bfloat16", load_format="dummy", enforce_eager=True)
    model_config = args.create_engine_config().model_config
    tokenizer = get_tokenizer(str(folder))
    ours: Any = MULTIMODAL_REGISTRY.create_processor(model_config, tokenizer=tokenizer)
    if not isinstance(ours, PrunedProcessor):
        raise LoadTestError("The plugin is not loaded: install vtprune into this environment.")
    # the plugin stands in vLLM's place in the registry, and vLLM's class keeps its own
    factory: Any = LlavaForConditionalGeneration._processor_factory
    vllms = factory.build_processor(MULTIMODAL_REGISTRY._create_processing_ctx(model_config, tokenizer))
    _without_work(ours)
    torch.set_num_threads(1)  # as vLLM's renderer
    prompt = tokenizer(_PROMPT, add_special_tokens=False).input_ids

    def arm(fields: dict[str, float] | None) -> Callable[[bytes], int]:
        kwargs = request_kwargs(**fields)[0] if fields is not None else {}  # type: ignore[arg-type]
        processor = vllms if fields is None else ours
        return _Sender(processor, list(prompt), kwargs, LruKeyReplicatedSenderCache(model_config))

    return {label: arm(fields) for label, fields in _ARMS.items()}


class _Sender:
    """A processor as a server uses it for one picture."""

    def __init__(self, processor: Any, prompt: list[int], kwargs: Any, cache: Any) -> None:
        self._processor, self._prompt, self._kwargs, self._cache = processor, prompt, kwargs, cache

    def __call__(self, jpeg: bytes) -> int:
        from vllm.multimodal.media.image import ImageMediaIO
        from vllm.multimodal.processing.context import TimingContext
        from vllm.multimodal.processing.inputs import ProcessorInputs
        from vllm.v1.serial_utils import MsgpackEncoder

        data = {"image": [ImageMediaIO().load_bytes(jpeg)]}
        if hasattr(self._processor, "prefetch"):  # as `vtprune_server.prefetch`
            self._processor.prefetch(data, self._kwargs, None, self._cache)
        inputs = ProcessorInputs(
            self._prompt,
            self._processor.info.parse_mm_data(data),
            hf_processor_mm_kwargs=self._kwargs,
            cache=self._cache,
        )
        result = self._processor.apply(inputs, TimingContext(enabled=False))
        parts: Any = MsgpackEncoder().encode(result["mm_kwargs"])
        return sum(memoryview(part).nbytes for part in parts)


def _without_work(processor: Any) -> None:
    """Replace the work of tower and projector by results of their size, written anew for each picture."""
    import torch
    from torch import nn

    encoder = processor.vision.encoder
    side = _TOWER.image // _TOWER.patch
    states = torch.randn(1, side**2 + 1, _TOWER.hidden, dtype=torch.bfloat16)
    embeddings = torch.randn(side**2, _DECODER.hidden, dtype=torch.bfloat16)

    class Written(nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return embeddings[: len(rows)].clone()

    encoder.family._fixed.run = lambda tower, pixels, outputs: (states.repeat(len(pixels), 1, 1), {})
    encoder.modules["projector"] = Written()


def _block(send: Callable[[bytes], int], jpegs: Sequence[bytes]) -> Block:
    start = time.process_time()
    sent = [send(jpeg) for jpeg in jpegs]
    seconds = time.process_time() - start
    return Block(1000 * seconds / len(jpegs), sum(sent) / len(jpegs))


def table(rounds: Rounds[Block], size: str) -> str:
    """A line for each arm."""
    rows = [
        [
            label,
            decimal(rounds.median(label, "sent_bytes"), 2, 1e-6),
            decimal(rounds.median(label, "cpu_ms"), 2),
            "" if label == rounds.base else quartiles(rounds.spread(label, "cpu_ms")),
        ]
        for label in rounds.labels
    ]
    head = f"JPEGs of {size}, {len(rounds)} rounds; medians; ratios to {rounds.base}, paired by round"
    return "\n".join([head, *columns(["arm", "MB sent", "CPU ms a picture", "ratio"], rows, width=100)])


def _jpeg(number: int, size: tuple[int, int]) -> bytes:
    from PIL import Image

    coarse = np.random.default_rng(number).integers(0, 255, (24, 32, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize(size).save(out, "JPEG", quality=90)
    return out.getvalue()


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise LoadTestError(f"--size takes a width and a height such as 640x480, not {text!r}.")
    return int(width), int(height)


if __name__ == "__main__":
    sys.exit(main())
