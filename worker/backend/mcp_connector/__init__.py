"""The connector to MCP servers (Model Context Protocol), whose tools appear among the others as ``SERVER__TOOL``.

Servers come from ``[services.mcp.servers.NAME]``: ``command`` for one that runs as a child and speaks over its standard
input and output, ``url`` for one that speaks streamable HTTP. The official SDK (extra ``ai``) is imported only if there is a
server.
"""

from segue.worker.backend.mcp_connector.connector import MCPConnector as MCPConnector
from segue.worker.backend.mcp_connector.connector import MCPUnreachableError as MCPUnreachableError
from segue.worker.backend.mcp_connector.settings import MCPServer as MCPServer
from segue.worker.backend.mcp_connector.settings import MCPSettings as MCPSettings
