"""HSP: how agents speak with each other over MQTT. `connector` is the service; the other modules are its parts.

An agent has a name (`ai_id`), whichever process speaks for it. Each worker has a *mailbox*, a connection of its own for
what it publishes and for answers to it; one of them also holds the agent's *subscription*, the stream of what others say,
in which nothing may be lost, taken twice or taken out of order, whoever holds it next.
"""
