"""What can be set about MCP servers."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

from segue.worker.services.secret import Secret

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]|_(?!_)){0,30}(?<!_)")
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class MCPServer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[services.mcp.servers.NAME]``: one server; either `command` or `url` is given."""

    command: str = ""
    """The program to run; it ends with the worker, whatever ends that."""
    args: tuple[str, ...] = ()
    env: dict[str, Secret] = {}
    """Variables for it, beside HOME, LOGNAME, PATH, SHELL, TERM and USER."""
    inherit: tuple[str, ...] = ()
    """Names of further variables that it gets from the worker's environment."""
    cwd: str = ""
    """Its working directory; empty: the worker's."""
    url: str = ""
    """Where it speaks streamable HTTP."""
    headers: dict[str, Secret] = {}
    token: Secret = Secret("")
    """Sent as ``Authorization: Bearer``."""
    token_file: str = ""
    """A file with that token, read with every connection."""
    required: bool | None = None
    """True: neither a worker nor a new connector starts without it. False: both do, and it is tried again. None: a
    worker starts without it; a new connector is refused if the server is new, has other settings, or was connected."""
    protocol: Literal["auto", "legacy"] = "auto"
    """``legacy``: don't ask it for the version of 2026 first."""

    def __post_init__(self) -> None:
        if bool(self.command) == bool(self.url):
            raise ValueError("an MCP server has either a command or a url")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError("the url of an MCP server begins with http:// or https://")
        if self.token and self.token_file:
            raise ValueError("an MCP server has a token or a token_file, not both")


class MCPSettings(msgspec.Struct, frozen=True):
    """``[services.mcp]``."""

    servers: dict[str, MCPServer] = {}
    """By name: letters, digits, - and single _, at most 31."""
    connect_timeout_s: _Seconds = 20.0
    """How long a server may take to start and to shake hands."""
    patience_s: _Seconds = 5.0
    """How long a start waits for servers that it doesn't need, and a call for a server that is connecting again."""
    call_timeout_s: _Seconds = 30.0
    """How long one call may take."""
    refresh_s: _Seconds = 30.0
    """How often a server is asked for its tools, which shows whether it is still there."""
    retry_first_s: _Seconds = 0.5
    """How long to wait before a server that was lost is tried again; doubled each time …"""
    retry_cap_s: _Seconds = 30.0
    """… up to this."""

    def __post_init__(self) -> None:
        for name in self.servers:
            if _NAME.fullmatch(name) is None:
                raise ValueError(
                    "servers: the name of one is made of letters, digits, - and single _, at most 31 characters"
                )
