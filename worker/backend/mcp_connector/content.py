"""What a server's tool returns, as text for a model."""

from __future__ import annotations

import msgspec
from mcp_types import (
    AudioContent,
    CallToolResult,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
)


def as_text(result: CallToolResult) -> str:
    """Texts as they are, one below the other; what is no text is named. Without any content: the structured one."""
    parts = [_part(each) for each in result.content]
    if not parts and result.structured_content is not None:
        return msgspec.json.encode(result.structured_content).decode()
    return "\n".join(parts)


def _part(content: object) -> str:
    match content:
        case TextContent():
            return content.text
        case ImageContent() | AudioContent():
            return f"[{content.mime_type}, {len(content.data) * 3 // 4} bytes]"
        case EmbeddedResource(resource=TextResourceContents() as resource):
            return resource.text
        case EmbeddedResource(resource=resource):
            return f"[{resource.mime_type or 'binary'}: {resource.uri}]"
        case ResourceLink():
            return f"[{content.name}: {content.uri}]"
    return f"[{type(content).__name__}]"
