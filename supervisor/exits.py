"""Exit statuses of every command: a contract."""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """What a command ends with. Never 0 from an outage."""

    OK = 0
    REFUSED = 1
    """It was refused or failed and the state is unchanged; or, of ``serve``, the stop was not clean."""
    USAGE = 2
    """Flags, environment or settings file are wrong; nothing was done."""
    NOT_STARTED = 3
    """``serve``: the first generation did not start. ``check``: it would not."""
    ROLLED_BACK = 4
    """The new generation did not pass its probation. It was taken back, or the message says why it could not be."""
    INSTANCE = 5
    """There is no such instance, several fit, it isn't yours, or it runs already."""
    LATE = 6
    """The time given with ``--timeout`` has passed; what was asked for goes on."""
    INTERRUPTED = 130
    """Ctrl-C: nobody waits any more; what was asked for goes on."""


EPILOG = (
    "Exit status: 0 done; 1 refused or failed, state unchanged; 2 wrong flags or settings; "
    "5 no such instance, several fit, or not yours; 6 --timeout passed, or 130 Ctrl-C: the operation goes on."
)
DEPLOY_EPILOG = (
    "Exit status: 0 done; 1 refused or failed, state unchanged; 2 wrong flags or settings; "
    "4 the new generation did not pass its probation and was taken back (or, as the message says, could not be); "
    "5 no such instance, several fit, or not yours; 6 --timeout passed, or 130 Ctrl-C: the operation goes on."
)
SERVE_EPILOG = (
    "Exit status: 0 stopped cleanly; 1 stopped, but something was cut off or nothing served; "
    "2 wrong flags or settings; 3 the first generation did not start; 5 the instance runs already or its "
    "directory can't be used. Signals: HUP reload, TERM/INT stop (twice: at once), QUIT stop at once, "
    "TTIN/TTOU one worker more/less, USR2 upgrade of the master in place."
)
CHECK_EPILOG = "Exit status: 0 it would start; 2 wrong flags or settings; 3 it would not, and why."
