# SPDX-License-Identifier: Apache-2.0
"""Trials that are done, a line each, so that an interrupted calibration goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vllm_vtprune.errors import VTPruneError
from vtprune_eval.backend import Reply


class JournalError(VTPruneError, ValueError):
    """A journal that belongs to another run; the message says what to do."""


#: The numbers of a reply, but for the last, which is a tuple.
_COUNTS = tuple(field.name for field in fields(Reply) if field.name not in ("text", "kept_above"))


class Journal:
    """Replies by a trial's key, in a file of JSON lines whose first says what they belong to."""

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """Read what is there, or begin.

        Args:
            path: the file.
            run: what decides an answer beside the trial's key: model, weights, questions, ...

        Raises:
            JournalError: the file is another run's, or cannot be read.
        """
        self._path = path
        self._done: dict[str, list[Reply]] = {}
        header = json.loads(json.dumps(run))
        if path.exists():
            self._read(header)
        else:
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        """Trials that are done."""
        return len(self._done)

    def get(self, key: str) -> list[Reply] | None:
        """The replies of a trial; None where it is not done."""
        return self._done.get(key)

    def put(self, key: str, replies: Sequence[Reply]) -> None:
        """Note a trial's replies; they are on disk when this returns."""
        self._done[key] = list(replies)
        # a reply's numbers repeat from question to question
        kinds = list(dict.fromkeys(_numbers(reply) for reply in replies))
        place = {kind: at for at, kind in enumerate(kinds)}
        rows = [[reply.text, place[_numbers(reply)]] for reply in replies]
        line = json.dumps({"key": key, "counts": kinds, "replies": rows})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _read(self, header: Any) -> None:
        text = self._path.read_text(encoding="utf-8")
        # what follows the last line end was being written when the run stopped
        lines = text[: text.rfind("\n") + 1].splitlines()
        try:
            first, *rest = [json.loads(line) for line in lines]
            done = {
                entry["key"]: [_reply(row, entry["counts"]) for row in entry["replies"]] for entry in rest
            }
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise JournalError(
                f"{self._path} is no journal of a calibration ({error!r}): move it away, or give another "
                "--out."
            ) from None
        if first != header:
            names = sorted({*first, *header}) if isinstance(first, dict) else []
            other = [name for name in names if first.get(name) != header.get(name)]
            raise JournalError(
                f"{self._path} belongs to a calibration with another {', '.join(other)}: move it away to "
                "start anew, or give another --out."
            )
        self._done = done
        if len(text) > text.rfind("\n") + 1:
            self._path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _numbers(reply: Reply) -> tuple[Any, ...]:
    return tuple(value for name, value in asdict(reply).items() if name != "text")


def _reply(row: Sequence[Any], kinds: Sequence[Sequence[Any]]) -> Reply:
    text, at = row
    *numbers, above = kinds[at]
    counts = dict(zip(_COUNTS, numbers, strict=True))
    return Reply(text=text, **counts, kept_above=tuple(above))
