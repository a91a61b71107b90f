"""The page of all settings, made from their table: ``python -m segue.supervisor.setting_reference > docs/settings.md``."""

from __future__ import annotations

import sys
from typing import Any

from segue.supervisor.setting_schema import Form, Group, Kind, Setting
from segue.supervisor.setting_sources import PREFIX
from segue.supervisor.setting_table import REFUSED, TABLE

_NO_LIMIT = 365 * 86400
"""A maximum from here on is only there to refuse nonsense."""
_HEAD = """\
# Settings

Every setting of `segue serve`, generated from the code by `make docs`; a test fails when this page is not what the code says.

A value is looked for in this order: the flag, the environment, the settings file (`--config FILE`, else `segue.toml`, or `[tool.segue]`
in `pyproject.toml`, in the working directory), the default. `segue config` prints each effective value and where it comes from,
`segue config --running` those of a running instance. A key that nobody knows, a value of another type and a combination that can't be
are errors that name key and place, with exit status 2.

In the settings file a key is the flag without its dashes in front: `--ready-timeout 30` is `ready-timeout = 30`. Flags that may be repeated
are lists there, and separated by commas in the environment. A reload reads everything again; what only a restart of the master applies
is marked *restart*.
"""


def page() -> str:
    """The page, as Markdown."""
    lines = [_HEAD]
    for group in Group:
        lines += [
            f"## {group.value}\n",
            "| flag | environment | takes | default | what it does |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(setting) for setting in TABLE if setting.group is group]
        lines.append("")
    lines += [
        "## Options of uvicorn that are not taken\n",
        "| option | what to do instead |",
        "|---|---|",
        *(f"| `--{key}` | {_cell(refused.reason)} |" for key, refused in REFUSED.items()),
        "",
    ]
    return "\n".join(lines)


def _row(setting: Setting) -> str:
    flag = f"`{setting.flag}`"
    if setting.form is Form.PAIR:
        flag += f", `--no-{setting.key}`"
    text = setting.help + (" *restart*" if setting.restart else "")
    cells = (flag, _variables(setting), _takes(setting), _default(setting), text)
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _variables(setting: Setting) -> str:
    names = [PREFIX + setting.name.upper()]
    if setting.uvicorn is not None:
        names.append(f"UVICORN_{setting.uvicorn.upper()}")
    if setting.variable is not None:
        names.append(setting.variable)
    return ", ".join(f"`{name}`" for name in names)


def _takes(setting: Setting) -> str:
    if setting.choices:
        choices = ", ".join(f"`{choice}`" for choice in setting.choices)
        return f"{choices}, or an import string" if setting.importable else choices
    kind = (
        setting.unit if setting.unit and setting.kind in {Kind.NUMBER, Kind.INTEGER} else setting.kind.value
    )
    limits = []
    if setting.minimum is not None:
        limits.append(f"from {setting.minimum:g}")
    if setting.above is not None:
        limits.append(f"above {setting.above:g}")
    if setting.maximum is not None and setting.maximum < _NO_LIMIT:
        limits.append(f"to {setting.maximum:,.0f}".replace(",", " "))
    return " ".join([kind, *limits])


def _default(setting: Setting) -> str:
    if setting.shown_default is not None:
        return setting.shown_default
    value: Any = setting.default
    if value in {None, "", ()}:
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page())
