# SPDX-License-Identifier: Apache-2.0
"""Write requirements/*.lock from the packages in this environment.

    make lock                                    cpu.lock and test.lock, from .venv
    .venv-deploy/bin/python tools/lock.py ray    ray.lock, from the environment that has Ray beside the others

A lock names everything that vtprune with an extra needs, directly or through another package, at the version
installed here. It is installed with `pip install --no-deps`, so nothing outside it can drift in. Which builds
of torch and torchvision are installed depends on the machine and is left to setup_env.py.
"""

import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKS = Path(__file__).resolve().parent.parent / "requirements"
CHOSEN_AT_SETUP = {"torch", "torchvision", "vtprune"}
# Published on the package index as CUDA builds only, which do not load beside CPU torch; LLaVA needs neither.
ABSENT = {"torchaudio", "torchcodec"}
# Needed on other Pythons or machines than the one that writes the lock, or not on all of them.
MARKERS = {
    "intel-cmplr-lib-ur": 'platform_machine == "x86_64"',
    "intel-openmp": 'platform_machine == "x86_64"',
    "triton": 'platform_machine == "x86_64"',
}
OTHER_PYTHONS = {"six": 'six==1.17.0; python_version > "3.11"'}
PYTHON_VERSIONS = ("3.11", "3.12", "3.13", "3.14")

HEADER = """\
# Every package {what}.
# Written by {maker}; installed by {installer} with --no-deps.
"""


def needed(name: str, extras: Iterable[str], python: str) -> list[tuple[str, frozenset[str]]]:
    """List what a distribution with these extras asks for under a Python version, as (name, extras) pairs."""
    found: list[tuple[str, frozenset[str]]] = []
    for text in distribution(name).requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or any(
            requirement.marker.evaluate({"python_version": python, "extra": extra}) for extra in ("", *extras)
        ):
            found.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def closure(extra: str) -> set[str]:
    """Name every distribution that `vtprune[extra]` needs under any supported Python."""
    seen: set[tuple[str, frozenset[str], str]] = set()
    names: set[str] = set()
    todo = [("vtprune", frozenset({extra}), python) for python in PYTHON_VERSIONS]
    while todo:
        item = todo.pop()
        if item in seen:
            continue
        seen.add(item)
        name, extras, python = item
        if name in OTHER_PYTHONS:
            names.add(name)
            continue
        if name in ABSENT:
            continue
        try:
            todo += [(*child, python) for child in needed(name, extras, python)]
        except PackageNotFoundError as error:
            raise SystemExit(
                f"lock: {name} is needed under Python {python} but is not installed here; install it, or "
                "name its version in OTHER_PYTHONS."
            ) from error
        names.add(name)
    return names - CHOSEN_AT_SETUP


def pin(name: str, marked: Iterable[str] = OTHER_PYTHONS) -> str:
    """Give the lock's line for a distribution."""
    if name in OTHER_PYTHONS:
        return OTHER_PYTHONS[name] if name in marked else OTHER_PYTHONS[name].partition(";")[0]
    marker = f"; {MARKERS[name]}" if name in MARKERS else ""
    return f"{name}=={distribution(name).version}{marker}"


def main() -> None:
    """Write the locks."""
    if not distribution("torch").version.endswith("+cpu"):
        raise SystemExit("lock: torch here is a CUDA build; write the locks beside its CPU build.")
    runtime = closure("cpu")
    tools = closure("test") - runtime
    if sys.argv[1:] == ["ray"]:
        # what serving needs on some Pythons alone, Ray needs on all of them
        beyond = closure("ray") - (runtime - set(OTHER_PYTHONS)) - tools
        header = HEADER.format(
            what="that Ray Serve needs beyond those of cpu.lock and test.lock",
            maker="tools/lock.py",
            installer="tools/setup_deploy.py",
        )
        write("ray.lock", beyond, header, marked=())
        return
    for file, names, what in (
        ("cpu.lock", runtime, "that serving on a CPU needs, but torch and torchvision"),
        ("test.lock", tools, "that tests, checks and plots need beyond those that serving needs"),
    ):
        write(file, names, HEADER.format(what=what, maker="`make lock`", installer="tools/setup_env.py"))


def write(file: str, names: set[str], header: str, marked: Iterable[str] = OTHER_PYTHONS) -> None:
    """Write one lock; names in `marked` get the Pythons they are needed on beside their version."""
    lines = "".join(f"{pin(name, marked)}\n" for name in sorted(names))
    (LOCKS / file).write_text(header + lines)
    print(f"{file}: {len(names)} packages")


if __name__ == "__main__":
    main()
