# SPDX-License-Identifier: Apache-2.0
"""Make the environment of a container image with the steps of setup_env.py: deploy/Dockerfile.cpu.

    python3 tools/image_env.py dependencies /opt/vtprune    # torch, the locked packages, torchvision
    python3 tools/image_env.py project /opt/vtprune         # vtprune itself; then no installer is left

Two steps, so that an image builder keeps the first, of minutes, while only the project changes. Test tools
are not installed. Packages come from where pip is configured to look.
"""

import sys
from pathlib import Path

import setup_env
from setup_env import StepFailedError, fail, require_install, required, step


def dependencies() -> None:
    """Make the environment and install what vtprune needs."""
    with step(f"virtual environment {setup_env.VENV}"):
        setup_env.VENV.mkdir(parents=True)
        required("make the virtual environment", sys.executable, "-m", "venv", setup_env.VENV)
    index = setup_env.pytorch_index()
    torch = setup_env.install_torch(index)
    with step("the locked packages"):
        require_install("the locked packages", "--no-deps", "-r", setup_env.CPU_LOCK)
    setup_env.install_torchvision(torch, index)


def project() -> None:
    """Install vtprune and take the installer away."""
    with step("vtprune"):
        require_install("vtprune", "--no-deps", "--no-build-isolation", ".")
        required("run it", setup_env.VENV / "bin" / "vtprune", "version")
    with step("no installer left"):
        required("remove pip", setup_env.PYTHON, "-m", "pip", "uninstall", "--yes", "pip")
        setup_env.LOG.unlink()


def main() -> None:
    """Run one of the two steps."""
    steps = {"dependencies": dependencies, "project": project}
    if len(sys.argv) != 3 or sys.argv[1] not in steps:
        fail("say `image_env.py dependencies FOLDER`, then `image_env.py project FOLDER`.")
    setup_env.place(Path(sys.argv[2]))
    try:
        steps[sys.argv[1]]()
    except StepFailedError as error:
        what, output = error.args
        print(*output.splitlines()[-15:], sep="\n", file=sys.stderr)
        fail(f"could not {what}.")


if __name__ == "__main__":
    main()
