# SPDX-License-Identifier: Apache-2.0
"""Server-sent events out of a byte stream (WHATWG HTML, section 9.2.6), as chat completions use them."""


class EventParser:
    """Feed it network reads of any cut; it gives back the data of each event that they complete."""

    def __init__(self) -> None:
        """Start with nothing read."""
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, read: bytes) -> list[bytes]:
        """The data of each event this read completes, in order; other fields and comments are left out."""
        lines = (self._rest + read).split(b"\n")  # LF or CRLF; no server ends its lines with a lone CR
        self._rest = lines.pop()
        events: list[bytes] = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events
