# SPDX-License-Identifier: Apache-2.0
"""Models to measure with: the demo model, decoder-bound random ones, LLaVA-1.5-7B's shape without weights.

    vtprune serve $(python -m benchmarks.models demo-deep)

prints a model's folder and the flags that it is served with, its prune layer among them.

Speed does not depend on what the weights say, so random ones do. Which tokens the inflection rule keeps
does: on random towers its counts mean nothing, and comparisons there fix the share (`X-VTPrune-Keep-Ratio`).
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig

from benchmarks.deep import Deepening, deepen
from benchmarks.llava import DecoderShape, TowerShape, random_llava, write_config
from benchmarks.qwen import WindowTower, random_qwen2_5_vl
from vtprune_loadtest.command import SentenceParser, command
from vtprune_loadtest.errors import LoadTestError


@dataclass(frozen=True)
class BenchModel:
    """A model and what both servers are started with.

    Attributes:
        folder: the checkpoint.
        flags: vLLM's flags.
        kv_cache_gb: VLLM_CPU_KVCACHE_SPACE.
        prune_layer: K for the servers that have the second stage, about a quarter of the depth.
    """

    name: str
    folder: Path
    flags: tuple[str, ...]
    kv_cache_gb: int
    prune_layer: int


#: 154 million parameters; `SMALL_TOWER` is to it what CLIP-L is to LLaVA-1.5-7B: about 5 % of the work.
DECODER_150M = DecoderShape(hidden=1024, intermediate=2816, layers=12, heads=16, vocab=512)
SMALL_TOWER = TowerShape(hidden=256, intermediate=1024, layers=8, heads=4)
#: 13 million parameters and a tower to match, for measurements with many tokens on few cores.
DECODER_13M = DecoderShape(hidden=512, intermediate=1408, layers=4, heads=8, vocab=512)
TINY_TOWER = TowerShape(hidden=128, intermediate=512, layers=4, heads=2)
#: CLIP ViT-L/14 at 336 pixels and Vicuna-7B, as LLaVA-1.5-7B combines them (arXiv 2310.03744).
LLAVA_7B = DecoderShape(hidden=4096, intermediate=11008, layers=32, heads=32, vocab=32064)
CLIP_L = TowerShape(hidden=1024, intermediate=4096, layers=24, heads=16)
#: The same with fewer key heads, as Qwen's decoders have, and a tower whose one layer with attention over the
#: whole picture is most of it: of a prompt's operations 2 % at 1,024 vision tokens, which are 4,096
#: patches, and 5 % at 4,096.
GROUPED_150M = replace(DECODER_150M, kv_heads=4)
WINDOW_TOWER = WindowTower(hidden=64, intermediate=128, layers=4, heads=1)

#: Makes of the demo model's decoder one of 24 layers and 154 million parameters: a token is as many
#: operations as on `decoder-150m`, and a prompt with a picture, 153 tokens, a quarter of one there. Its prune
#: layer is a quarter of the depth.
DEMO_DEEP = Deepening(before=3, after=16, hidden=1024, intermediate=1920)

_EAGER = ("--enforce-eager", "--dtype", "float32", "--max-num-seqs", "16")


def model_named(name: str, model_dir: Path | None = None) -> BenchModel:
    """A model by name, built on first use (one of `MODELS`), or a checkpoint's folder.

    Args:
        name: the model's, or the folder.
        model_dir: where built checkpoints are kept; None is `default_model_dir()`.

    Raises:
        LoadTestError: there is no such model.
    """
    if (Path(name) / "config.json").is_file():
        return checkpoint(Path(name))
    if name not in MODELS:
        raise LoadTestError(
            f"There is no model {name!r}: the models are {', '.join(MODELS)}, or a checkpoint's folder."
        )
    return MODELS[name](model_dir or default_model_dir())


def checkpoint(folder: Path) -> BenchModel:
    """A checkpoint of one's own, served as it asks to be."""
    layers = int(AutoConfig.from_pretrained(folder).get_text_config().num_hidden_layers)
    return BenchModel(folder.resolve().name, folder, ("--enforce-eager",), 4, max(1, layers // 4))


def default_model_dir() -> Path:
    """`$XDG_CACHE_HOME/vtprune`, usually ~/.cache/vtprune."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vtprune"


def demo() -> BenchModel:
    """The embedded demo model: 144 vision tokens, so small that the server around it is most of the work."""
    from vllm_vtprune import demo_model

    folder = demo_model.FOLDER
    flags = (*_EAGER, "--max-model-len", "1024")
    return BenchModel("demo", folder, flags, kv_cache_gb=1, prune_layer=demo_model.PRUNE_LAYER)


def demo_deep(model_dir: Path) -> BenchModel:
    """The demo model's answers from a decoder as large as `decoder-150m`'s (0.7 GB, float32)."""
    from vllm_vtprune import demo_model

    name = "demo-deep"
    folder = _once(model_dir / name, lambda path: deepen(demo_model.FOLDER, path, DEMO_DEEP))
    flags = (*_EAGER, "--max-model-len", "1024")
    prune_layer = DEMO_DEEP.before + demo_model.PRUNE_LAYER
    return BenchModel(name, folder, flags, kv_cache_gb=1, prune_layer=prune_layer)


def decoder_bound(model_dir: Path) -> BenchModel:
    """The decoder-bound model: 576 vision tokens and a decoder of 154 million parameters, float32."""
    flags = (*_EAGER, "--max-model-len", "2048")
    folder = decoder_150m(model_dir / "decoder-150m")
    # 16 unpruned requests of six blocks each
    return BenchModel("decoder-150m", folder, flags, kv_cache_gb=2, prune_layer=4)


def many_patches(model_dir: Path, patches: int) -> BenchModel:
    """A model small enough for prompts of thousands of vision tokens: `patches`, a square, per image."""
    tower = replace(TINY_TOWER, image=math.isqrt(patches) * TINY_TOWER.patch)
    name = f"decoder-13m-{patches}"
    folder = _once(model_dir / name, lambda path: random_llava(path, DECODER_13M, tower))
    flags = (*_EAGER, "--max-model-len", "8192", "--limit-mm-per-prompt", '{"image":8}')
    return BenchModel(name, folder, flags, kv_cache_gb=1, prune_layer=1)


def twelve_layers(model_dir: Path) -> BenchModel:
    """A decoder so narrow that a step of a hundred prompts is quick, and deep enough for several bands."""
    decoder = DecoderShape(hidden=256, intermediate=704, layers=12, heads=8, vocab=512)
    folder = _once(model_dir / "twelve-layers", lambda path: random_llava(path, decoder, TINY_TOWER))
    return BenchModel("twelve-layers", folder, (*_EAGER, "--max-model-len", "2048"), 1, prune_layer=4)


def qwen_vl(model_dir: Path, vision_tokens: int) -> BenchModel:
    """Qwen2.5-VL's structure: M-RoPE, windows, units of 2x2 patches; a square picture has `vision_tokens`."""
    name = f"qwen2.5-vl-{vision_tokens}"
    folder = _once(
        model_dir / name, lambda path: random_qwen2_5_vl(path, GROUPED_150M, WINDOW_TOWER, vision_tokens)
    )
    # a prompt is prefilled in one step, with the second stage or without
    lengths = ("--max-model-len", "8192", "--max-num-batched-tokens", "8192")
    limits = ("--limit-mm-per-prompt", '{"image":1,"video":0}')
    return BenchModel(name, folder, (*_EAGER, *lengths, *limits), kv_cache_gb=2, prune_layer=4)


def llava_7b(model_dir: Path) -> BenchModel:
    """LLaVA-1.5-7B's architecture with dummy weights, for an accelerator."""
    folder = _once(model_dir / "llava-1.5-7b", lambda path: write_config(path, LLAVA_7B, CLIP_L, "bfloat16"))
    engine = ("--load-format", "dummy", "--dtype", "bfloat16", "--max-num-seqs", "128")
    # two servers share the accelerator: the same cache for both, not what each finds free
    memory = ("--max-model-len", "4096", "--kv-cache-memory-bytes", "18G", "--gpu-memory-utilization", "0.42")
    # graphs of few sizes are captured sooner
    graphs = ("--compilation-config", '{"cudagraph_capture_sizes":[1,2,4,8,16,32,64,128]}')
    flags = (*engine, *memory, *graphs)
    return BenchModel("llava-1.5-7b", folder, flags, kv_cache_gb=0, prune_layer=8)


def decoder_150m(folder: Path) -> Path:
    """Write the decoder-bound random LLaVA (0.65 GB), unless it is there; returns the folder."""
    return _once(folder, lambda path: random_llava(path, DECODER_150M, SMALL_TOWER))


def _once(folder: Path, build: Callable[[Path], object]) -> Path:
    """Build beside the folder and rename, so that an interrupted build leaves nothing half done."""
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + "-"))
        try:
            build(building)
            building.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


#: Name -> what builds it.
MODELS: dict[str, Callable[[Path], BenchModel]] = {
    "demo": lambda _: demo(),
    "demo-deep": demo_deep,
    "decoder-150m": decoder_bound,
    "twelve-layers": twelve_layers,
    "qwen2.5-vl-1024": lambda model_dir: qwen_vl(model_dir, 1024),
    "qwen2.5-vl-4096": lambda model_dir: qwen_vl(model_dir, 4096),
    "llava-1.5-7b": llava_7b,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print what `vtprune serve` is given for a model, building it first; gives the exit status."""
    prog = "python -m benchmarks.models"

    def run() -> None:
        parser = SentenceParser(prog=prog, description="Build a model and print how it is served.")
        parser.add_argument("model", metavar="MODEL", help=f"{', '.join(MODELS)}, or a folder")
        parser.add_argument("--model-dir", type=Path, metavar="FOLDER", help="default ~/.cache/vtprune")
        options = parser.parse_args(argv)
        model = model_named(options.model, options.model_dir)
        if model.kv_cache_gb:
            print(f"on the CPU: VLLM_CPU_KVCACHE_SPACE={model.kv_cache_gb}", file=sys.stderr)
        served = ("--served-model-name", model.name, "--prune-layer", str(model.prune_layer))
        print(model.folder, *model.flags, *served)

    return command(prog, run)


if __name__ == "__main__":
    sys.exit(main())
