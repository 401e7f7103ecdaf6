# SPDX-License-Identifier: Apache-2.0
"""Make `.venv` and install vtprune and all that it needs: `make setup`, through tools/setup.sh.

Nothing is done while the stamp of the last set-up fits. Otherwise, in this order: torch, the locked packages,
torchvision, vtprune itself (editable), a check, and last the stamp. A set-up that was cut off is started
over, since a package may be half there.

VTPRUNE_BACKEND is `cpu`, `cuda` or `auto` (the default: `cuda` where nvidia-smi is found). Packages come from
where pip is configured to look, and from PyTorch's index of CPU builds where that answers. The CUDA way has
not been run yet.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "vtprune-setup.stamp"
UNFINISHED = VENV / "vtprune-setup.unfinished"
LOG = VENV / "vtprune-setup.log"
CPU_LOCK = "requirements/cpu.lock"
TEST_LOCK = "requirements/test.lock"
SHIM = ROOT / "tools" / "torchvision_shim.py"
INPUTS = (
    Path(__file__),
    SHIM,
    *(ROOT / name for name in ("pyproject.toml", CPU_LOCK, TEST_LOCK)),
)

VLLM = "0.32.0"
TORCH = "2.13.0"
TORCHVISION = "0.28.0"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 5
PIP_OPTIONS = ("--disable-pip-version-check", "--no-input")


def place(environment: Path) -> None:
    """Work in this environment instead of the checkout's `.venv`: for images (image_env.py)."""
    global VENV, PYTHON, UNFINISHED, LOG
    VENV = environment
    PYTHON = VENV / "bin" / "python"
    UNFINISHED, LOG = VENV / UNFINISHED.name, VENV / LOG.name


def fail(message: str) -> NoReturn:
    """End the set-up with one sentence."""
    print(f"set-up: {message}", file=sys.stderr)
    raise SystemExit(1)


@contextmanager
def step(text: str) -> Iterator[list[str]]:
    """Print one line for a step: what it does, the notes added to the list given, and the seconds it took."""
    print(f"  {text} ... ", end="", flush=True)
    began, notes = time.monotonic(), list[str]()
    try:
        yield notes
    except BaseException:
        print("failed", flush=True)
        raise
    print(", ".join([*notes, f"{time.monotonic() - began:.0f} s"]), flush=True)


def captured(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command from the checkout's root, its output going to the result."""
    # Another environment's path must not leak into this one.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PIP_USER")}
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command, its output going to the log and to the result."""
    done = captured(*command)
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(map(str, command))}\n{done.stdout}\n")
    return done


class StepFailedError(Exception):
    """A step's command failed; carries what it was to do and its output."""


def required(what: str, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed."""
    done = run(*command)
    if done.returncode:
        raise StepFailedError(what, done.stdout)
    return done


def pip_install(*arguments: str) -> bool:
    """Try `pip install` in the environment; returns whether it succeeded."""
    return run(PYTHON, "-m", "pip", "install", *PIP_OPTIONS, *arguments).returncode == 0


def require_install(what: str, *arguments: str) -> None:
    """Run a `pip install` that must succeed."""
    try:
        required(f"install {what}", PYTHON, "-m", "pip", "install", *PIP_OPTIONS, *arguments)
    except StepFailedError as error:
        if "Installing collected packages" not in error.args[1]:
            UNFINISHED.unlink(missing_ok=True)  # pip gave up before it changed anything
        raise


def backend() -> str:
    """Read VTPRUNE_BACKEND, deciding `auto` by whether nvidia-smi is there."""
    choice = os.environ.get("VTPRUNE_BACKEND", "auto").lower()
    if choice not in ("auto", "cpu", "cuda"):
        fail(f"VTPRUNE_BACKEND is {choice!r}; it must be cpu, cuda or auto.")
    if choice == "auto":
        return "cuda" if shutil.which("nvidia-smi") else "cpu"
    return choice


def fingerprint(chosen: str) -> str:
    """Hash all that decides what the environment holds, its own place included (scripts hold its path)."""
    digest = hashlib.sha256(f"{chosen}\n{ROOT}\n".encode())
    for file in INPUTS:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def make_environment() -> None:
    """Make `.venv`, or adopt the one there if it works."""
    if VENV.exists() and UNFINISHED.exists():
        print("  the last set-up was cut off: starting over", flush=True)
        shutil.rmtree(VENV)
    elif (VENV / "pyvenv.cfg").exists():
        if PYTHON.exists() and ask("import pip, sys; print((3, 11) <= sys.version_info[:2])") == "True":
            UNFINISHED.touch()
            return
        print("  .venv does not work any more: starting over", flush=True)
        shutil.rmtree(VENV)
    elif VENV.exists() and any(VENV.iterdir()):
        fail(f"{VENV} is not a virtual environment; move it away and run this again.")
    with step(f"virtual environment with Python {platform.python_version()}"):
        VENV.mkdir(exist_ok=True)
        UNFINISHED.touch()
        required("make the virtual environment", sys.executable, "-m", "venv", VENV)


def pytorch_index() -> list[str]:
    """Give pip's arguments for PyTorch's index of CPU builds, or none where it does not answer."""
    try:
        with urllib.request.urlopen(f"{PYTORCH_CPU_INDEX}/torch/", timeout=PROBE_SECONDS):
            return ["--extra-index-url", PYTORCH_CPU_INDEX]
    except (OSError, ValueError):
        return []


def ask(code: str) -> str:
    """Give what a line of Python prints in the environment, or an empty string if it fails."""
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, cwd=VENV)
    return done.stdout.strip() if done.returncode == 0 else ""


def install_torch(index: list[str]) -> str:
    """Install torch, the CPU build where any source has it; returns the version installed."""
    with step(f"torch {TORCH}") as notes:
        wanted = f"{TORCH}+cpu"
        installed = "from importlib.metadata import version; print(version('torch'))"
        if ask(installed) != wanted and not pip_install("--no-deps", f"torch=={wanted}", *index):
            # The CUDA build works on a CPU too. It cannot be loaded without the CUDA libraries it asks for.
            notes.append("no CPU build found: the CUDA build, of several GB")
            require_install(f"torch {TORCH}", f"torch=={TORCH}", "--constraint", CPU_LOCK)
        version = ask(installed)
        notes.insert(0, version)
    return version


def install_torchvision(torch: str, index: list[str]) -> None:
    """Install the torchvision that matches torch, or else the CUDA build with a shim beside it."""
    site = Path(ask("import sysconfig; print(sysconfig.get_path('purelib'))"))
    module, hook = site / "_vtprune_torchvision.py", site / "_vtprune_torchvision.pth"
    with step(f"torchvision {TORCHVISION}") as notes:
        wanted = f"torchvision=={TORCHVISION}+cpu"
        if not torch.endswith("+cpu") or not pip_install("--no-deps", wanted, *index):
            require_install("torchvision", "--no-deps", f"torchvision=={TORCHVISION}")
        # Only a real import tells. A shim from an earlier set-up does not change this answer.
        if ask("from torchvision import extension; print(extension._has_ops())") == "True":
            hook.unlink(missing_ok=True)
            module.unlink(missing_ok=True)
            notes.append("its operators load")
            return
        shutil.copyfile(SHIM, module)
        hook.write_text("import _vtprune_torchvision; _vtprune_torchvision.install()\n")
        required("import torchvision", PYTHON, "-c", "import torchvision.transforms.v2.functional")
        notes.append("a CUDA build beside CPU torch: its two missing operators are declared at import")


def locked() -> list[str]:
    """List the lines of both locks that pin a package."""
    lines = [line for lock in (CPU_LOCK, TEST_LOCK) for line in (ROOT / lock).read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def check(torch: str) -> None:
    """Fail if a locked package lacks what it asks for, apart from what is left out or differs on purpose."""
    deliberate = ["requires torchaudio", "requires torchcodec"]
    if not torch.endswith("+cpu"):
        deliberate.append(f"has requirement torch=={TORCH}+cpu")
    ours = {pin.split("==")[0] for pin in locked()} | {"torch", "torchvision", "vtprune"}
    complaints = run(PYTHON, "-m", "pip", "check", "--disable-pip-version-check").stdout.splitlines()
    conflicts = [
        line
        for line in complaints
        if line.split(" ")[0].lower().replace("_", "-") in ours
        and not any(text in line for text in deliberate)
    ]
    if conflicts:
        raise StepFailedError("agree on versions", "\n".join(conflicts))


def install_cpu() -> None:
    """Install vLLM's CPU build, pinned to the last package."""
    index = pytorch_index()
    torch = install_torch(index)
    with step(f"{len(locked())} locked packages, vLLM {VLLM} for the CPU among them"):
        require_install("the locked packages", "--no-deps", "-r", CPU_LOCK, "-r", TEST_LOCK)
    install_torchvision(torch, index)
    with step("vtprune, editable"):
        require_install("vtprune", "--no-deps", "--no-build-isolation", "--editable", ".")
    with step("check"):
        check(torch)


def install_cuda() -> None:
    """Install vLLM's CUDA build, which brings the torch it wants, and the pinned test tools."""
    with step(f"vLLM {VLLM} for CUDA and vtprune, editable"):
        require_install("vLLM for CUDA", "-r", TEST_LOCK, "--editable", ".[cuda]")


def main() -> None:
    """Bring the environment up to date."""
    chosen = backend()
    wanted = fingerprint(chosen)
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    folder = os.open(ROOT, os.O_RDONLY)  # kept to the end of the process, and the lock with it
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("waiting for another set-up to end", flush=True)
        fcntl.flock(folder, fcntl.LOCK_EX)
        if STAMP.exists() and STAMP.read_text() == wanted:
            return
    print(f"setting up .venv for the {chosen.upper()} (log: {LOG.relative_to(ROOT)})", flush=True)
    # A stop by a signal must stop pip too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # before the stamp goes: through a link it would be another checkout's
        if VENV.is_symlink() or (VENV.exists() and not VENV.is_dir()):
            fail(f"{VENV} is not a folder; move it away and run this again.")
        STAMP.unlink(missing_ok=True)
        make_environment()
        install_cuda() if chosen == "cuda" else install_cpu()
    except StepFailedError as error:
        what, output = error.args
        print(*output.splitlines()[-15:], sep="\n", file=sys.stderr)
        fail(f"could not {what}; the whole output is in {LOG}.")
    except KeyboardInterrupt:
        fail("interrupted; the next run starts over.")
    UNFINISHED.unlink()
    STAMP.write_text(wanted)


if __name__ == "__main__":
    main()
