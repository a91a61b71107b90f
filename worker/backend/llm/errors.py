"""Why there is no answer."""

from __future__ import annotations

from segue.worker.backend.errors import ToldError


class LLMError(ToldError):
    """No provider has answered, or one has stopped in the middle; `status` is what an HTTP client is told."""

    def __init__(self, message: str, status: int = 502) -> None:
        super().__init__(status, message)


class ProviderError(Exception):
    """One provider has failed, before its first token or after it."""

    def __init__(
        self,
        reason: str,
        *,
        status: int = 502,
        retry: bool = False,
        final: bool = False,
        after_s: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.retry = retry
        """It may be otherwise in a moment."""
        self.final = final
        """It is the request's fault: no other provider would take it."""
        self.after_s = after_s
        """When to come again, if the provider says so."""
