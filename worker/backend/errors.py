"""What a caller is told when something can't be done."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any


class ToldError(Exception):
    """Ends a request with an HTTP status and a reason for a person."""

    def __init__(self, status: int, detail: str, **members: Any) -> None:
        super().__init__(detail)
        self.status = status
        self.members = members
        """What else there is to say, for machines."""

    @property
    def title(self) -> str:
        """The name of the status."""
        return HTTPStatus(self.status).phrase
