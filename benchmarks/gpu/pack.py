# SPDX-License-Identifier: Apache-2.0
"""Pack vLLM 0.32's CUDA build and this project for a GPU machine without network, in parts of at most 60 MB.

    python -m benchmarks.gpu.pack OUT      # writes OUT/a, OUT/b, OUT/c, each with its install.sh

The target has Python 3.12, torch 2.11 with CUDA 13, transformers, Triton and a Hopper GPU; it needs no
checkout. Copy OUT there and run `bash OUT/run.sh OUT RESULTS`. Run so on an H100 with torch 2.11.0+cu130.

    a  the Python packages that vLLM needs and the target lacks (requirements.txt), this project's wheel, and
       the benchmarks and tests, which are not in the wheel
    b  vLLM's main CUDA extension: torch's stable ABI lets it run with another torch than it was built with
    c  vLLM's Python files and FlashAttention 3

Left out, because a dense LLaVA on Hopper needs none of it: FlashAttention 2, DeepGEMM, FlashMLA, the kernels
for mixtures of experts, the Rust front end, FlashInfer (`run.sh` turns its sampler off). vLLM 0.32 pins torch
2.13; its sources carry switches for older versions.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from benchmarks.machine import COMMIT_FILE, commit_of

_HERE = Path(__file__).resolve().parent
_VLLM = "vllm==0.32.0"
_GLIBC = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 31, 34, 35, 39)]
_PLATFORMS = [*_GLIBC, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
_MAIN_EXTENSION = "_C_stable_libtorch"
_LEFT_OUT = re.compile(
    r"_vllm_fa2_C|_moe_C|vllm-rs|_flashmla|_flashkda|_qutlass|_deepselect|swagger|\.hpp$|\.cuh?$|\.h$"
    r"|third_party/(deep_gemm|fmha_sm100)/(?!.*\.py$)"
)
_INSTALL = """\
set -e
cd "$(dirname "$0")"
site=${VTPRUNE_SITE:-$HOME/vllm-site}
mkdir -p "$site"
if ls ./*.whl >/dev/null 2>&1; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \\
    --target "$site" ./*.whl
fi
for archive in ./*.zip; do
  if [ -e "$archive" ]; then python3 -m zipfile -e "$archive" "$site"; fi
done
"""


def pack(out: Path) -> None:
    """Download, split and write the parts; prints their sizes."""
    first = out / "a"
    _download(first, "-r", str(_HERE / "requirements.txt"))
    project = str(_HERE.parent.parent)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(first), project], check=True
    )
    pack_benchmarks(out)
    _download(out / "wheel", _VLLM)
    _split(next((out / "wheel").glob("vllm-*.whl")), out)
    for name in ("a", "b", "c"):
        (out / name / "install.sh").write_text(_INSTALL)
        size = sum(file.stat().st_size for file in (out / name).iterdir())
        print(f"part {name}: {size / 2**20:.1f} MiB")


def pack_benchmarks(out: Path) -> None:
    """Write benchmarks/ and tests/ into part a, with the commit they are of, and run.sh beside the parts."""
    folder = _HERE.parent
    (out / "a").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out / "a" / "benchmarks.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted([*folder.rglob("*.py"), *folder.with_name("tests").rglob("*.py")]):
            archive.write(file, file.relative_to(folder.parent))
        archive.writestr(f"{folder.name}/{COMMIT_FILE}", commit_of(folder) or "unknown")
    shutil.copy(_HERE / "run.sh", out)


def _split(wheel: Path, out: Path) -> None:
    for name in ("b", "c"):
        (out / name).mkdir(exist_ok=True)
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(out / "b" / "vllm.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as extension,
        zipfile.ZipFile(out / "c" / "vllm.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as rest,
    ):
        for item in source.infolist():
            if not _LEFT_OUT.search(item.filename):
                part = extension if _MAIN_EXTENSION in item.filename else rest
                part.writestr(item.filename, source.read(item))


def _download(into: Path, *what: str) -> None:
    into.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp"]
    for platform in _PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, "-d", str(into), *what], check=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.gpu.pack OUT")
    pack(Path(sys.argv[1]))
