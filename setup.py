# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml cannot say: which packages lie in folders that are imported under another name."""

from setuptools import find_packages, setup

FOLDERS = {
    "vllm_vtprune": "vllm_vtprune",
    "vtprune_server": "server",
    "vtprune_bench": "bench",
    "vtprune_demo": "demo",
}

setup(
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{sub}" for sub in find_packages(folder)))
    ]
)
