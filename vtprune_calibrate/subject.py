# SPDX-License-Identifier: Apache-2.0
"""What is calibrated: a checkpoint on transformers, where any schedule can be tried, or a running server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from vllm_vtprune.fingerprint import fingerprint
from vtprune_eval.backend import Runner, RunnerError
from vtprune_eval.flops import CostShape
from vtprune_eval.server_backend import RemoteRunner
from vtprune_eval.tasks import Questions
from vtprune_eval.transformers_backend import LocalModel, LocalRunner


@dataclass(frozen=True)
class Subject:
    """A model and how it is asked.

    Attributes:
        name: of the model, for reports.
        weights: their fingerprint; None where nobody knows.
        shape: the decoder's, of which costs are counted.
        relevance: how tokens are rated: a name, or one for each prune layer, separated by commas.
        window: last prompt tokens that rate the others.
        borders: the prune layers it has; None where it can have any.
        make: a runner for some questions, and tokens of an answer at most.
    """

    name: str
    weights: str | None
    shape: CostShape
    relevance: str
    window: int
    borders: tuple[int, ...] | None
    make: Callable[[Questions, int], Runner]


def checkpoint_subject(
    checkpoint: str, config: Mapping[str, Any], relevance: str, window: int, load: Callable[[], LocalModel]
) -> Subject:
    """A checkpoint on transformers; it is loaded when it is first asked.

    Args:
        checkpoint: folder or hub id.
        config: its config.json.
        relevance: see `Subject`.
        window: see `Subject`.
        load: loads the model.
    """
    model = cache(load)

    def make(questions: Questions, limit: int) -> Runner:
        return LocalRunner(model(), questions, frozenset(), limit)

    shape = CostShape.of_config(config)
    return Subject(Path(checkpoint).name, fingerprint(checkpoint), shape, relevance, window, None, make)


def server_config(base: str, api_key: str | None) -> dict[str, Any]:
    """A server's `/vtprune/config`.

    Raises:
        httpx.HTTPError: no answer, or another status than 200.
        ValueError: no JSON.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    answer = httpx.get(f"{base}/vtprune/config", headers=headers, timeout=30.0)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def server_model(url: str, api_key: str | None) -> dict[str, Any]:
    """Name and weights of the model that a server has.

    Raises:
        RunnerError: it does not answer.
    """
    base = url.rstrip("/").removesuffix("/v1")
    try:
        model = server_config(base, api_key)["model"]
        return {"name": model["id"], "weights": model["weights"]}
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise RunnerError(
            f"{base}/vtprune/config names no model ({error!r}): name a running vtprune server of this "
            "version, and its key with --api-key."
        ) from None


def server_subject(url: str, api_key: str | None, concurrency: int) -> Subject:
    """A running server; its prune layers are the candidates, since an engine has them from its start.

    Raises:
        RunnerError: it does not answer, or its prune layers leave nothing to search.
    """
    base = url.rstrip("/").removesuffix("/v1")
    try:
        config = server_config(base, api_key)
        model, policy = config["model"], config["policy"]
        shape = CostShape.of_decoder(model["decoder"])
        layers = [(entry["layer"], entry["share"], entry["of"]) for entry in model["prune_layers"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise RunnerError(
            f"{base}/vtprune/config says nothing of prune layers ({error!r}): name a running vtprune server "
            "of this version, and its key with --api-key."
        ) from None
    if "," in policy["relevance"]:
        raise RunnerError(
            f"{base} rates tokens differently at each prune layer ({policy['relevance']}), and a schedule "
            "may leave some out: start it with one --vtprune-relevance."
        )
    if not layers or any(share < 1 or of != "vision" for _, share, of in layers):
        raise RunnerError(
            f"{base} has {'other' if layers else 'no'} prune layers than a search needs: start it with up to "
            "four that drop nothing by themselves, such as --prune-layers 8:vision=1,16:vision=1,24:vision=1."
        )

    def make(questions: Questions, limit: int) -> Runner:
        return RemoteRunner(base, questions, api_key=api_key, concurrency=concurrency, limit=limit)

    borders = tuple(layer for layer, _, _ in layers)
    return Subject(model["id"], model["weights"], shape, policy["relevance"], policy["window"], borders, make)
