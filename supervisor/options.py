"""The options of ``segue serve``, ``check`` and ``config``, made from the table of settings.

click only parses here. Environment, files, limits and combinations are `segue.supervisor.settings`' matter, so that
they hold wherever a value comes from; so only options that were really given are passed on. Options of uvicorn that
are refused still parse, hidden: the answer is then a reason, not "no such option".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from segue.supervisor.setting_schema import Form, Group, Kind, Setting
from segue.supervisor.setting_table import REFUSED, TABLE

_F = TypeVar("_F", bound=Callable[..., Any])
_TYPES: dict[Kind, click.ParamType[Any]] = {
    Kind.INTEGER: click.INT,
    Kind.NUMBER: click.FLOAT,
    Kind.SWITCH: click.BOOL,
}
_CONFIG_HELP = (
    "Settings file; its keys are these options without the dashes in front. "
    "[default: segue.toml, or [tool.segue] in pyproject.toml, in the working directory]"
)


def serve_options(command: _F) -> _F:
    """Add APP and every option; the callback receives only those that were given on the command line."""
    ours = {setting.name for setting in TABLE} | {_parameter(key) for key in REFUSED} | {"config"}

    @functools.wraps(command)
    def with_given(*args: Any, **parameters: Any) -> Any:
        context = click.get_current_context()
        given = {
            name: value
            for name, value in parameters.items()
            if name not in ours or context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        }
        return command(*args, **given)

    decorators = [_decorator(setting) for setting in TABLE]
    decorators.append(click.option("--config", "config", default=None, metavar="FILE", help=_CONFIG_HELP))
    for key, refused in REFUSED.items():
        more: dict[str, Any] = {"is_flag": True} if refused.switch else {"multiple": True}
        decorators.append(click.option(f"--{key}", _parameter(key), hidden=True, **more))
    for decorator in reversed(decorators):
        decorator(with_given)
    return with_given  # type: ignore[return-value]


class ServeCommand(click.Command):
    """Lists the options under the headings of their groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write them, each group as a section; a command's own options come last."""
        groups: dict[str, list[tuple[str, str]]] = {group.value: [] for group in Group}
        by_name: dict[str, str] = {setting.name: setting.group.value for setting in TABLE}
        by_name["config"] = Group.APPLICATION.value
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups.setdefault(by_name.get(parameter.name or "", "Options"), []).append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def _parameter(key: str) -> str:
    return key.replace("-", "_")


def _decorator(setting: Setting) -> Callable[[Any], Any]:
    if setting.key == "app":
        return click.argument("app", required=False, default=None)
    flag = setting.flag
    if setting.form is Form.PAIR:
        flag = f"{flag}/--no-{setting.key}"
    flags = (flag, setting.alias) if setting.alias else (flag,)
    more: dict[str, Any] = {"multiple": True} if setting.kind is Kind.LIST else {"default": None}
    if setting.kind is Kind.SWITCH and setting.form is not Form.VALUE:
        more["is_flag"] = True
    elif setting.choices and not setting.importable:
        more["type"] = click.Choice(list(setting.choices))
    else:
        more["type"] = _TYPES.get(setting.kind, click.STRING)
        more["metavar"] = "[" + "|".join(setting.choices) + "]" if setting.importable else setting.metavar
    return click.option(*flags, setting.name, help=f"{setting.help}{_default(setting)}", **more)


def _default(setting: Setting) -> str:
    """The default for the help. In words of our own, since to click the default is always None: not given."""
    default = setting.shown_default or setting.default
    if setting.form is Form.PAIR and isinstance(default, bool):
        default = setting.key if default else f"no-{setting.key}"
    elif isinstance(default, bool):
        default = ("true" if default else "false") if setting.form is Form.VALUE else None
    elif isinstance(default, float):
        default = f"{default:g}"
    unit = (
        f" {setting.unit}"
        if setting.unit and default not in {None, ""} and setting.shown_default is None
        else ""
    )
    return "" if default in {None, "", ()} else f" [default: {default}{unit}]"
