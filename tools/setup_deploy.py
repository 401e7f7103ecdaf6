# SPDX-License-Identifier: Apache-2.0
"""Make `.venv-deploy`, which is `.venv` with Ray Serve over it: `make setup-deploy`, after `make setup`.

An environment of its own, so that nothing of Ray's is there where it is not wanted; it reads the packages of
`.venv` in place and holds only what requirements/ray.lock adds to them, and vtprune itself.
"""

import hashlib
import shutil
import sys
from pathlib import Path

from setup_env import PIP_OPTIONS, ROOT, VENV, captured, fail, step

DEPLOY = ROOT / ".venv-deploy"
PYTHON = DEPLOY / "bin" / "python"
STAMP = DEPLOY / "vtprune-setup.stamp"
LOCK = ROOT / "requirements" / "ray.lock"


def fingerprint() -> str:
    """Hash what decides what the environment holds."""
    digest = hashlib.sha256(f"{DEPLOY}\n{VENV.resolve()}\n".encode())
    for file in (Path(__file__), LOCK, ROOT / "pyproject.toml", VENV / STAMP.name):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def run(*command: str | Path) -> str:
    """Run a command that must succeed; what it printed."""
    done = captured(*command)
    if done.returncode:
        print(f"failed\n{done.stdout[-3000:]}", file=sys.stderr)
        fail(f"{' '.join(map(str, command))} did not succeed; the next run starts over.")
    return done.stdout


def main() -> None:
    """Bring the environment up to date."""
    wanted = fingerprint()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    print("setting up .venv-deploy", flush=True)
    shutil.rmtree(DEPLOY, ignore_errors=True)
    with step("virtual environment over .venv"):
        # without pip and setuptools of its own, which would hide the newer ones of .venv
        run(sys.executable, "-m", "venv", "--without-pip", DEPLOY)
        site = run(PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')")
        below = run(
            VENV / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')"
        )
        Path(site, "_vtprune_below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    pip = (PYTHON, "-m", "pip", "install", *PIP_OPTIONS, "--no-deps")
    with step("locked packages of Ray Serve"):
        run(*pip, "-r", LOCK)
    with step("vtprune, editable"):
        run(*pip, "--no-build-isolation", "--ignore-installed", "--editable", ".")
    STAMP.write_text(wanted)


if __name__ == "__main__":
    main()
