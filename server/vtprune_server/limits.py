# SPDX-License-Identifier: Apache-2.0
"""What the front end lets a request cost, pruning aside: body, images, pixels, and where it fetches from.

The values travel in the environment (``VTPRUNE_MAX_BODY_MB``, ...), which every API process inherits, so they
hold under plain ``vllm serve`` too. What vLLM enforces itself is handed to it by `apply_to_vllm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from vllm_vtprune.error_text import WITHHOLD_VARIABLE
from vllm_vtprune.policy import PolicyError

ENV_PREFIX = "VTPRUNE_"


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """The operator's limits.

    Attributes:
        max_body_mb: largest request body in MiB; 0 sets no limit.
        max_images: images per prompt (vLLM's `limit_mm_per_prompt`).
        max_image_megapixels: largest decoded image in millions of pixels (`VLLM_MAX_IMAGE_PIXELS`).
        media_domains: hosts an image_url may name (vLLM's `allowed_media_domains`); empty allows every
            public one.
        allow_private_media: whether an image_url may lead to a private, loopback or link-local address.
        log_requests: whether each request is logged as one JSON line, without its content.
    """

    max_body_mb: int = 64
    max_images: int = 16
    max_image_megapixels: int = 64
    media_domains: tuple[str, ...] = ()
    allow_private_media: bool = False
    log_requests: bool = True

    def __post_init__(self) -> None:
        for name in ("max_body_mb", "max_images", "max_image_megapixels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise PolicyError(f"vtprune: {name} must be a whole number and not negative, not {value!r}.")
        for name in ("allow_private_media", "log_requests"):
            if not isinstance(getattr(self, name), bool):
                raise PolicyError(f"vtprune: {name} must be true or false, not {getattr(self, name)!r}.")
        domains = self.media_domains
        if isinstance(domains, str) or not all(isinstance(domain, str) for domain in domains):
            raise PolicyError(f"vtprune: media_domains must be a list of host names, not {domains!r}.")
        object.__setattr__(self, "media_domains", tuple(domains))

    @staticmethod
    def from_environ(environ: Mapping[str, str]) -> ServerLimits:
        """Read the limits; what is not set keeps its default.

        Raises:
            PolicyError: a value that cannot be read; the message names the variable.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(ServerLimits):
            variable = ENV_PREFIX + field.name.upper()
            if variable in environ:
                values[field.name] = parse_text(str(field.type), environ[variable], variable)
        return ServerLimits(**values)

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Inverse of `from_environ`."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            text = ",".join(value) if isinstance(value, tuple) else str(value).lower()
            environ[ENV_PREFIX + field.name.upper()] = text


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
        args.limit_mm_per_prompt = {"image": limits.max_images}
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
    }.items():
        environ.setdefault(name, value)


#: How long requests in flight may take to finish once the server is told to stop.
SHUTDOWN_SECONDS = 30


def parse_text(kind: str, text: str, source: str) -> Any:
    """A flag's or variable's text as the value of a field.

    Args:
        kind: the field's annotation, e.g. ``int | None``.
        text: what was given.
        source: the flag or variable to blame.

    Raises:
        PolicyError: the text is no such value.
    """
    text = text.strip()
    if kind == "int | None" and text.lower() in ("", "none", "off"):
        return None
    if kind == "bool":
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise PolicyError(f"{source} must be true or false, not {text!r}.")
    try:
        if kind.startswith("int"):
            return int(text)
        if kind == "float":
            return float(text)
    except ValueError as error:
        raise PolicyError(f"{source} must be a number, not {text!r}.") from error
    if kind.startswith("tuple"):
        return tuple(name.strip() for name in text.split(",") if name.strip())
    return text
