"""Ports for servers that are still to be started."""

from __future__ import annotations

import socket

held: list[socket.socket] = []
"""What holds them; one that is closed gives its port back."""


def free_port() -> int:
    """One of the loopback that nobody listens on, and that nobody else is given while this process holds it.

    It stays bound here, which keeps the system from giving it away, be it to who asks for any port or to who connects
    from one. A server binds it all the same, as often as it is started: as servers do, with ``SO_REUSEADDR``.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    held.append(holder)
    return int(holder.getsockname()[1])
