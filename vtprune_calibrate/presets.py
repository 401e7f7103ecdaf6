# SPDX-License-Identifier: Apache-2.0
"""The presets' aggressiveness for the user's pictures: `vtprune calibrate --presets`.

A preset is named for a share of the vision tokens, and asks for it by an aggressiveness, since the inflection
rule gives a crowded picture more than an empty one. Which aggressiveness keeps that share on average depends
on the tower and the pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_vtprune.contract import PRESETS
from vtprune_calibrate import document
from vtprune_calibrate.plots import plot_presets
from vtprune_eval.calibrate import Calibration, calibrate, view_scores
from vtprune_eval.pictures import EncodedPictures
from vtprune_eval.server_backend import RemoteRunner
from vtprune_eval.study import SHARES
from vtprune_eval.tables import markdown


def calibrated(pictures: EncodedPictures | RemoteRunner) -> Calibration:
    """For pictures encoded here, or rated by a server, whatever family it serves."""
    if isinstance(pictures, EncodedPictures):
        return calibrate(view_scores(pictures), SHARES.values())
    scores = [[torch.tensor(view) for view in picture] for picture in pictures.view_scores()]
    return calibrate(scores, SHARES.values())


def amounts(found: Calibration) -> dict[str, float]:
    """Preset to the aggressiveness that keeps its share."""
    return {name: found.chosen[share] for name, share in SHARES.items()}


def flag(found: Mapping[str, float]) -> str:
    """The operator's flag that has presets act so."""
    return "--vtprune-preset-aggressiveness " + ",".join(f"{name}={value:g}" for name, value in found.items())


def run_presets(
    pictures: EncodedPictures | RemoteRunner,
    facts: Mapping[str, Any],
    folder: Path,
    say: Callable[[str], None],
) -> list[Path]:
    """Find the presets alone; writes presets.json and presets.png, and returns their paths.

    Args:
        pictures: encoded here, or to be explained by a server.
        facts: of model and data, for the file.
        folder: where to.
        say: is told the table and the flag.
    """
    found = calibrated(pictures)
    chosen = amounts(found)
    rows = [
        [
            name,
            f"{share:.0%}",
            f"{chosen[name]:g}",
            f"{found.shares[chosen[name]]:.1%}",
            f"{found.shares[PRESETS[name].aggressiveness]:.1%}",
        ]
        for name, share in SHARES.items()
    ]
    heads = ["preset", "share", "aggressiveness", "keeps", "as built in keeps"]
    say(markdown(heads, rows))
    say(flag(chosen))
    content = {
        "presets": chosen,
        "shares_kept": {f"{amount:g}": round(share, 5) for amount, share in found.shares.items()},
        **document.facts_of_run(facts),
    }
    paths = [document.write(content, folder / "presets.json")]
    try:
        paths.append(plot_presets(found, SHARES, str(facts["model"]["name"]), folder / "presets.png"))
    except ImportError:
        say("presets.png needs matplotlib, which is not installed here.")
    return paths
