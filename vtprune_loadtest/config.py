# SPDX-License-Identifier: Apache-2.0
"""Everything that defines one load test, checked."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from vtprune_loadtest.arrivals import ArrivalProcess
from vtprune_loadtest.asking import QuestionBook
from vtprune_loadtest.client import Endpoint
from vtprune_loadtest.images import PictureSource
from vtprune_loadtest.plan import Amount, Interleave, LoadPoint
from vtprune_loadtest.sweep import SweepSetting
from vtprune_loadtest.workload import IntRange


class IgnoreEos(StrEnum):
    """Whether answers run to their full length; `ignore_eos` is vLLM's own field, others may refuse it."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True)
class LoadTestConfig:
    """One load test.

    Attributes:
        model: None for the first one the server lists.
        include_usage: ask for the usage chunk; without it output tokens are counted by chunks.
        extra_body: fields added to every request's body.
        questions: asked and graded instead of drawn pictures and `prompt`; None without any.
        repeat_share: share of pictures sent before by the same setting.
        warmup: requests per setting and load point, left out of the statistics.
        ramp_s: seconds in which the load rises at the start of each measured phase, left out too.
        rounds: phases per setting where settings are interleaved by blocks.
        slo: upper limits in milliseconds by `ttft`, `tpot`, `e2el`.
        max_error_share: above this share of failed requests the exit status is 1.
        server_counters: print how much the server's counters grew.
        ready_timeout_s: how long to wait for a server that is still starting.
    """

    endpoint: Endpoint
    model: str | None
    settings: list[SweepSetting]
    points: list[LoadPoint]
    amount: Amount
    interleave: Interleave
    rounds: int
    warmup: int
    ramp_s: float
    process: ArrivalProcess
    questions: QuestionBook | None
    pictures: PictureSource
    images_per_prompt: IntRange
    repeat_share: float
    prompt: str
    prompt_words: int
    output_len: IntRange
    temperature: float
    ignore_eos: IgnoreEos
    include_usage: bool
    extra_body: dict[str, Any]
    slo: dict[str, float]
    max_error_share: float
    seed: int
    ready_timeout_s: float
    result_dir: Path | None
    plots: bool
    server_counters: bool
    progress: bool
    arguments: dict[str, Any]  # as given on the command line, secrets left out, for the result file
