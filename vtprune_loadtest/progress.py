# SPDX-License-Identifier: Apache-2.0
"""A progress bar on a terminal, nothing anywhere else."""

import sys
from typing import Any

from vtprune_loadtest.record import RequestRecord
from vtprune_loadtest.session import Progress


class TerminalProgress(Progress):
    """A bar on standard error per load point; silent where standard error is no terminal."""

    def __init__(self) -> None:
        """Nothing is shown before the first load point."""
        self._bar: Any = None
        self._failed = 0

    def expect(self, requests: int | None, what: str) -> None:
        """Close the last load point's bar and open this one's."""
        self.close()
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm  # type: ignore[import-untyped]  # comes with vLLM; only a terminal needs it

        self._failed = 0
        self._bar = tqdm(total=requests, desc=what, unit="req", file=sys.stderr)

    def done(self, record: RequestRecord) -> None:
        """Advance the bar."""
        if self._bar is None:
            return
        if not record.ok:
            self._failed += 1
            self._bar.set_postfix_str(f"{self._failed} failed", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leave the last bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
