# SPDX-License-Identifier: Apache-2.0
"""The result document: every setting at every load point, each with the keys of `vllm bench serve`."""

import os
import platform
from typing import Any

import numpy as np

from vtprune_loadtest.arrivals import ArrivalProcess
from vtprune_loadtest.caches import cache_note, cache_use
from vtprune_loadtest.comparison import (
    answered_per_busy_second,
    answered_per_second,
    in_groups,
    mean_latency,
    ratio_to_first,
)
from vtprune_loadtest.config import LoadTestConfig
from vtprune_loadtest.metrics import at_equal_concurrency, summarise
from vtprune_loadtest.plan import Interleave
from vtprune_loadtest.prometheus import add_counters
from vtprune_loadtest.record import RequestRecord, Role
from vtprune_loadtest.runner import PhaseResult
from vtprune_loadtest.session import PointResult, SessionResult

Document = dict[str, Any]
_BUSY_CLIENT = 0.9  # share of one core
_LATE_MS = 20.0
_REQUESTS_PER_SLOT = 4


def build_document(config: LoadTestConfig, session: SessionResult) -> Document:
    """The JSON-ready result of a run."""
    results: list[Document] = []
    points: list[Document] = []
    notes: list[str] = []
    for point in session.points:
        entries = _point_results(config, session, point)
        results.extend(entries)
        points.append(_point_document(point))
        if points[-1].get("cache_use", {}).get("beyond_what_was_asked"):
            notes.append(f"{point.point.describe()}: {cache_note(points[-1]['cache_use'])}")
        notes.extend(_notes(config, point, entries))
    return {
        "date": session.started.isoformat(timespec="seconds"),
        "model_id": session.model,
        "server": session.server,
        "client": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu_count": os.cpu_count(),
        },
        "arguments": config.arguments,
        "interrupted": session.interrupted,
        "notes": list(dict.fromkeys(notes)),
        "load_points": points,
        "results": results,
    }


def error_share(document: Document) -> float:
    """Failed requests over all measured ones; 1 if nothing was measured."""
    failed = sum(entry["failed"] for entry in document["results"])
    total = failed + sum(entry["completed"] for entry in document["results"])
    return failed / total if total else 1.0


def _point_results(config: LoadTestConfig, session: SessionResult, point: PointResult) -> list[Document]:
    entries: list[Document] = []
    for index, setting in enumerate(config.settings):
        phases = [p for p in point.phases if p.phase.role is Role.MEASURED and index in p.phase.settings]
        records = [r for p in phases for r in _measured(p) if r.setting == setting.label]
        if not phases:
            continue
        load = point.point
        entry: Document = {
            "date": session.started.strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": "openai-chat",
            "backend": "openai-chat",
            "label": setting.label,
            "model_id": session.model,
            "tokenizer_id": None,
            "num_prompts": len(records),
            "request_rate": "inf" if load.rate is None else load.rate,
            "burstiness": 1.0 if config.process is ArrivalProcess.POISSON else "inf",
            "max_concurrency": load.concurrency,
            "setting": setting.label,
            "setting_headers": dict(setting.headers),
            "picture_pixels": setting.pixels,
            "interleave": config.interleave.value,
        }
        if setting.stands_for:
            entry["stands_for"] = list(setting.stands_for)
        entry |= summarise(records, sum(p.duration_s for p in phases), config.slo, not load.is_closed)
        if all(p.phase.settings == (index,) for p in phases):
            entry |= _own_phases(phases)
        entries.append(entry)
    if config.interleave is Interleave.REQUESTS and point.point.is_closed and len(entries) > 1:
        at_equal_concurrency(entries)
    _compare(config, point, entries)
    return entries


def _compare(config: LoadTestConfig, point: PointResult, entries: list[Document]) -> None:
    """Add each setting's ratio to the first: of throughputs in a closed loop, of latencies in an open one."""
    phases = [phase for phase in point.phases if phase.phase.role is Role.MEASURED]
    by_blocks = config.interleave is Interleave.BLOCKS
    is_closed = point.point.is_closed

    def value(records: list[RequestRecord], duration_s: float) -> float:
        if not is_closed:
            return mean_latency(records)
        return answered_per_second(records, duration_s) if by_blocks else answered_per_busy_second(records)

    def pieces(setting: str) -> list[float]:
        own = [
            ([record for record in _measured(phase) if record.setting == setting], phase.duration_s)
            for phase in phases
        ]
        if by_blocks:
            return [value(records, duration_s) for records, duration_s in own if records]
        return [value(group, 0.0) for records, _ in own for group in in_groups(records)]

    measure = "mean_e2el_ms" if not is_closed else "request_throughput"
    if is_closed and not by_blocks:
        measure += "_at_equal_concurrency"
    for entry in entries[1:]:
        entry["ratio_to_first"] = ratio_to_first(
            measure,
            "round" if by_blocks else "group",
            pieces(entry["setting"]),
            pieces(entries[0]["setting"]),
        )


def _own_phases(phases: list[PhaseResult]) -> Document:
    """What only phases of a single setting can tell: the server's counters, and the phases' spread."""
    rows = []
    for phase in phases:
        done = [record for record in _measured(phase) if record.ok]
        row = {"duration": phase.duration_s, "completed": len(done)}
        if phase.duration_s:
            row["request_throughput"] = len(done) / phase.duration_s
            row["output_throughput"] = sum(record.output_tokens for record in done) / phase.duration_s
        rows.append(row)
    document: Document = {"phases": rows}
    for key in ("request_throughput", "output_throughput"):
        throughputs = [row[key] for row in rows if key in row]
        if len(throughputs) > 1:
            document[f"{key}_std_over_phases"] = float(np.std(throughputs, ddof=1))
    if (counters := _counters(phases)) is not None:
        document["server_metrics"] = counters
    return document


def _point_document(point: PointResult) -> Document:
    measured = [phase for phase in point.phases if phase.phase.role is Role.MEASURED]
    document: Document = {
        "load": point.point.describe(),
        "request_rate": "inf" if point.point.rate is None else point.point.rate,
        "max_concurrency": point.point.concurrency,
        "client_cpu_share": point.client_cpu_share,
    }
    if (counters := _counters(measured)) is not None:
        document["server_metrics"] = counters
        sent = [record for phase in measured for record in phase.records]
        if (use := cache_use(counters, sent)) is not None:
            document["cache_use"] = use
    return document


def _counters(phases: list[PhaseResult]) -> dict[str, float] | None:
    deltas = [phase.counters for phase in phases if phase.counters is not None]
    return add_counters(deltas) if deltas and len(deltas) == len(phases) else None


def _measured(phase: PhaseResult) -> list[RequestRecord]:
    return [record for record in phase.records if record.role is Role.MEASURED]


def _notes(config: LoadTestConfig, point: PointResult, entries: list[Document]) -> list[str]:
    """Sentences about how far the numbers can be trusted."""
    notes = [
        f"{point.point.describe()}: ended early ({phase.cut_short})"
        for phase in point.phases
        if phase.cut_short is not None
    ]
    measured = [phase for phase in point.phases if phase.phase.role is Role.MEASURED]
    if len(entries) > 1 and config.interleave is Interleave.REQUESTS:
        notes.append(
            "The settings took turns in one stream of requests: latencies compare them under the same mixed "
            "load, but throughput per setting is a share of the mix and not what a setting reaches alone. "
            + (
                "The rows 'at equal concurrency' correct for that by Little's law; --interleave blocks "
                "measures it."
                if point.point.is_closed
                else "--interleave blocks loads the server with one setting at a time."
            )
        )
    notes.extend(
        f"{entry['setting']!r} was run once for {', '.join(entry['stands_for'])}: they cannot differ."
        for entry in entries
        if "stands_for" in entry
    )
    notes.extend(_notes_on_answers(config, point, entries))
    slots = point.point.concurrency
    if (
        point.point.is_closed
        and slots
        and any(len(_measured(p)) < _REQUESTS_PER_SLOT * slots for p in measured)
    ):
        notes.append(
            f"{point.point.describe()}: a phase has under {_REQUESTS_PER_SLOT} requests per slot, so "
            "filling and draining weigh on its throughput; raise --num-prompts or --duration, or lower "
            "--rounds."
        )
    if point.client_cpu_share > _BUSY_CLIENT:
        notes.append(
            f"{point.point.describe()}: this client used {point.client_cpu_share:.0%} of a core and may have "
            "been the bottleneck."
        )
    late = max((entry.get("p99_client_queue_time_ms") or 0.0 for entry in entries), default=0.0)
    if slots is None and late > _LATE_MS:
        notes.append(
            f"{point.point.describe()}: the client sent late, by {late:.0f} ms at the 99th percentile."
        )
    answers = [record for phase in measured for record in _measured(phase) if record.ok]
    if any(record.prompt_tokens is None for record in answers):
        notes.append(
            "The server sent no usage: output tokens were counted by chunks, input tokens are unknown."
        )
    return notes


def _notes_on_answers(config: LoadTestConfig, point: PointResult, entries: list[Document]) -> list[str]:
    """How far the share of right answers can be trusted."""
    if config.questions is None:
        return []
    where = point.point.describe()
    notes = []
    if failed := sum(entry["failed"] for entry in entries):
        notes.append(
            f"{where}: {failed} requests got no answer; they are neither right nor wrong, and the share of "
            "right answers is of the others."
        )
    if cut_off := sum(entry.get("answers_cut_off", 0) for entry in entries):
        notes.append(
            f"{where}: {cut_off} answers were cut off and graded as they stood; raise --output-len "
            f"({config.arguments['output_len']})."
        )
    measured = [record for phase in point.phases for record in _measured(phase)]
    if repeated := sum(record.repeated_images for record in measured):
        notes.append(
            f"{where}: {repeated} of {len(measured)} pictures had been sent before, and the server's caches "
            f"may have answered for them: --questions has {config.questions.pictures} pictures, give it more."
        )
    return notes
