# SPDX-License-Identifier: Apache-2.0
"""What is compared: arms, each a server and the headers its requests carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import AutoConfig

from benchmarks.models import BenchModel
from benchmarks.servers import PLAIN, PRUNING, ServerSpec, pruning_kv
from vllm_vtprune.contract import HEADERS
from vllm_vtprune.families.registry import family_of
from vllm_vtprune.kv_drop.schedule import NAMED, is_reference
from vtprune_loadtest.errors import LoadTestError
from vtprune_loadtest.sweep import DOWNSCALE, SweepSetting, parse_settings

#: Spelling of an arm's parts -> the header that carries the number after it.
_HEADERS = {"a": HEADERS["aggressiveness"], "keep": HEADERS["keep_ratio"], "kv": HEADERS["kv_keep"]}


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        label: as the reports call it; also how it is spelt on the command line.
        server: the name of its server.
        headers: of its requests.
        pixels: share of each picture's pixels that is sent.
        schedule: of its server, by name or file; empty where it has one prune layer or none.
    """

    label: str
    server: str
    headers: tuple[tuple[str, str], ...] = ()
    pixels: float = 1.0
    schedule: str = ""

    @property
    def setting(self) -> SweepSetting:
        """The arm as the load tester knows it."""
        return SweepSetting(self.label, self.headers, pixels=self.pixels)


def parse_arm(text: str) -> Arm:
    """Read `vllm` (no plugin), `off` (plugin loaded, nothing pruned), or parts such as `keep0.22+kv0.5`.

    `downscale0.22` is `off` with pictures of 0.22 times the pixels: as few tokens without a pruning rule. The
    parts are `a` (aggressiveness), `keep` (fixed share of the vision tokens) and `kv` (share of the prompt
    above the prune layer). An arm with a `kv` part runs on a server with a prune layer. `@` and a schedule's
    name or file at the end, as in `keep0.22@aim`, is a server with that schedule, taken as it is.

    Raises:
        LoadTestError: not of that form.
    """
    text, _, schedule = text.partition("@")
    if schedule:
        return _scheduled(text, schedule)
    if text == "vllm":
        return Arm(text, PLAIN.name)
    if text == "off":
        return Arm(text, PRUNING.name, ((_HEADERS["a"], "0"),))
    if text.startswith(DOWNSCALE):
        (setting,) = parse_settings(text, ())
        return Arm(text, PRUNING.name, ((_HEADERS["a"], "0"),), pixels=setting.pixels)
    headers = []
    for part in text.split("+"):
        name = part.rstrip("0123456789.")
        number = part[len(name) :]
        if name not in _HEADERS or not number:
            raise LoadTestError(
                f"An arm is vllm, off, {DOWNSCALE}0.22, or parts such as a0.5, keep0.22 or keep0.22+kv0.5, "
                f"not {text!r}."
            )
        headers.append((_HEADERS[name], number))
    has_kv = any(name == _HEADERS["kv"] for name, _ in headers)
    return Arm(text, "vtprune-kv" if has_kv else PRUNING.name, tuple(headers))


def _scheduled(text: str, schedule: str) -> Arm:
    if not is_reference(schedule):
        raise LoadTestError(f"After @ stands {', '.join(NAMED)} or a JSON file, not {schedule!r}.")
    below = parse_arm(text or "off")
    if below.server != PRUNING.name:
        raise LoadTestError(f"{text}@{schedule}: a schedule stands in place of vllm and of kv parts.")
    headers = (*below.headers, (_HEADERS["kv"], "0.999999"))
    return Arm(f"{text}@{schedule}", f"vtprune@{schedule}", headers, schedule=schedule)


def parse_arms(text: str) -> list[Arm]:
    """Read arms separated by commas; the first is the one that all others are compared with.

    Raises:
        LoadTestError: fewer than two, one twice, or one of another form.
    """
    arms = [parse_arm(part.strip()) for part in text.split(",")]
    labels = [arm.label for arm in arms]
    if len(arms) < 2 or len(set(labels)) != len(labels):
        raise LoadTestError(
            f"--arms takes two different arms or more, such as vllm,off,keep0.22; it got {text!r}."
        )
    return arms


def servers_for(arms: Sequence[Arm], model: BenchModel) -> list[ServerSpec]:
    """The servers that the arms run on.

    Raises:
        LoadTestError: an arm sends smaller pictures, and the model's tower resizes all to one size.
    """
    smaller = next((arm.label for arm in arms if arm.pixels < 1), None)
    tokens = None if smaller is None else family_of(AutoConfig.from_pretrained(model.folder)).places()
    if tokens is not None:
        raise LoadTestError(
            f"The arm {smaller!r} cannot be measured on {model.name}: its tower resizes every picture to one "
            f"size, {tokens} tokens whatever the picture. Leave it out, or measure a model whose tower takes "
            "pictures of any size (--model FOLDER of a Qwen-VL or LLaVA-NeXT)."
        )
    wanted = {arm.server for arm in arms}
    scheduled = {
        arm.server: ServerSpec(arm.server, plugin=True, flags=("--prune-layers", arm.schedule))
        for arm in arms
        if arm.schedule
    }
    return [spec for spec in (PLAIN, PRUNING, pruning_kv(model), *scheduled.values()) if spec.name in wanted]
