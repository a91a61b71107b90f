"""The AI backend that is served when no application is named: chat, tools, MCP, personality, memory.

Every part is a service (`segue.worker.services`) in a module of its own, and can be swapped while it works; `assembly`
declares them. Each has an embedded default that works without a network, and says what it is.
"""
