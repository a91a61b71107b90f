"""The nouns of the lifecycle: states, events, effects. Data only; `segue.supervisor.lifecycle` moves it.

An *event* is something that happened: a signal, a request, a message of a worker, a death, time passing. An *effect*
is something that the shell (`segue.supervisor.master`) shall do. Neither does anything by itself. All times are
seconds of one monotonic clock.
"""

from __future__ import annotations

from segue.supervisor.effects import *  # noqa: F403
from segue.supervisor.events import *  # noqa: F403
from segue.supervisor.generations import *  # noqa: F403
from segue.supervisor.states import *  # noqa: F403
from segue.supervisor.underway import *  # noqa: F403
