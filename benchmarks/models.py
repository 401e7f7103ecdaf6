# SPDX-License-Identifier: Apache-2.0
"""Models to measure with: the demo model, a decoder-bound random one, LLaVA-1.5-7B's shape without weights.

Speed does not depend on what the weights say, so random ones do. Which tokens the inflection rule keeps
does: on random towers its counts mean nothing, and comparisons there fix the share (`X-VTPrune-Keep-Ratio`).
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune_loadtest.errors import LoadTestError

if TYPE_CHECKING:
    from transformers import LlavaConfig, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
BOS, EOS, IMAGE, PAD = range(1, 5)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %} "
    "{% endfor %}ASSISTANT:"
)
_INITIAL_STD = 0.02


@dataclass(frozen=True)
class Decoder:
    """Shape of a Llama decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int


@dataclass(frozen=True)
class Tower:
    """Shape of a CLIP tower; `image` and `patch` are in pixels."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    image: int = 336
    patch: int = 14


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
DECODER_150M = Decoder(hidden=1024, intermediate=2816, layers=12, heads=16, vocab=512)
SMALL_TOWER = Tower(hidden=256, intermediate=1024, layers=8, heads=4)
#: 13 million parameters and a tower to match, for measurements with many tokens on few cores.
DECODER_13M = Decoder(hidden=512, intermediate=1408, layers=4, heads=8, vocab=512)
TINY_TOWER = Tower(hidden=128, intermediate=512, layers=4, heads=2)
#: CLIP ViT-L/14 at 336 pixels and Vicuna-7B, as LLaVA-1.5-7B combines them (arXiv 2310.03744).
LLAVA_7B = Decoder(hidden=4096, intermediate=11008, layers=32, heads=32, vocab=32064)
CLIP_L = Tower(hidden=1024, intermediate=4096, layers=24, heads=16)

_EAGER = ("--enforce-eager", "--dtype", "float32", "--max-num-seqs", "16")


def model_named(name: str, model_dir: Path | None = None) -> BenchModel:
    """A model by name, built on first use: `demo`, `decoder-150m` or `llava-1.5-7b`.

    Args:
        name: the model's.
        model_dir: where built checkpoints are kept; None is `default_model_dir()`.

    Raises:
        LoadTestError: there is no such model.
    """
    builders: dict[str, Callable[[Path], BenchModel]] = {
        "demo": lambda _: demo(),
        "decoder-150m": decoder_bound,
        "llava-1.5-7b": llava_7b,
    }
    if name not in builders:
        raise LoadTestError(f"There is no model {name!r}: the models are {', '.join(builders)}.")
    return builders[name](model_dir or default_model_dir())


def default_model_dir() -> Path:
    """`$XDG_CACHE_HOME/vtprune`, usually ~/.cache/vtprune."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vtprune"


def demo() -> BenchModel:
    """The embedded demo model: 144 vision tokens, so small that the server around it is most of the work."""
    from vllm_vtprune import demo_model

    folder = demo_model.FOLDER
    flags = (*_EAGER, "--max-model-len", "1024")
    return BenchModel("demo", folder, flags, kv_cache_gb=1, prune_layer=demo_model.PRUNE_LAYER)


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
    flags = (*_EAGER, "--max-model-len", "8192", "--limit-mm-per-prompt", '{"image": 8}')
    return BenchModel(name, folder, flags, kv_cache_gb=1, prune_layer=1)


def llava_7b(model_dir: Path) -> BenchModel:
    """LLaVA-1.5-7B's architecture with dummy weights, for an accelerator."""
    folder = _once(model_dir / "llava-1.5-7b", lambda path: write_config(path, LLAVA_7B, CLIP_L, "bfloat16"))
    # two servers share the accelerator's memory
    engine = ("--load-format", "dummy", "--dtype", "bfloat16", "--max-num-seqs", "128")
    memory = ("--max-model-len", "4096", "--gpu-memory-utilization", "0.42")
    flags = (*engine, *memory)
    return BenchModel("llava-1.5-7b", folder, flags, kv_cache_gb=0, prune_layer=8)


def decoder_150m(folder: Path) -> Path:
    """Write the decoder-bound random LLaVA (0.65 GB), unless it is there; returns the folder."""
    return _once(folder, lambda path: random_llava(path, DECODER_150M, SMALL_TOWER))


def random_llava(folder: Path, decoder: Decoder, tower: Tower, seed: int = 0) -> None:
    """Write a random LLaVA-1.5 checkpoint in float32: CLIP tower with CLS, two-layer projector, Llama."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlavaForConditionalGeneration

    config = write_config(folder, decoder, tower, "float32")
    with torch.device("meta"):
        shapes = LlavaForConditionalGeneration(config).state_dict()
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        if "norm" in name and name.endswith("weight"):
            tensor = torch.ones(shape.shape)
        elif name.endswith("bias"):
            tensor = torch.zeros(shape.shape)
        else:
            tensor = torch.empty(shape.shape).normal_(0, _INITIAL_STD, generator=generator)
        weights[_public_name(name)] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_config(folder: Path, decoder: Decoder, tower: Tower, dtype: str) -> LlavaConfig:
    """Write everything but the weights: configuration, byte tokenizer, image processor, chat template."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

    config = LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=CLIPVisionConfig(
            hidden_size=tower.hidden,
            intermediate_size=tower.intermediate,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            image_size=tower.image,
            patch_size=tower.patch,
            projection_dim=tower.hidden,
        ),
        text_config=LlamaConfig(
            vocab_size=decoder.vocab,
            hidden_size=decoder.hidden,
            intermediate_size=decoder.intermediate,
            num_hidden_layers=decoder.layers,
            num_attention_heads=decoder.heads,
            num_key_value_heads=decoder.heads,
            max_position_embeddings=16384,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        ),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        dtype=dtype,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    edge = {"height": tower.image, "width": tower.image}
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": tower.image}, crop_size=edge),
        byte_tokenizer(),
        patch_size=tower.patch,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return config


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: needs no vocabulary file, and a prompt's length does not hang on a merge table."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        chat_template=CHAT_TEMPLATE,
    )


def _public_name(name: str) -> str:
    """The names of public LLaVA-1.5 checkpoints, which vLLM 0.32 reads; transformers 5 writes others."""
    for new, public in (
        ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(new):
            return public + name[len(new) :]
    return name


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
