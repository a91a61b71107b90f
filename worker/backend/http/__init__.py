"""What the AI backend answers over HTTP: its own API, one compatible with OpenAI's, and the chat page."""
