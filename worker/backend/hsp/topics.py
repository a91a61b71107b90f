"""Where what is said: the topics of one agent."""

from __future__ import annotations

import re
from dataclasses import dataclass

from segue.worker.backend.hsp.settings import HSPSettings

_SUFFIX = re.compile(r"(?!/)[^+#\0$]{1,200}(?<!/)")
_PROBE = "_probe"


@dataclass(frozen=True)
class Topics:
    """Of the agent `ai_id`, and of the connector `instance` that speaks for it."""

    prefix: str
    ai_id: str
    instance: str
    heard: tuple[str, ...] = ()
    """Filters that were set; none: all facts."""
    group: str = ""

    @classmethod
    def of(cls, settings: HSPSettings, instance: str) -> Topics:
        """As they are set."""
        return cls(
            settings.topic_prefix, settings.identity, instance, settings.filters, settings.shared_group
        )

    def fact(self, suffix: str) -> str:
        """Where a fact is published. Raises ValueError for what is no topic."""
        if _SUFFIX.fullmatch(suffix) is None or "//" in suffix:
            raise ValueError(
                f"{suffix!r} is no topic: levels separated by /, without +, # and $, at most 200"
            )
        return f"{self.prefix}/knowledge/facts/{suffix}"

    @property
    def advertisement(self) -> str:
        """Where this agent says what it can do; retained."""
        return f"{self.prefix}/capabilities/advertisements/{self.ai_id}"

    @property
    def advertisements(self) -> str:
        """What all agents say of themselves."""
        return f"{self.prefix}/capabilities/advertisements/+"

    def request(self, recipient: str | None) -> str:
        """Where an agent takes requests; None: whoever can."""
        return f"{self.prefix}/tasks/requests/{recipient or 'any'}"

    @property
    def results(self) -> str:
        """Where results of requests of this connector are to go."""
        return f"{self.prefix}/tasks/results/{self.ai_id}/{self.instance}"

    @property
    def acknowledgements(self) -> str:
        """Where acknowledgements of messages of this connector are to go."""
        return f"{self.acknowledgements_of(self.ai_id)}/{self.instance}"

    def results_of(self, ai_id: str) -> str:
        """For a request that doesn't say where its result is to go."""
        return f"{self.prefix}/tasks/results/{ai_id}"

    def acknowledgements_of(self, ai_id: str) -> str:
        """For a message that doesn't say where its acknowledgement is to go."""
        return f"{self.prefix}/acknowledgements/{ai_id}"

    @property
    def marker(self) -> str:
        """Where the tokens go at which two connections of a swap line up, and what connectors of the agent tell each other."""
        return f"{self.prefix}/_swap/{self.ai_id}/marker"

    @property
    def seat(self) -> str:
        """Where it stands, retained, which session has the agent's subscription."""
        return f"{self.prefix}/_swap/{self.ai_id}/seat"

    @property
    def hello(self) -> str:
        """Where a connector speaks to itself, to see that it is served."""
        return f"{self.prefix}/_swap/{self.ai_id}/hello/{self.instance}"

    @property
    def private(self) -> tuple[str, ...]:
        """What a mailbox subscribes to. The greeting is last: what is retained comes before it."""
        own = self.advertisements, self.results, self.acknowledgements
        return (*own, self.seat, self.marker, self.hello)

    @property
    def stream(self) -> tuple[str, ...]:
        """What the agent's subscription has, without the marker and as topics look that arrive through it."""
        return (
            *(self.heard or (f"{self.prefix}/knowledge/facts/#",)),
            self.request(self.ai_id),
            self.request(None),
            self.results_of(self.ai_id),
            self.acknowledgements_of(self.ai_id),
        )

    def subscribed(self, topic_filter: str) -> str:
        """How one of `stream` is subscribed to: in the group, if there is one, unless it is this agent's own."""
        own = topic_filter.endswith(f"/{self.ai_id}")
        return topic_filter if own or not self.group else f"$share/{self.group}/{topic_filter}"

    def probes(self) -> dict[str, str]:
        """For each filter of `stream` of this protocol a topic that matches it."""
        found = {}
        for each in self.stream:
            topic = each.replace("+", _PROBE).replace("#", _PROBE)
            if each.startswith(f"{self.prefix}/") and not self.group:
                found[each] = topic
        return found


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a filter takes a topic."""
    filters, levels = topic_filter.split("/"), topic.split("/")
    if topic.startswith("$") and filters[0] in {"+", "#"}:
        return False
    for number, each in enumerate(filters):
        if each == "#":
            return True
        if number >= len(levels) or each not in {"+", levels[number]}:
            return False
    return len(filters) == len(levels)
