# SPDX-License-Identifier: Apache-2.0
"""Fetching images and videos for strangers: no private address, and errors that tell nothing of the server.

vLLM chooses the class that loads media by name (`VLLM_MEDIA_CONNECTOR`, `MEDIA_CONNECTOR_REGISTRY`);
importing this module registers ``vtprune``. Addresses are checked when the name is resolved and again when
the socket is made, so neither a second DNS answer nor a redirect gets round the check.
"""

from __future__ import annotations

import asyncio
import binascii
import ipaddress
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from PIL import Image
from vllm.connections import HTTPConnection
from vllm.exceptions import VLLMError, VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, VideoMediaIO

from vtprune_server import metrics
from vtprune_server.limits import ServerLimits


class PrivateAddressError(VLLMValidationError):
    """An image_url leads to an address that is not public; vLLM answers 400."""

    def __init__(self) -> None:
        super().__init__(
            "image_url leads to a private, loopback or otherwise non-public address, which this server does "
            "not fetch from: send the image as a data: URL.",
            parameter="image_url",
        )
        metrics.REFUSED.labels("private_address").inc()


def is_public(address: str) -> bool:
    """Whether an IP address may be fetched from: globally routable unicast, also when wrapped in IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64 or ip in _IPV4_COMPATIBLE:
            embedded: ipaddress.IPv4Address | None = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        else:
            embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if embedded is not None:
            return is_public(str(embedded))
    return ip.is_global and not ip.is_multicast


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_IPV4_COMPATIBLE = ipaddress.IPv6Network("::/96")


class PublicHTTPConnection(HTTPConnection):
    """vLLM's HTTP client on sockets that reach public addresses only.

    Proxies named in the environment are not used: a proxy would resolve the name where nobody checks.
    """

    async def get_async_client(self) -> aiohttp.ClientSession:
        """The session of this process's event loop."""
        if self._async_client is None or not self.reuse_client:
            connector = aiohttp.TCPConnector(resolver=_PublicResolver(), socket_factory=_public_socket)
            self._async_client = aiohttp.ClientSession(connector=connector, trust_env=False)
        return self._async_client

    def get_bytes(
        self,
        url: str,
        *,
        timeout: float | None = None,
        allow_redirects: bool = True,
        max_bytes: int | None = None,
        **kwargs: Any,
    ) -> bytes:
        """The blocking form, through the same checks; what else vLLM gives goes to `async_get_bytes`."""

        async def fetch() -> bytes:
            connection = PublicHTTPConnection()
            async with await connection.get_async_client():
                return await connection.async_get_bytes(
                    url, timeout=timeout, allow_redirects=allow_redirects, max_bytes=max_bytes, **kwargs
                )

        # a thread of its own, since the caller's may already run an event loop
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, fetch()).result()


class _PublicResolver(AbstractResolver):
    def __init__(self) -> None:
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        addresses = await self._resolver.resolve(host, port, family)
        if not all(is_public(address["host"]) for address in addresses):
            raise PrivateAddressError
        return addresses

    async def close(self) -> None:
        await self._resolver.close()


def _public_socket(address: tuple[Any, ...]) -> socket.socket:
    """The socket factory of aiohttp, which sees every address before it connects, redirects included."""
    family, kind, protocol, _, sockaddr = address
    if not is_public(str(sockaddr[0])):
        raise PrivateAddressError
    return socket.socket(family=family, type=kind, proto=protocol)


@cache
def _connection() -> HTTPConnection:
    private_allowed = ServerLimits.from_environ(os.environ).allow_private_media
    return HTTPConnection() if private_allowed else PublicHTTPConnection()


@MEDIA_CONNECTOR_REGISTRY.register("vtprune")
class PublicMediaConnector(MediaConnector):
    """vLLM's connector over `PublicHTTPConnection`, which blames the client for what the client sent.

    vLLM answers 500 or 501 when a host cannot be reached, a data URL is not base64 or Pillow trips over a
    broken file in a way of its own; here all of these are 4xx, in sentences that quote neither URL nor
    exception.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("connection", _connection())
        super().__init__(*args, **kwargs)

    def load_from_url(self, url: str, media_io: Any, **kwargs: Any) -> Any:
        """`MediaConnector.load_from_url`; every failure is a `VLLMClientError`."""
        kind = _kind_of(media_io)
        _check_declared_type(url, kind)
        with _blaming_the_client(kind):
            return super().load_from_url(url, media_io, **kwargs)

    async def load_from_url_async(self, url: str, media_io: Any, **kwargs: Any) -> Any:
        """`MediaConnector.load_from_url_async`; every failure is a `VLLMClientError`."""
        kind = _kind_of(media_io)
        _check_declared_type(url, kind)
        with _blaming_the_client(kind):
            return await super().load_from_url_async(url, media_io, **kwargs)


def _kind_of(media_io: Any) -> str:
    return "video" if isinstance(media_io, VideoMediaIO) else "image"


def _check_declared_type(url: str, kind: str) -> None:
    """Refuse a data: URL that says it is something else than its kind; vLLM looks at the bytes alone."""
    scheme, _, rest = url.partition(":")
    media_type = rest.partition(",")[0].partition(";")[0].strip().lower()
    # no type at all is text/plain by RFC 2397, but clients leave it out for images too
    if scheme.lower() == "data" and media_type and not media_type.startswith(f"{kind}/"):
        article, example = _DECLARED[kind]
        raise VLLMValidationError(
            f"A data: URL in {kind}_url must declare {article} {kind} type, such as "
            f"data:{example};base64,...",
            parameter=f"{kind}_url",
        )


@contextmanager
def _blaming_the_client(kind: str) -> Iterator[None]:
    where = f"{kind}_url"
    try:
        yield
    except PrivateAddressError as error:
        # a socket does not know what it is opened for
        if kind == "image":
            raise
        raise VLLMValidationError(str(error.args[0]).replace("image", kind), parameter=where) from None
    except VLLMUnprocessableEntityError as error:
        # vLLM's sentence, without the URL it would quote
        raise VLLMUnprocessableEntityError(error.args[0], parameter=where) from None
    except VLLMError:
        raise
    except (aiohttp.ClientError, TimeoutError, ConnectionError, socket.gaierror):
        raise VLLMUnprocessableEntityError(
            f"The {kind} could not be fetched: its host did not answer with it in time.", parameter=where
        ) from None
    except Image.DecompressionBombError:
        raise VLLMValidationError("The image has too many pixels.", parameter=where) from None
    except (NotImplementedError, binascii.Error):
        raise VLLMValidationError("A data: URL must hold base64.", parameter=where) from None
    except RuntimeError:
        raise VLLMValidationError(
            "The server does not read local files: send an http(s) or data: URL.", parameter=where
        ) from None
    except Exception as error:
        sentence = str(error) if str(error).startswith(_VLLMS_SENTENCES) else _UNREADABLE[kind]
        raise VLLMValidationError(sentence, parameter=where) from None


#: By kind, its article and the type of an example.
_DECLARED = {"image": ("an", "image/png"), "video": ("a", "video/mp4")}
#: Refusals of vLLM's that help and tell nothing: too many pixels, a scheme or domain that is not allowed.
_VLLMS_SENTENCES = ("Image dimensions", "The URL must be", "Invalid data URL", "Request decoded media")
_UNREADABLE = {
    "image": "The image could not be decoded: send a whole PNG, JPEG, WebP or GIF.",
    "video": "The video could not be decoded: send a whole file such as an MP4, or frames as video/jpeg.",
}
