# SPDX-License-Identifier: Apache-2.0
"""What pruning costs the small Qwen3-VL: `python -m demo.study_qwen3_vl DIR/export --out FOLDER`.

Without CLS a unit's score is the attention it receives. Does its knee see what matters? Every method that
works with this family stands beside random choice, an even grid and the plainest rival, the picture itself
made smaller to as many tokens, on drawn scenes and on pages. Validation pictures decide the aggressiveness
at which the inflection rule keeps a third, 22 % and 11 %; test pictures report. Writes `results.md`,
`results.json` and a plot for each domain.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.qwen3_vl import SIDES, unit_patches
from demo.qwen3_vl_runner import Qwen3VLRunner
from vllm_vtprune.settings import VisionSettings
from vllm_vtprune.vision.features import needs_of, servable_methods
from vtprune_eval.calibrate import calibrate, objects_kept, view_scores
from vtprune_eval.drawn import DOMAINS
from vtprune_eval.measure import evaluate
from vtprune_eval.plots import ADAPTIVE, plot_accuracy, series_by_method
from vtprune_eval.report import dump, stage1
from vtprune_eval.scenes import PATCH
from vtprune_eval.setting import DOWNSCALE, Setting
from vtprune_eval.study import SHARES
from vtprune_eval.tables import by_kind, percent

#: Methods that are another's equal here: the first under a fixed share, the other for videos alone.
_SAME = ("inflection", "inflection_temporal")
#: Who choose as many as the knee says; random choice and an even grid take that many too.
_AT_THE_KNEE = ("inflection", "inflection_diverse", "density_peaks", "cdpruner")


@torch.no_grad()
def study(folder: Path, domain: str, side: int, pictures: int, validation: int) -> dict[str, Any]:
    """One domain's rows, under fixed shares and under the inflection rule's own counts."""
    needs = frozenset({"received"})
    deciding = Qwen3VLRunner(folder, "validation", validation, side, domain, needs)
    family = deciding.pictures.encoder.family
    score = family.default_score
    chosen = calibrate(view_scores(deciding.pictures, score), SHARES.values()).chosen
    names = [name for name in servable_methods(family) if name not in _SAME]
    fixed = [
        VisionSettings(method=name, aggressiveness=None, keep_ratio=share, score=score)
        for share, name in product(SHARES.values(), (*names, DOWNSCALE))
    ]
    adaptive = [
        VisionSettings(method=name, aggressiveness=chosen[share], score=score)
        for share, name in product(SHARES.values(), _AT_THE_KNEE)
    ]
    methods = [vision for vision in (*fixed, *adaptive) if vision.method != DOWNSCALE]
    runner = Qwen3VLRunner(folder, "test", pictures, side, domain, needs_of(methods))
    found = {
        "fixed": evaluate(runner, map(Setting, fixed), print),
        "adaptive": evaluate(runner, map(Setting, adaptive), print),
    }
    owner = runner.questions.owner
    assert owner is not None  # drawn pictures have one
    # a unit's is that of any of its patches
    units = owner[:, unit_patches(side // PATCH).numpy()].max(-1)
    for document in found.values():
        for row in document["rows"][1:]:
            asked = row["setting"]
            if asked["method"] != DOWNSCALE:
                vision = VisionSettings(
                    asked["method"], asked["aggressiveness"], asked["keep_ratio"], score=score
                )
                row["objects"] = objects_kept(runner.pictures, vision, units)
    shown = float(np.mean(units >= 0))
    amounts = {name: chosen[share] for name, share in SHARES.items()}
    return {"score": score, "aggressiveness": amounts, "object_units": round(shown, 4), **found}


def page(result: dict[str, Any]) -> str:
    """results.md."""
    parts = [
        "# A small Qwen3-VL",
        f"Made by `python -m demo.study_qwen3_vl` on {result['date']} with torch {result['torch']}, weights "
        f"{result['sha256']}, pictures of {result['side']} pixels. Brackets are 95 % intervals (bootstrap "
        "over pictures; differences are paired, in points); a star marks one whose interval excludes "
        "0.",
    ]
    for domain, part in result["domains"].items():
        asked, amounts = part["fixed"]["questions"], part["aggressiveness"]
        told = ", ".join(f"{name} {amount:g}" for name, amount in amounts.items())
        parts += [
            f"## {domain.capitalize()}",
            f"{asked['pictures']} test pictures, {asked['asked']} questions; "
            f"{percent(part['object_units'])} of the units show something that is asked about. Score: "
            f"`{part['score']}`.",
            by_kind(part["fixed"]["rows"][:1]),
            "### Every method at the same share of every picture",
            stage1(part["fixed"]["rows"]),
            "### The inflection rule's own counts",
            f"The aggressiveness is calibrated on validation pictures ({told}).",
            stage1(part["adaptive"]["rows"]),
            by_kind(part["adaptive"]["rows"]),
        ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, run and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the exported checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and plots")
    parser.add_argument("--pictures", type=int, default=300, help="of the test split; default: %(default)s")
    parser.add_argument("--validation", type=int, default=200, help="that decide; default: %(default)s")
    parser.add_argument("--side", type=int, default=max(SIDES), help="of a picture; default: %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256((options.folder / "model.safetensors").read_bytes()).hexdigest()[:16]
    domains = {
        domain: study(options.folder, domain, options.side, options.pictures, options.validation)
        for domain in DOMAINS
    }
    result = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "sha256": digest,
        "side": options.side,
        "domains": domains,
    }
    (options.out / "results.json").write_text(dump(result), encoding="utf-8")
    (options.out / "results.md").write_text(page(result), encoding="utf-8")
    for domain, part in domains.items():
        rows = part["fixed"]["rows"]
        series = series_by_method(rows)
        for name, points in series_by_method(part["adaptive"]["rows"], baselines=False).items():
            series[name + ADAPTIVE] = points
        title = f"A small Qwen3-VL, {domain}: {part['fixed']['questions']['asked']} questions"
        plot_accuracy(series, rows[0]["accuracy"], title, options.out / f"accuracy-{domain}.png")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
