"""What passes between processes: listeners, descriptors, relay, notify, HTTP, messages."""
