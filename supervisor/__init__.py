"""The master: command line, settings, lifecycle, shell, spawning, control API."""
