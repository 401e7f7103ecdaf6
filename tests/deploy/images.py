# SPDX-License-Identifier: Apache-2.0
"""The container images, built and run without a Docker daemon: `make test-images`.

Needs root, buildah and debootstrap (Debian: apt-get install buildah debootstrap crun), a Debian mirror and
the package index. debootstrap makes the base that Docker Hub's Python image would be; layers are kept for the
next run. The server then runs in namespaces of its own as the image's user, its root file system mounted
read-only, and the contract tests are sent to it.

Of deploy/Dockerfile only the steps are run, on the CPU image's environment in the place of vLLM's image.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import REPOSITORY
from tests.deploy.contract import run_contract_tests

pytestmark = pytest.mark.timeout(3600)

BASE, CPU, CUDA = (f"localhost/vtprune-test-{name}" for name in ("base:bookworm", "cpu", "cuda"))
STAND_IN = "localhost/vtprune-test-dependencies"
USER = 10001
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_NEEDED = ("buildah", "debootstrap", "unshare")


def buildah(*arguments: object) -> str:
    """Run buildah; gives its output."""
    command = ["buildah", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


def build(dockerfile: str, tag: str, base: str, *arguments: str) -> None:
    """Build an image, with the package sources that pip is configured for here."""
    given: list[str] = []
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT"):
        if name in os.environ:
            given += ["--build-arg", name]
            if Path(os.environ[name]).exists():  # a folder or a file of this machine
                given += ["--volume", f"{os.environ[name]}:{os.environ[name]}:ro"]
    buildah(
        "build", "--isolation", "chroot", "--network", "host", "--format", "docker", "--layers",
        "--file", f"deploy/{dockerfile}", "--build-arg", f"BASE={base}", "--tag", tag,
        *given, *arguments, ".",
    )  # fmt: skip


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Debian with Python, as an image."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"images are built as root with {', '.join(_NEEDED)}; missing: {missing or 'root'}")
    if BASE not in buildah("images", "--format", "{{.Name}}:{{.Tag}}"):
        folder = tmp_path_factory.mktemp("base") / "bookworm"
        packages = "ca-certificates,python3.11,python3.11-venv,python3-pip"
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", folder],
            capture_output=True, text=True,
        )  # fmt: skip
        assert made.returncode == 0, made.stdout[-3000:]
        container = buildah("from", "scratch")
        buildah("add", "--quiet", container, folder, "/")
        buildah("commit", "--quiet", container, BASE)
        buildah("rm", container)
        shutil.rmtree(folder)
    return BASE


@pytest.fixture(scope="session")
def cpu_image(base: str) -> str:
    """deploy/Dockerfile.cpu, built."""
    build("Dockerfile.cpu", CPU, base)
    return CPU


@dataclass(frozen=True)
class Container:
    """An image's file system, mounted.

    Attributes:
        root: where.
        config: the image's configuration, as Docker has it.
    """

    root: Path
    config: dict[str, Any]

    def command(self, *arguments: str, **env: str) -> list[str]:
        """The command line that runs arguments inside, as the image's user on a read-only root."""
        user = str(self.config["User"])
        variables = [*self.config["Env"], *(f"{key}={value}" for key, value in env.items())]
        chroot = ["chroot", f"--userspec={user}", str(self.root), "/usr/bin/env", "-i", *variables]
        mounts = (
            'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && mount -t proc proc "$0/proc" && '
            'mount --rbind /sys "$0/sys" && mount --rbind /dev "$0/dev" && mount -t tmpfs tmpfs "$0/tmp" && '
            f'mount -t tmpfs -o uid={USER},gid={USER} tmpfs "$0/cache" && exec "$@"'
        )
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        return [*unshare, "sh", "-c", mounts, str(self.root), *chroot, *arguments]

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside to its end."""
        return subprocess.run(self.command(*arguments, **env), capture_output=True, text=True, timeout=300)


def mounted(image: str) -> Iterator[Container]:
    """A container of the image, as long as the test runs."""
    container = buildah("from", image)
    try:
        docker = json.loads(buildah("inspect", container))["Docker"]["config"]
        yield Container(Path(buildah("mount", container)), docker)
    finally:
        buildah("umount", container)
        buildah("rm", container)


@pytest.fixture(scope="session")
def cpu(cpu_image: str) -> Iterator[Container]:
    """The CPU image, mounted."""
    yield from mounted(cpu_image)


def test_the_image_says_how_it_is_run_and_checked(cpu: Container) -> None:
    assert cpu.config["User"] == f"{USER}:{USER}"
    assert cpu.config["Entrypoint"] == ["/image/entrypoint.sh"] and cpu.config["Cmd"] == ["serve"]
    assert cpu.config["Healthcheck"]["Test"] == ["CMD", "python3", "/image/health.py"]


def test_no_installer_and_no_compiler_is_left_and_nothing_can_be_written(cpu: Container) -> None:
    for tool in ("pip", "pip3", "uv", "gcc", "cc", "g++", "make", "git"):
        assert cpu.run("sh", "-c", f"command -v {tool}").returncode != 0, tool
    assert cpu.run("python3", "-c", "import pip").returncode != 0
    assert cpu.run("sh", "-c", "id -u").stdout.strip() == str(USER)
    assert "Read-only" in cpu.run("touch", "/opt/vtprune/x").stderr
    assert cpu.run("touch", "/cache/x", "/tmp/x").returncode == 0
    assert not list((cpu.root / "src").glob("*")) and not (cpu.root / "root" / ".cache").exists()
    assert "torch" in cpu.run("python3", "-c", "import torch; print(torch)").stdout


def test_a_secret_file_that_is_empty_stops_it(cpu: Container) -> None:
    done = cpu.run("/image/entrypoint.sh", "serve", VLLM_API_KEY_FILE="/dev/null")
    assert done.returncode == 2 and "VLLM_API_KEY_FILE" in done.stderr


def test_its_server_passes_the_contract_tests(cpu: Container, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            cpu.command("/image/entrypoint.sh", "serve", "--host", "127.0.0.1", "--port", port),
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        healthy = ("python3", "/image/health.py")
        assert cpu.run(*healthy, VTPRUNE_HEALTH_PORT=port).returncode != 0
        deadline = time.monotonic() + 300
        while cpu.run(*healthy, VTPRUNE_HEALTH_PORT=port).returncode != 0:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        assert _owners(process.pid) == {USER}
        url = f"http://127.0.0.1:{port}"
        run_contract_tests(url)
        assert httpx.get(f"{url}/playground", follow_redirects=True, timeout=30).status_code == 200
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _owners(above: int) -> set[int]:
    """Whose the Python processes below this one are; it itself, which makes the namespaces, is root's."""
    owners, todo = set(), [above]
    while todo:
        pid = todo.pop()
        todo += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        if "python" in os.readlink(f"/proc/{pid}/exe"):
            owners.add(Path(f"/proc/{pid}").stat().st_uid)
    return owners


def test_the_steps_of_the_cuda_image_on_a_stand_in_for_vllms(base: str, cpu_image: str) -> None:
    """It adds the wheel to a Python that has vLLM, and takes the same user, entry point and health check."""
    build("Dockerfile.cpu", STAND_IN, base, "--target", "dependencies")
    stand_in = buildah("from", STAND_IN)  # as in vLLM's image, its Python comes first
    buildah("config", "--env", f"PATH=/opt/vtprune/bin:{PATH}", stand_in)
    buildah("commit", "--quiet", stand_in, STAND_IN)
    buildah("rm", stand_in)
    build("Dockerfile", CUDA, STAND_IN)
    for container in mounted(CUDA):
        assert container.config["User"] == f"{USER}:{USER}"
        assert container.config["Entrypoint"] == ["/image/entrypoint.sh"]
        said = container.run("/image/entrypoint.sh", "version")
        assert said.stdout.startswith("vtprune ") and "vLLM 0.32" in said.stdout, said.stderr
