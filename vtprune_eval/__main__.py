# SPDX-License-Identifier: Apache-2.0
"""What pruning costs in answers, on the demo model's scenes or on your own questions.

    vtprune eval --method inflection,topk,divprune --keep-ratio 0.33,0.22,0.11
    vtprune eval --aggressiveness 0.3,0.5,0.7 --kv-keep 1,0.5 --prune-layer 2 --out results
    vtprune eval --preset light,balanced,aggressive --server http://localhost:8000
    vtprune eval llava-hf/llava-1.5-7b-hf --questions mine.jsonl --device cuda --dtype float16
    vtprune eval --draw picture.png --aggressiveness 0.5
    vtprune eval --study --out docs/evaluation

Without MODEL the embedded demo model answers, on transformers. `random`, `uniform` and `downscale` (a smaller
picture) at the same counts, and the agreement with the unpruned answers, stand beside every result. Also
`python -m vtprune_eval` in a checkout. Exit status: 0, or 2 with one sentence where something cannot run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from vllm_vtprune import demo_model
from vllm_vtprune.selection import DEFAULT_METHOD, METHODS, SCORES
from vllm_vtprune.settings import KV_SCOPES, PRESETS, Controls, KVSettings, SettingsError, VisionSettings
from vtprune_eval.backend import Runner, RunnerError
from vtprune_eval.decoder import RATINGS
from vtprune_eval.draw import draw_kept
from vtprune_eval.drawn import DOMAINS
from vtprune_eval.measure import evaluate
from vtprune_eval.pictures import outputs_for
from vtprune_eval.plots import plot_accuracy, series_by_method
from vtprune_eval.report import dump
from vtprune_eval.scenes import BASE_SIZE, SPLITS
from vtprune_eval.server_backend import RemoteRunner
from vtprune_eval.setting import DOWNSCALE, Setting
from vtprune_eval.study import StudySize, run_study
from vtprune_eval.tables import by_kind, content, summary
from vtprune_eval.tasks import DataError, Questions, drawn_questions, file_questions
from vtprune_eval.transformers_backend import LocalModel, LocalRunner

DEMO_MODEL = demo_model.FOLDER
CANNOT_RUN = 2


def main(argv: Sequence[str] | None = None, prog: str = "vtprune eval") -> int:
    """Run the command line; gives the exit status."""
    options = _parser(prog).parse_args(argv)
    disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
        if options.draw:
            _draw(options)
        elif options.study:
            _study(options)
        else:
            _evaluate(options)
    except (RunnerError, DataError, SettingsError, OSError, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return CANNOT_RUN
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    settings = _settings(options)
    runner = _runner(options, settings)
    document = evaluate(runner, settings, _progress, () if options.no_baselines else None)
    rows = document["rows"]
    print("", *filter(None, (summary(document), by_kind(rows), content(rows))), sep="\n\n")
    if options.out is None:
        return
    path = options.out / "evaluation.json"
    path.write_text(dump(document), encoding="utf-8")
    print(f"wrote {path}")
    try:
        title = f"{document['model']}, {document['questions']['name']}"
        plot = plot_accuracy(
            series_by_method(rows), rows[0]["accuracy"], title, options.out / "evaluation.png"
        )
        print(f"wrote {plot}")
    except ImportError:
        print("No plot: matplotlib is not installed (pip install 'vtprune[bench]').", file=sys.stderr)


def _study(options: argparse.Namespace) -> None:
    if options.out is None or options.server:
        raise ValueError("--study needs --out, and runs on transformers: leave out --server.")
    size = StudySize(options.scenes, options.validation_scenes, options.deciding_scenes)
    for path in run_study(_model(options), size, options.out, _progress):
        print(f"wrote {path}")


def _draw(options: argparse.Namespace) -> None:
    model, folder = _model(options), options.out or Path()
    for setting in _settings(options):
        for source in options.draw:
            with Image.open(source) as image:
                amount = setting.label.replace(" ", "_").replace("=", "")
                print(draw_kept(model, image, setting, folder / f"{source.stem}-{amount}.png"))


def _settings(options: argparse.Namespace) -> list[Setting]:
    """Every combination of the values given."""
    layers = options.prune_layer or [None]
    if options.preset:
        return [Setting.preset(name, layer) for name, layer in product(options.preset, layers)]
    if options.aggressiveness and options.keep_ratio:
        raise ValueError(
            "--aggressiveness and --keep-ratio exclude each other: run them one after the other."
        )
    amounts: list[dict[str, Any]] = [{"keep_ratio": r, "aggressiveness": None} for r in options.keep_ratio]
    amounts = amounts or [{"aggressiveness": a} for a in options.aggressiveness or [0.0]]
    visions = [
        VisionSettings(method=method, score=options.score, **amount)
        for method, amount in product(options.method, amounts)
    ]
    drops = product(options.kv_keep, options.kv_scope, layers, options.window, options.relevance)
    settings = [
        Setting(vision, KVSettings(keep, scope), layer, window, relevance)
        for vision, (keep, scope, layer, window, relevance) in product(visions, list(drops))
    ]
    # without dropping, stage 2's other settings make no difference
    once = {
        (s.vision, (s.kv, s.prune_layer, s.window, s.relevance) if s.kv.drops else None): s for s in settings
    }
    return list(once.values())


def _runner(options: argparse.Namespace, settings: list[Setting]) -> Runner:
    if options.server:
        questions = _questions(options, BASE_SIZE)
        return RemoteRunner(
            options.server,
            questions,
            model=options.model,
            api_key=options.api_key,
            concurrency=options.concurrency,
            limit=options.max_tokens,
        )
    model = _model(options)
    outputs = outputs_for([setting.counted for setting in settings])
    return LocalRunner(model, _questions(options, model.image_size), outputs, options.max_tokens)


def _model(options: argparse.Namespace) -> LocalModel:
    return LocalModel(options.model or str(DEMO_MODEL), options.device, getattr(torch, options.dtype))


def _questions(options: argparse.Namespace, size: int) -> Questions:
    if options.questions is not None:
        return file_questions(options.questions, options.suffix)
    return drawn_questions(options.split, options.scenes, size, options.domain)


def _progress(line: str) -> None:
    print(line, flush=True)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder or hub id; a served name with --server"
    )
    what = parser.add_argument_group("what is asked")
    what.add_argument("--questions", type=Path, help="JSON lines with image, question, answer and kind")
    what.add_argument("--suffix", default="", help="text added to each question of the file")
    what.add_argument("--split", choices=tuple(SPLITS), default="test", help="of the drawn scenes")
    what.add_argument("--scenes", type=int, default=300, help="drawn pictures to ask about")
    what.add_argument("--domain", choices=DOMAINS, default="scenes", help="what is drawn")
    how = parser.add_argument_group("how it is pruned (comma-separated values make a grid)")
    how.add_argument("--preset", type=_names(PRESETS), default=[], help="instead of the options below")
    how.add_argument("--method", type=_names((*METHODS, DOWNSCALE)), default=[DEFAULT_METHOD])
    how.add_argument("--aggressiveness", type=_numbers("aggressiveness"), default=[])
    how.add_argument("--keep-ratio", type=_numbers("keep_ratio"), default=[])
    how.add_argument("--score", choices=tuple(SCORES), default="cosine")
    how.add_argument("--kv-keep", type=_numbers("kv_keep"), default=[1.0])
    how.add_argument("--kv-scope", type=_names(KV_SCOPES), default=["all"])
    how.add_argument("--prune-layer", type=_counts, default=[], help="K; a server has its own")
    how.add_argument("--window", type=_counts, default=[8])
    how.add_argument("--relevance", type=_names(RATINGS), default=["attention"])
    how.add_argument("--no-baselines", action="store_true", help="run nothing else at the same counts")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--server", metavar="URL", help="a running vtprune server, instead of transformers")
    where.add_argument("--api-key", help="the server's")
    where.add_argument("--concurrency", type=int, default=8, help="requests in flight to the server")
    where.add_argument("--device", default="cpu")
    where.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    where.add_argument("--threads", type=int, default=0, help="0 leaves it to torch")
    where.add_argument("--max-tokens", type=int, default=16, help="of an answer")
    out = parser.add_argument_group("what comes out")
    out.add_argument("--out", type=Path, help="folder for the JSON and the plots")
    out.add_argument(
        "--draw", type=Path, nargs="+", metavar="PICTURE", help="draw curve and kept patches instead"
    )
    out.add_argument("--study", action="store_true", help="calibrate and compare everything: docs/evaluation")
    out.add_argument("--validation-scenes", type=int, default=300, help="of the study's calibration")
    out.add_argument("--deciding-scenes", type=int, default=100, help="of its choice of stage 2's defaults")
    return parser


def _names(known: Any) -> Any:
    def names(text: str) -> list[str]:
        wanted = list(known) if text == "every" else text.split(",")
        for name in wanted:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of every, {', '.join(known)}")
        return wanted

    return names


def _numbers(field: str) -> Any:
    def numbers(text: str) -> list[float]:
        try:
            # the server's own rules for the field
            return [
                Controls.from_mapping({field: float(part)}, "--").get(field, 0.0) for part in text.split(",")
            ]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return numbers


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers of at least 1")
    return counts


if __name__ == "__main__":
    sys.exit(main())
