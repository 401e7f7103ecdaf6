# SPDX-License-Identifier: Apache-2.0
"""Run the tests that start no engine over the Python sources of the next supported vLLM: `make test-next`.

    python tools/next_vllm.py [pytest arguments]

vLLM 0.33 has no CPU build yet. Its wheel (340 MB) is unpacked under .venv, never installed; its Python files
lie before the installed release's on the path, the compiled parts are those of the installed CPU build. That
tells whether the plugin's seams fit 0.33's sources. It says nothing of CUDA, Model Runner V2 or torch 2.14.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv" / "vllm-next"
VERSION = "0.33.0"
#: What 0.33 imports and 0.32's lock does not hold.
ADDED = ("orjson==3.13.0",)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64")
TESTS = (
    "tests/hooks",
    "tests/settings",
    "tests/kv_drop",
    "tests/vision",
    "tests/server",
    "tests/test_compat.py",
)


def unpack() -> Path:
    """Make the folder with 0.33's Python files and the installed release's compiled ones; once."""
    done = FOLDER / "complete"
    if done.exists() and done.read_text() == VERSION:
        return FOLDER
    print(f"fetching vLLM {VERSION} into {FOLDER.relative_to(ROOT)} (340 MB)", flush=True)
    wheels = FOLDER / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    platforms = [argument for name in PLATFORMS for argument in ("--platform", name)]
    download = (
        "download",
        "--no-deps",
        "--only-binary=:all:",
        *platforms,
        "-d",
        str(wheels),
        f"vllm=={VERSION}",
    )
    subprocess.run([*pip, *download], check=True)
    wheel = next(wheels.glob(f"vllm-{VERSION}-*.whl"))
    with zipfile.ZipFile(wheel) as source:
        names = [n for n in source.namelist() if n.endswith((".py", ".json", ".jinja")) or ".dist-info/" in n]
        source.extractall(FOLDER, names)
    wheel.unlink()
    installed = Path(sysconfig.get_path("purelib"))
    for compiled in installed.glob("vllm/**/*.so"):
        link = FOLDER / compiled.relative_to(installed)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(compiled)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(FOLDER), *ADDED], check=True)
    done.write_text(VERSION)
    return FOLDER


def main(arguments: list[str]) -> int:
    """Run pytest over the overlay; its exit status."""
    folder = unpack()
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "server")])
    # the CPU build names its platform in its package's name, which the overlay hides
    env = {**os.environ, "PYTHONPATH": path, "VLLM_TARGET_DEVICE": "cpu"}
    command = [sys.executable, "-m", "pytest", "-m", "not engine and not browser", *(arguments or TESTS)]
    return subprocess.run(command, cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
