# SPDX-License-Identifier: Apache-2.0
"""Where the operator's policy and limits come from, and what of vLLM's they set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from vllm_vtprune.errors import PolicyError
from vllm_vtprune.policy import PrunePolicy
from vtprune_server.limits import ServerLimits, apply_to_vllm
from vtprune_server.options import add_policy_options, policy_from_options


def gathered(
    *flags: str, environ: dict[str, str] | None = None, config: Any = None
) -> tuple[PrunePolicy, ServerLimits]:
    parser = argparse.ArgumentParser()
    add_policy_options(parser)
    return policy_from_options(parser.parse_args(flags), environ or {}, config)


def test_nothing_given_means_the_defaults() -> None:
    assert gathered() == (PrunePolicy(), ServerLimits())


def test_flag_over_environment_over_file_over_additional_config(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    config = {"vtprune": {"min_tokens": 2, "window": 3, "min_kv_keep": 0.1, "encoder_batch": 9}}
    file.write_text("min_tokens: 4\nwindow: 5\nmin_kv_keep: 0.2\nmax_images: 6\n")
    environ = {"VTPRUNE_MIN_TOKENS": "7", "VTPRUNE_WINDOW": "8", "VTPRUNE_CONFIG": str(file)}
    policy, limits = gathered("--vtprune-min-tokens", "11", environ=environ, config=config)
    assert (policy.min_tokens, policy.window, policy.min_kv_keep, policy.encoder_batch) == (11, 8, 0.2, 9)
    assert limits.max_images == 6


def test_every_kind_of_value_is_read_from_text() -> None:
    policy, limits = gathered(
        *("--prune-layer", "3", "--vtprune-methods", "topk, random", "--vtprune-client-controls", "no"),
        *("--vtprune-feature-cache-gb", "0.5", "--vtprune-media-domains", "a.org,b.org"),
        *("--vtprune-allow-private-media", "true"),
    )
    assert (policy.prune_layer, policy.methods, policy.client_controls) == (3, ("topk", "random"), False)
    assert policy.feature_cache_gb == 0.5
    assert limits.media_domains == ("a.org", "b.org") and limits.allow_private_media
    assert gathered("--prune-layer", "off", config={"vtprune": {"prune_layer": 2}})[0].prune_layer is None


@pytest.mark.parametrize(
    "flags,named",
    [
        (["--vtprune-max-images", "-1"], "--vtprune-max-images"),
        (["--vtprune-max-images", "many"], "--vtprune-max-images"),
        (["--vtprune-log-requests", "maybe"], "--vtprune-log-requests"),
        (["--vtprune-min-tokens", "0"], "--vtprune-min-tokens"),
        (["--vtprune-config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--vtprune-media-domains", "http://x/"], "--vtprune-media-domains names 'http://x/'"),
        (["--vtprune-media-domains", "a.org,*.b.org"], "no host name"),
        (["--prune-layer", "-1"], "^--prune-layer must be at least 1, not -1"),
        (["--prune-layer", "abc"], "^--prune-layer must be a whole number, not 'abc'"),
    ],
)
def test_what_cannot_work_is_named(flags: list[str], named: str) -> None:
    with pytest.raises(PolicyError, match=named):
        gathered(*flags)


@pytest.mark.parametrize(
    "content", ["- a", "nope: 1", "max_body_mb: lots", "media_domains: a.org", "a: [", "x"]
)
def test_a_file_that_cannot_work(tmp_path: Path, content: str) -> None:
    (tmp_path / "policy.yaml").write_text(content)
    with pytest.raises(PolicyError):
        gathered("--vtprune-config", str(tmp_path / "policy.yaml"))


def test_a_setting_is_named_as_its_source_spells_it(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("window: 0\n")
    with pytest.raises(PolicyError, match=f"^window in {file} must be at least 1, not 0"):
        gathered("--vtprune-config", str(file))
    with pytest.raises(PolicyError, match=r"^VTPRUNE_WINDOW must be at least 1, not 0"):
        gathered("--vtprune-config", str(file), environ={"VTPRUNE_WINDOW": "0"})
    with pytest.raises(PolicyError, match=r'^additional_config\["vtprune"\]\["window"\] must be'):
        gathered(config={"vtprune": {"window": 0}})


def test_limits_travel_in_the_environment() -> None:
    limits = ServerLimits(max_body_mb=3, media_domains=("a.org", "b.org"), log_requests=False)
    environ: dict[str, str] = {}
    limits.export(environ)
    assert ServerLimits.from_environ(environ) == limits
    assert ServerLimits.from_environ({}) == ServerLimits()


def vllm_args() -> argparse.Namespace:
    return argparse.Namespace(
        limit_mm_per_prompt={}, allowed_media_domains=None, shutdown_timeout=0, log_error_stack=False
    )


def test_vllms_own_limits_are_set_where_the_operator_has_not() -> None:
    args, environ = vllm_args(), dict[str, str]()
    limits = ServerLimits(max_images=5, max_image_megapixels=7, media_domains=("a.org",))
    apply_to_vllm(limits, args, frozenset(), environ)
    assert args.limit_mm_per_prompt == {"image": 5, "video": 5}
    assert args.allowed_media_domains == ["a.org"]
    assert args.shutdown_timeout > 0
    assert environ["VLLM_MAX_IMAGE_PIXELS"] == "7000000"
    assert environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert environ["VLLM_MEDIA_CONNECTOR"] == "vtprune"
    assert environ["VTPRUNE_WITHHOLD_ERROR_TEXT"] == "1"


def test_and_left_alone_where_they_have() -> None:
    args = vllm_args()
    environ = {"VLLM_MAX_IMAGE_PIXELS": "9", "VLLM_MEDIA_CONNECTOR": "http"}
    given = frozenset({"--limit-mm-per-prompt", "--allowed-media-domains", "--shutdown-timeout"})
    apply_to_vllm(ServerLimits(media_domains=("a.org",)), args, given, environ)
    assert args == vllm_args()
    assert environ["VLLM_MAX_IMAGE_PIXELS"] == "9" and environ["VLLM_MEDIA_CONNECTOR"] == "http"


def test_the_engine_logs_the_text_of_errors_where_the_front_end_does() -> None:
    args, environ = vllm_args(), dict[str, str]()
    args.log_error_stack = True
    apply_to_vllm(ServerLimits(), args, frozenset(), environ)
    assert "VTPRUNE_WITHHOLD_ERROR_TEXT" not in environ
