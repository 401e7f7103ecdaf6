# SPDX-License-Identifier: Apache-2.0
"""`vtprune serve`, in which the preset `auto` judges by the load that a file tells, not the real one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vtprune_server.serve import prepare_environment

#: The variable that names the file: JSON with the fields of `vtprune_server.auto.Load`.
LOAD_FILE = "TEST_LOAD_FILE"

prepare_environment()  # before vLLM is imported

from vtprune_server import engine_load  # noqa: E402
from vtprune_server.auto import Load  # noqa: E402


def told_load(_engine: Any, _now: float) -> Load:
    """In place of `engine_load.current_load`."""
    return Load(**json.loads(Path(os.environ[LOAD_FILE]).read_text()))


# here, and not below: vLLM starts each API process anew from this module
engine_load.current_load = told_load

if __name__ == "__main__":
    import sys

    from vtprune_server.cli import main

    sys.exit(main())
