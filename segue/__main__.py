"""``python -m segue`` is ``segue``."""

from segue.supervisor.cli import main

main()
