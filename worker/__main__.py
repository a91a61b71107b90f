"""``python -m segue.worker``: started by the master, never by hand."""

import sys

from segue.worker.boot import main

if __name__ == "__main__":
    sys.exit(main())
