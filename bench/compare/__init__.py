"""The comparison with other servers, which anyone can repeat: ``make compare``."""
