# SPDX-License-Identifier: Apache-2.0
"""What is refused before an engine starts, in one sentence."""

from __future__ import annotations

import pytest

from vllm_vtprune.compat import check_front_end, check_vllm_version
from vllm_vtprune.errors import UnsupportedError


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.32.0", "0.3.2", "0.320.0", "dev"])
def test_other_vllm_versions_are_refused(version: str) -> None:
    with pytest.raises(UnsupportedError, match=f"supports vLLM 0.32 and 0.33 and found {version}"):
        check_vllm_version(version)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.32.0rc1", "0.33.0", ""])
def test_the_supported_version_passes(version: str) -> None:
    check_vllm_version(version)


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_the_rust_front_end_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", value)
    with pytest.raises(UnsupportedError, match="unset it"):
        check_front_end()
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    check_front_end()
