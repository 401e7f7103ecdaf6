# SPDX-License-Identifier: Apache-2.0
"""Make the environment of `vtprune eval --tasks`: lmms-eval beside torch for the CPU, since a server answers.

    python tools/tasks_env.py

It is made under ~/.cache/vtprune and is no part of the lock.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from vtprune_eval.published import LMMS_EVAL, default_python

_TORCH = "torch==2.13.0"
#: lmms-eval 0.7.3 imports a module that filelock 4 has no more.
_BESIDE = ("filelock<4",)
_SHIM = Path(__file__).parent / "torchvision_shim.py"


def make() -> Path:
    """Install what is missing; gives the interpreter."""
    python = default_python()
    folder = python.parent.parent
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    # the build without CUDA where there is one to be had
    if subprocess.run([*install, f"{_TORCH}+cpu"], check=False).returncode:
        subprocess.run([*install, _TORCH], check=True)
    subprocess.run([*install, LMMS_EVAL, *_BESIDE], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    shutil.copy(_SHIM, site / "vtprune_torchvision_shim.py")
    (site / "vtprune_torchvision_shim.pth").write_text(
        "import vtprune_torchvision_shim; vtprune_torchvision_shim.install()\n"
    )
    return python


if __name__ == "__main__":
    print(make())
