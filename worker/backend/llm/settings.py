"""Which models there are, and where."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

import segue

OFFLINE = "offline"
OFFICIAL = "https://api.openai.com/v1"

_Seconds = Annotated[float, msgspec.Meta(gt=0)]
_Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Provider(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Somebody who answers: a server that is compatible with OpenAI's API, or the offline responder."""

    name: _Name
    kind: Literal["openai", "offline"] = "openai"
    base_url: str = ""
    """Up to and including ``/v1``; empty: OpenAI's own."""
    model: str = ""
    """The one that is asked unless a caller names another."""
    models: tuple[str, ...] = ()
    """Others that a caller may name."""
    api_key: segue.Secret = segue.Secret("")
    api_key_file: str = ""
    """A file that holds it, read at each start and swap."""
    api_key_env: str = ""
    """An environment variable that holds it. OpenAI's own server: ``OPENAI_API_KEY`` unless said otherwise."""
    timeout_s: _Seconds = 600.0
    """For a whole answer."""
    first_token_timeout_s: _Seconds = 20.0
    """Until an answer begins; then the next provider is asked."""
    silence_timeout_s: _Seconds = 60.0
    """Between two pieces of an answer."""
    retries: Annotated[int, msgspec.Meta(ge=0, le=10)] = 2
    """Further tries, with back-off, before the next provider is asked; after a time-out there are none."""

    def __post_init__(self) -> None:
        if self.kind == OFFLINE:
            return
        if not self.model:
            raise ValueError(f"provider {self.name}: model is missing")
        parts = urlsplit(self.base_url or OFFICIAL)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"provider {self.name}: base_url is http://HOST… or https://HOST…")
        if sum(map(bool, (self.api_key, self.api_key_file, self.api_key_env))) > 1:
            raise ValueError(f"provider {self.name}: one of api_key, api_key_file and api_key_env is enough")

    @property
    def offers(self) -> list[str]:
        """Its models, the one that is asked by itself first."""
        own = [OFFLINE] if self.kind == OFFLINE and not self.model else [self.model]
        return list(dict.fromkeys([*own, *self.models]))

    @property
    def official(self) -> bool:
        """Whether it is OpenAI's own server."""
        return urlsplit(self.base_url or OFFICIAL).hostname == urlsplit(OFFICIAL).hostname

    def key(self) -> str | None:
        """The key, wherever it is; None if there is none. Raises ValueError if it can't be read."""
        if self.api_key:
            return self.api_key.reveal()
        if self.api_key_file:
            try:
                return Path(self.api_key_file).read_text().strip() or None
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "it isn't UTF-8"
                raise ValueError(f"provider {self.name}: {self.api_key_file} can't be read: {why}") from error
        variable = self.api_key_env or ("OPENAI_API_KEY" if self.official else "")
        found = os.environ.get(variable) if variable else None
        if self.api_key_env and not found:
            raise ValueError(f"provider {self.name}: ${self.api_key_env} is not set")
        return found or None


class LLMSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[services.llm]``.

    `base_url` and `api_key` make a provider named ``default`` of `model`, which is asked first. Without them, `model`
    chooses among the models of `providers`. With nothing at all, the offline responder answers; where there is a provider
    it does so only with `fallback_offline`.
    """

    providers: tuple[Provider, ...] = ()
    """Asked in this order."""
    base_url: str = ""
    api_key: segue.Secret = segue.Secret("")
    model: str = ""
    fallback_offline: bool = False
    """When no provider answers, the offline responder does."""
    probe: bool = True
    """In a swap, ask providers that are new or changed for their list of models, and refuse the swap if they can't
    give it. No answer is generated for that."""
    probe_timeout_s: _Seconds = 5.0
    offline_pause_s: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.01
    """Between two words of the offline responder."""

    def __post_init__(self) -> None:
        names = [each.name for each in self.asked()]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"there are two providers named {name}")
        known = [model for each in self.asked() for model in each.offers]
        if self.model and self.model not in known:
            raise segue.Unknown("model", self.model, known)

    def asked(self) -> tuple[Provider, ...]:
        """All providers, in the order in which they are asked."""
        found = list(self.providers)
        if self.base_url or self.api_key:
            if not self.model:
                raise ValueError("model is missing, which of them base_url and api_key give access to")
            found.insert(
                0, Provider("default", base_url=self.base_url, model=self.model, api_key=self.api_key)
            )
        if not found or (self.fallback_offline and all(each.kind != OFFLINE for each in found)):
            found.append(Provider(OFFLINE, kind="offline"))
        return tuple(found)
