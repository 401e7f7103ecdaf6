# SPDX-License-Identifier: Apache-2.0
"""What the front end lets a request cost, pruning aside: body, images, pixels, and where it fetches from.

The values travel in the environment (``VTPRUNE_MAX_BODY_MB``, ...), which every API process inherits, so they
hold under plain ``vllm serve`` too. What vLLM enforces itself is handed to it by `apply_to_vllm`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from vllm_vtprune.error_text import WITHHOLD_VARIABLE
from vllm_vtprune.operator_model import OperatorModel
from vtprune_server.sources import Source, gather, texts

ENV_PREFIX = "VTPRUNE_"
#: Of a decoded picture, RGBA.
_BYTES_PER_PIXEL = 4


def _host_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        # vLLM compares it with the host of the URL (`MediaConnector._assert_url_in_allowed_media_domains`)
        if not re.fullmatch(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+", name):
            raise ValueError(f"names {name!r}, which is no host name: write it like images.example.org")
    return names


class ServerLimits(OperatorModel):
    """The operator's limits."""

    max_body_mb: int = Field(
        default=64, ge=0, description="largest request body in MiB; 413 beyond it; 0 for no limit"
    )
    # vLLM's `limit_mm_per_prompt`
    max_images: int = Field(default=16, ge=0, description="images per prompt, and as many videos")
    # `VLLM_MAX_IMAGE_PIXELS`
    max_image_megapixels: int = Field(
        default=64, ge=0, description="largest decoded image, in millions of pixels"
    )
    # vLLM's `allowed_media_domains`; strict=False: JSON and YAML have lists
    media_domains: Annotated[tuple[str, ...], AfterValidator(_host_names)] = Field(
        default=(),
        strict=False,
        description="hosts an image_url may name, separated by commas; with none, every public one",
    )
    allow_private_media: bool = Field(
        default=False, description="whether an image_url may lead to a private or loopback address"
    )
    log_requests: bool = Field(
        default=True, description="whether each request is logged as one JSON line, without its content"
    )

    @staticmethod
    def from_environ(environ: Mapping[str, str]) -> ServerLimits:
        """Read the limits; what is not set keeps its default.

        Raises:
            PolicyError: a value that cannot be read; the message names the variable.
        """
        return gather(ServerLimits, variables(environ))

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Inverse of `from_environ`."""
        for name, value in self:
            text = ",".join(value) if isinstance(value, tuple) else str(value).lower()
            environ[variable(name)] = text


def variable(name: str) -> str:
    """The variable of a setting."""
    return ENV_PREFIX + name.upper()


def variables(environ: Mapping[str, str]) -> Source:
    """The settings among the variables of an environment."""
    named = {name: text for name, text in environ.items() if name.startswith(ENV_PREFIX)}
    return texts({name.removeprefix(ENV_PREFIX).lower(): text for name, text in named.items()}, variable)


def apply_to_vllm(
    limits: ServerLimits, args: Any, given: frozenset[str], environ: MutableMapping[str, str]
) -> None:
    """Set what vLLM enforces itself, wherever the operator has not.

    Args:
        limits: the operator's.
        args: vLLM's parsed arguments, changed in place.
        given: the flags on the command line, e.g. ``--shutdown-timeout``.
        environ: usually `os.environ`.
    """
    if not {"--limit-mm-per-prompt", "--config"} & given:
        args.limit_mm_per_prompt = {"image": limits.max_images, "video": limits.max_images}
    if limits.media_domains and "--allowed-media-domains" not in given:
        args.allowed_media_domains = list(limits.media_domains)
    if not {"--shutdown-timeout", "--config"} & given:
        args.shutdown_timeout = SHUTDOWN_SECONDS
    if not args.log_error_stack:
        environ.setdefault(WITHHOLD_VARIABLE, "1")
    for name, value in {
        # `media.PublicMediaConnector`, which refuses addresses that are not public
        "VLLM_MEDIA_CONNECTOR": "vtprune",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_MEDIA_FETCH_MAX_RETRIES": "1",
        "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": "32",
        "VLLM_MAX_IMAGE_PIXELS": str(limits.max_image_megapixels * 1_000_000),
        # since 0.33 vLLM bounds all images of a request together, too: below what the limits above allow
        "VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB": str(32 * limits.max_images),
        "VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES": str(
            _BYTES_PER_PIXEL * 1_000_000 * limits.max_image_megapixels * limits.max_images
        ),
    }.items():
        environ.setdefault(name, value)


#: How long requests in flight may take to finish once the server is told to stop.
SHUTDOWN_SECONDS = 30
