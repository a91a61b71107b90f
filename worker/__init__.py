"""The worker: one process that runs one application, and hands its connections over."""
