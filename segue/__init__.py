"""segue: a process supervisor with socket handoff for Python (ASGI) services.

What an application may use is here; everything below ``segue.supervisor``, ``segue.worker`` and
``segue.handoff`` is private to the program.
"""

__version__ = "0.1.0"
