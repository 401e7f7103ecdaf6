# SPDX-License-Identifier: Apache-2.0
"""The benchmark's models, servers and command lines, without starting any."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from benchmarks import models, servers
from benchmarks.arms import parse_arm, parse_arms, servers_for
from benchmarks.gpu.pack import pack_benchmarks
from benchmarks.llava import DecoderShape, random_llava
from benchmarks.machine import commit_of
from benchmarks.qwen import WindowTower, random_qwen2_5_vl
from benchmarks.servers import (
    PLAIN,
    PRUNING,
    command,
    environment,
    pruning_kv,
    running,
)
from tests.benchmarks.conftest import DECODER, TOWER
from tests.conftest import REPOSITORY
from tests.helpers.family_checkpoints import qwen2_5_vl
from vtprune_loadtest.errors import LoadTestError
from vtprune_loadtest.processes import ServerProcess


def test_a_random_checkpoint_loads_whole(tiny: Path) -> None:
    model, info = LlavaForConditionalGeneration.from_pretrained(tiny, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.text_config.num_hidden_layers == DECODER.layers
    processor = LlavaProcessor.from_pretrained(tiny)
    ids = processor.tokenizer("<image>é")["input_ids"]
    assert ids[0] == model.config.image_token_index and len(ids) == 3


def test_weights_have_the_names_that_vllm_reads_and_no_layer_is_constant(tiny: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    heads = {name.split(".")[0] for name in weights}
    assert heads == {"vision_tower", "multi_modal_projector", "language_model"}
    assert all("vision_tower.vision_model." in name for name in weights if name.startswith("vision_tower"))
    matrices = [tensor for name, tensor in weights.items() if tensor.ndim == 2]
    assert all(tensor.std() > 0.01 for tensor in matrices)


def test_the_same_seed_gives_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    random_llava(tmp_path / "again", DECODER, TOWER)
    first, again = (load_file(f / "model.safetensors") for f in (tiny, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_model_is_built_once_and_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[Path] = []

    def build(folder: Path, *_: object) -> None:
        builds.append(folder)
        (folder / "config.json").write_text("{}")
        if len(builds) == 1:
            raise RuntimeError("interrupted")

    monkeypatch.setattr(models, "random_llava", build)
    folder = tmp_path / "models" / "decoder"
    with pytest.raises(RuntimeError):
        models.decoder_150m(folder)
    assert not folder.exists() and not list(folder.parent.iterdir())
    assert models.decoder_150m(folder) == folder
    models.decoder_150m(folder)
    assert len(builds) == 2


def test_patches_per_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    monkeypatch.setattr(models, "random_llava", lambda path, decoder, tower: shapes.append((path, tower)))
    monkeypatch.setattr(models, "_once", lambda folder, build: build(folder) or folder)
    for patches in (144, 576, 1024):
        models.many_patches(tmp_path, patches)
    assert [(t.image // t.patch) ** 2 for _, t in shapes] == [144, 576, 1024]
    assert len({path for path, _ in shapes}) == 3


def test_a_random_qwen_loads_whole_and_gives_square_pictures_its_tokens(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    decoder = DecoderShape(hidden=64, intermediate=96, layers=2, heads=2, vocab=300)
    random_qwen2_5_vl(tmp_path, decoder, WindowTower(32, 64, 2, 2), vision_tokens=36)
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(tmp_path)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Well?"}]}
    text = processor.apply_chat_template([message])
    for side in (40, 336, 1000):
        inputs = processor(text=text, images=Image.new("RGB", (side, side)), return_tensors="pt")
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 36
    # temporal, row and column shares fill half a head
    rope = model.config.text_config.rope_parameters
    assert sum(rope["mrope_section"]) == decoder.hidden // decoder.heads // 2


def test_unknown_model() -> None:
    with pytest.raises(LoadTestError, match="decoder-150m"):
        models.model_named("gpt")


def test_arms() -> None:
    arms = parse_arms("vllm, off,a0.5,keep0.22+kv0.5")
    assert [arm.server for arm in arms] == ["vllm", "vtprune", "vtprune", "vtprune-kv"]
    assert arms[0].headers == ()
    assert arms[1].headers == (("X-VTPrune-Aggressiveness", "0"),)
    assert dict(arms[3].headers) == {"X-VTPrune-Keep-Ratio": "0.22", "X-VTPrune-KV-Keep": "0.5"}
    model = models.demo()
    assert [s.name for s in servers_for(arms, model)] == ["vllm", "vtprune", "vtprune-kv"]
    assert servers_for(arms[:1], model) == [PLAIN]


def test_an_arm_may_have_a_schedule() -> None:
    model = models.demo()
    arms = parse_arms("vllm,keep0.22@aim,@exit")
    assert [arm.label for arm in arms] == ["vllm", "keep0.22@aim", "@exit"]
    assert dict(arms[1].headers) == {"X-VTPrune-Keep-Ratio": "0.22", "X-VTPrune-KV-Keep": "0.999999"}
    specs = servers_for(arms, model)
    assert [(s.name, s.flags) for s in specs[1:]] == [
        ("vtprune@aim", ("--prune-layers", "aim")),
        ("vtprune@exit", ("--prune-layers", "exit")),
    ]
    for text, sentence in (
        ("keep0.22@best", "After @ stands aim"),
        ("kv0.5@aim", "in place of vllm and of kv"),
    ):
        with pytest.raises(LoadTestError, match=sentence):
            parse_arm(text)


@pytest.mark.parametrize("text", ["", "fast", "a", "0.5", "keep0.22+", "keep0.22 kv0.5"])
def test_bad_arm(text: str) -> None:
    with pytest.raises(LoadTestError, match=r"such as a0\.5"):
        parse_arm(text)


@pytest.mark.parametrize("text", ["vllm", "off,off"])
def test_an_arm_needs_another_to_compare_with(text: str) -> None:
    with pytest.raises(LoadTestError, match="two different"):
        parse_arms(text)


def test_both_servers_get_the_same_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    model = models.demo()
    plain, ours = command(PLAIN, model), command(PRUNING, model)
    assert set(model.flags) <= set(plain) and set(model.flags) <= set(ours)
    assert "vtprune_server.cli" in ours and not any("vtprune_server" in part for part in plain)
    kv = command(pruning_kv(model), model)
    assert kv[kv.index("--prune-layer") + 1] == str(model.prune_layer)
    plain_env, our_env = environment(PLAIN, model), environment(PRUNING, model)
    assert (plain_env["VLLM_PLUGINS"], our_env["VLLM_PLUGINS"]) == ("", "vtprune")
    # `vtprune serve` preloads Intel's OpenMP for its engine by itself
    differing = {k for k in plain_env | our_env if plain_env.get(k) != our_env.get(k)}
    assert differing <= {"VLLM_PLUGINS", "LD_PRELOAD"}


def test_a_server_that_dies_is_reported_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dies = [sys.executable, "-c", "raise SystemExit('no such flag')"]
    monkeypatch.setattr(servers, "command", lambda spec, model: dies)
    with pytest.raises(LoadTestError, match="no such flag"), running([PLAIN], models.demo(), tmp_path):
        pass


def until(holds: Callable[[], bool]) -> bool:
    """Whether it holds within a minute: a process that was killed is gone a moment later."""
    deadline = time.monotonic() + 60
    while not (found := holds()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def test_cpu_seconds_are_those_of_a_server_and_of_what_it_started(tmp_path: Path) -> None:
    work = "end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\ninput()"
    code = (
        f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {'import time; ' + work!r}])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}\n{work}"], stdin=subprocess.PIPE, start_new_session=True
    )
    server = ServerProcess("", process, tmp_path)
    try:
        assert until(lambda: server.cpu_seconds() >= 0.58)
        assert server.cpu_seconds() < 6 and len(server.members()) == 2
    finally:
        server.stop()
        process.communicate()
    assert until(lambda: math.isnan(server.cpu_seconds()))


def test_a_server_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    code = (
        "import http.server, subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "class Answer(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200)\n"
        "        self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[4])), Answer).serve_forever()\n"
    )
    server = ServerProcess.start([sys.executable, "-c", code], tmp_path / "log", os.environ, within_s=60)
    assert server.healthy() and len(server.members()) == 2
    server.stop()
    assert until(lambda: not server.members())


def test_the_packed_benchmarks_run_without_a_checkout(tmp_path: Path) -> None:
    pack_benchmarks(tmp_path)
    site = tmp_path / "site"
    with zipfile.ZipFile(tmp_path / "a" / "benchmarks.zip") as archive:
        archive.extractall(site)
    assert (tmp_path / "run.sh").is_file()
    # the shipped packages stand for the wheel; none of the checkout's own is among them
    for package in (REPOSITORY / "vllm_vtprune", REPOSITORY / "vtprune_loadtest"):
        (site / package.name).symlink_to(package)
    code = "from benchmarks import compare, machine as m; print(compare.__file__, m.describe()['commit'])"
    env = {**os.environ, "PYTHONPATH": str(site), "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    run = [sys.executable, "-P", "-c", code]
    told = subprocess.run(
        run, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    ).stdout.split()
    assert told[0].startswith(str(site)) and told[1] == commit_of(REPOSITORY).split()[0]


def test_smaller_pictures_are_an_arm_where_the_tower_takes_any_size(tmp_path: Path) -> None:
    arm = parse_arm("downscale0.22")
    assert (arm.server, arm.setting.pixels) == ("vtprune", 0.22)
    assert dict(arm.setting.headers) == dict(parse_arm("off").headers)
    fixed = models.demo()
    with pytest.raises(LoadTestError, match="one size, 144 tokens"):
        servers_for([arm], fixed)
    any_size = qwen2_5_vl(tmp_path / "qwen")
    own = models.model_named(str(any_size))
    assert own.name == "qwen" and own.prune_layer >= 1
    assert [spec.name for spec in servers_for([arm], own)] == ["vtprune"]
    with pytest.raises(LoadTestError, match=r"like downscale0\.22"):
        parse_arm("downscale2")
