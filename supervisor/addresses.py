"""Addresses to listen on: what people write, and the one form in which the supervisor keeps it.

Taken are ``HOST:PORT``, ``[v6]:PORT``, ``:PORT`` (all interfaces, as gunicorn), ``unix:PATH`` and ``fd:N``. A bare
host or a bare port is refused: it leaves open what matters, the port, or who can connect. Each address has one
normal form, so that equal ones are found and an open listener is recognized at a reload.
"""

from __future__ import annotations

import re
import socket

MAX_PORT = 65535
MAX_UNIX_PATH = 107
"""Bytes in ``sun_path`` less the closing zero, unix(7)."""

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\.?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_FORMS = "HOST:PORT, [IPv6]:PORT, :PORT (all interfaces), unix:PATH or fd:NUMBER"


class AddressError(ValueError):
    """Not an address; the message says what is expected in its place."""


def normalize(bind: str, base_dir: str) -> str:
    """The normal form of `bind`: ``127.0.0.1:8000``, ``[::1]:8000``, ``:8000``, ``unix:/path`` or ``fd:3``.

    A relative path is made absolute against `base_dir`; symbolic links stay. Raises `AddressError`.
    """
    if bind.startswith("unix:"):
        return unix(bind.removeprefix("unix:"), base_dir)
    if bind.startswith("fd:"):
        return _descriptor(bind.removeprefix("fd:"))
    if "://" in bind:
        raise AddressError(f"is a URL; expected {_FORMS}")
    if bind.isascii() and bind.isdigit():
        raise AddressError(
            f"is a port without a host; expected 127.0.0.1:{bind} (this machine) or :{bind} (all interfaces)"
        )
    host, colon, port = bind.rpartition(":")
    if not colon or bind.endswith("]"):
        if re.fullmatch(r"[\w.-]+|\[.*\]", bind):
            raise AddressError(f"has no port; expected HOST:PORT, for example {bind}:8000")
        raise AddressError(f"is not an address; expected {_FORMS}")
    if host.count(":") and not (host.startswith("[") and host.endswith("]")):
        raise AddressError("is ambiguous; expected an IPv6 address in brackets, for example [::1]:8000")
    return tcp(host, _port(port))


def tcp(host: str, port: int) -> str:
    """The normal form of a host (an IPv6 address with or without brackets; empty: all interfaces) and a port.

    Raises `AddressError`.
    """
    if not 0 <= port <= MAX_PORT:
        raise AddressError(f"has the port {port}; expected one from 0 (any free one) to {MAX_PORT}")
    if host == "*":
        raise AddressError(f"has the host '*'; expected :{port} for all interfaces")
    if not host:
        return f":{port}"
    if host.startswith("[") or ":" in host:
        return f"[{_ipv6(host.removeprefix('[').removesuffix(']'))}]:{port}"
    return f"{_host(host.lower())}:{port}"


def unix(path: str, base_dir: str) -> str:
    """The normal form of a Unix socket's path. Raises `AddressError`."""
    if path.startswith("//"):
        raise AddressError(f"is a URL; expected unix:PATH, for example unix:/{path.lstrip('/')}")
    if not path:
        raise AddressError("has an empty path; expected unix:PATH")
    if path.startswith("@"):
        raise AddressError("is an abstract socket, which any user may connect to; expected unix:PATH")
    if _CONTROL.search(path):
        raise AddressError("has a control character in its path; expected a plain path")
    if path.endswith("/") or path in {".", ".."}:
        raise AddressError("names a directory; expected the path of the socket itself")
    whole = absolute(path, base_dir)
    if len(whole.encode(errors="surrogateescape")) > MAX_UNIX_PATH:
        raise AddressError(f"has a path longer than {MAX_UNIX_PATH} bytes ({whole}); expected a shorter one")
    return f"unix:{whole}"


def absolute(path: str, base_dir: str) -> str:
    """`path` from the root, with its symbolic links and ``..`` as given: both are resolved anew when it is used."""
    whole = path if path.startswith("/") else f"{base_dir}/{path}"
    return "/" + "/".join(part for part in whole.split("/") if part not in {"", "."})


def _descriptor(number: str) -> str:
    if not (number.isascii() and number.isdigit()) or len(number) > 6:
        raise AddressError("has no descriptor number; expected fd:NUMBER, for example fd:3")
    return f"fd:{int(number)}"


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 6:
        raise AddressError(f"has the port {text!r}; expected a number from 0 (any free one) to {MAX_PORT}")
    return int(text)


def _ipv6(text: str) -> str:
    address, percent, zone = text.partition("%")
    try:
        normal = socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, address))
    except (OSError, ValueError):  # ValueError: a zero byte or another character outside ASCII
        raise AddressError(
            f"has no IPv6 address in brackets ({text!r}); expected for example [::1]:8000"
        ) from None
    if percent and not re.fullmatch(r"[A-Za-z0-9_.-]+", zone):
        raise AddressError(
            f"has no interface after the '%' ({text!r}); expected for example [fe80::1%eth0]:8000"
        )
    return normal + percent + zone


def _host(host: str) -> str:
    if re.fullmatch(r"[0-9.]+", host):
        try:
            return socket.inet_ntop(socket.AF_INET, socket.inet_pton(socket.AF_INET, host))
        except OSError:
            raise AddressError(
                f"has no IPv4 address ({host!r}); expected four numbers, as in 127.0.0.1"
            ) from None
    if not _HOST_NAME.fullmatch(host):
        raise AddressError(f"has no host name or address ({host!r}); expected {_FORMS}")
    return host
