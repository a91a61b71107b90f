"""Names of servers' tools as models can call them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

_STRANGE = re.compile(r"[^A-Za-z0-9_-]")
_MAX = 64


def names(server: str, tools: Iterable[str]) -> dict[str, str]:
    """By ``SERVER__TOOL``, the tool's own name.

    What models can't call a tool by is replaced with ``_``. A name that is too long, or would be another one's, gets a
    digest of the tool's own name at its end, so that it stays the same whatever else there is.
    """
    found: dict[str, str] = {}
    for tool in sorted(set(tools), key=lambda name: (_STRANGE.search(name) is not None, name)):
        name = f"{server}__{_STRANGE.sub('_', tool)}"
        if name in found or len(name) > _MAX:
            digest = hashlib.sha256(tool.encode(errors="replace")).hexdigest()[:8]
            name = f"{name[: _MAX - 9]}_{digest}"
        found[name] = tool
    return found
