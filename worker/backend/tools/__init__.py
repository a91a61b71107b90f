"""Tools: typed Python functions in files of a directory, called by models and people, reloaded while they run.

A file is a tool file if its name is a key: letters, digits, ``_`` and ``-``, then ``.py``; files that begin with ``_`` are
none. Its tools are its public functions with a docstring (or exactly those in ``__all__``), under their own names. All
parameters are typed: the JSON schema and the validation come from the signature. A function may be ``async``; one that
isn't runs in a thread. A parameter of type `ToolContext` is filled in and no part of the schema. A file stands for itself:
it imports what is installed, not its neighbours.
"""

from segue.worker.backend.tools.context import ToolContext as ToolContext
from segue.worker.backend.tools.dispatcher import ToolDispatcher as ToolDispatcher
from segue.worker.backend.tools.result import ToolResult as ToolResult
from segue.worker.backend.tools.settings import ToolOptions as ToolOptions
from segue.worker.backend.tools.settings import ToolSettings as ToolSettings
