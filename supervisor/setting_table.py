"""The settings as data: every key of `segue serve`, what it takes, and where it can be given.

Command line, environment, settings file, help and ``segue config`` are all derived from `TABLE`. An option of
uvicorn is either in it or in `REFUSED`; tests/test_settings.py fails when a new uvicorn has one that is in neither.
Defaults of uvicorn are copied, since the master doesn't import it; the same test compares them.
"""

from __future__ import annotations

from typing import Any

from segue.supervisor.setting_schema import Form, Group, Kind, Refused, Setting

REFUSED: dict[str, Refused] = {
    "timeout-worker-healthcheck": Refused(
        "workers report by themselves here; --heartbeat-timeout says after how much silence one is replaced",
        "timeout_worker_healthcheck",
    ),
    # not the variable: images set UVICORN_VERSION to a version number
    "version": Refused("'segue --version' prints the version", "version", switch=True, variable=False),
}

_YEAR_S = 365 * 86400
_APP, _LISTEN, _PROC, _DEPLOY, _DEV, _HEALTH, _HTTP, _WS, _TLS, _PROXY, _LOG = Group


def _text(key: str, group: Group, text: str, **more: Any) -> Setting:
    return Setting(key=key, kind=Kind.TEXT, group=group, help=text, **more)


def _integer(key: str, group: Group, text: str, **more: Any) -> Setting:
    return Setting(key=key, kind=Kind.INTEGER, group=group, help=text, **more)


def _seconds(key: str, group: Group, text: str, **more: Any) -> Setting:
    usual: dict[str, Any] = {"kind": Kind.NUMBER, "maximum": _YEAR_S, "unit": "seconds", "metavar": "SECONDS"}
    positive: dict[str, Any] = {} if "minimum" in more else {"above": 0}
    return Setting(key=key, group=group, help=text, **(usual | positive | more))


def _size(key: str, group: Group, text: str, **more: Any) -> Setting:
    usual: dict[str, Any] = {"kind": Kind.SIZE, "maximum": 2**50, "unit": "bytes", "metavar": "SIZE"}
    positive: dict[str, Any] = {} if "minimum" in more else {"above": 0}
    return Setting(key=key, group=group, help=text, **(usual | positive | more))


def _switch(key: str, group: Group, text: str, **more: Any) -> Setting:
    return Setting(key=key, kind=Kind.SWITCH, group=group, help=text, **more)


def _list(key: str, group: Group, text: str, **more: Any) -> Setting:
    return Setting(key=key, kind=Kind.LIST, group=group, help=text, **({"default": ()} | more))


def _file(key: str, group: Group, text: str, **more: Any) -> Setting:
    return Setting(key=key, kind=Kind.FILE, group=group, help=text, metavar="FILE", **more)


TABLE: tuple[Setting, ...] = (
    _text(
        "app",
        _APP,
        "What to serve: module:attribute.",
        uvicorn="app",
        metavar="[APP]",
        shown_default="the built-in application",
    ),
    _switch(
        "factory",
        _APP,
        "APP is a function that returns the application.",
        default=False,
        uvicorn="factory",
        form=Form.ON,
    ),
    Setting(
        key="app-dir",
        kind=Kind.DIRECTORY,
        group=_APP,
        help="Import APP from this directory; looked up anew at each reload, so it may be a symbolic link.",
        shown_default="working directory",
        uvicorn="app_dir",
        metavar="DIR",
    ),
    _text(
        "python",
        _APP,
        "The interpreter of the workers; it needs segue installed, too.",
        shown_default="the one that runs segue",
        metavar="PATH",
    ),
    _text(
        "interface",
        _APP,
        "What kind of application APP is.",
        default="auto",
        uvicorn="interface",
        choices=("auto", "asgi3", "asgi2", "wsgi"),
    ),
    _text(
        "lifespan",
        _APP,
        "Lifespan events.",
        default="auto",
        uvicorn="lifespan",
        choices=("auto", "on", "off"),
    ),
    _switch(
        "reset-contextvars",
        _APP,
        "Run each request in a fresh contextvars.Context; hides context set in the lifespan.",
        default=False,
        uvicorn="reset_contextvars",
        form=Form.ON,
    ),
    _file(
        "env-file",
        _APP,
        "Environment variables for the application, read anew at each reload.",
        uvicorn="env_file",
    ),
    _list(
        "bind",
        _LISTEN,
        "Listen here: HOST:PORT, [IPv6]:PORT, :PORT (all interfaces), unix:PATH or fd:NUMBER. May be repeated; "
        "instead of --host, --port, --uds and --fd.",
        metavar="ADDRESS",
    ),
    _text("host", _LISTEN, "Listen on this host.", default="127.0.0.1", uvicorn="host"),
    _integer(
        "port",
        _LISTEN,
        "Listen on this port; 0 takes a free one.",
        default=8000,
        uvicorn="port",
        minimum=0,
        maximum=65535,
    ),
    _text("uds", _LISTEN, "Listen on this Unix socket.", uvicorn="uds", metavar="PATH"),
    _integer("fd", _LISTEN, "Listen on this inherited descriptor.", uvicorn="fd", minimum=0, maximum=999_999),
    _integer(
        "backlog",
        _LISTEN,
        "Connections that wait in the kernel.",
        default=2048,
        uvicorn="backlog",
        minimum=1,
        maximum=2**31 - 1,
    ),
    _text("name", _PROC, "The instance's name.", default="default", restart=True),
    _text(
        "runtime-dir",
        _PROC,
        "The directory of the instances' sockets.",
        shown_default="$RUNTIME_DIRECTORY, $XDG_RUNTIME_DIR/segue, or a private one under the temp directory",
        metavar="DIR",
        restart=True,
    ),
    _integer(
        "workers",
        _PROC,
        "Worker processes; also $WEB_CONCURRENCY.",
        default=1,
        uvicorn="workers",
        variable="WEB_CONCURRENCY",
        minimum=1,
        maximum=1024,
    ),
    _seconds("ready-timeout", _PROC, "How long a worker may take to start and warm up.", default=60.0),
    _seconds(
        "drain-timeout", _PROC, "How long an old generation may finish what it has begun.", default=300.0
    ),
    _seconds(
        "timeout-graceful-shutdown",
        _PROC,
        "How long a stop may take.",
        default=30.0,
        uvicorn="timeout_graceful_shutdown",
    ),
    _seconds(
        "idle-grace",
        _PROC,
        "How long a draining worker waits for the last request of a connection that it can't hand over.",
        default=30.0,
        minimum=0,
    ),
    _integer(
        "queue-limit",
        _PROC,
        "How many requests a worker holds at most during an operator's drain in the mode queue.",
        default=1000,
        minimum=1,
        maximum=1_000_000,
    ),
    _seconds(
        "queue-timeout",
        _PROC,
        "How long a request is held during such a drain before it is answered with 503.",
        default=30.0,
    ),
    _seconds(
        "stop-delay",
        _PROC,
        "Go on serving with readiness off for so long before a stop.",
        default=0.0,
        minimum=0,
    ),
    _seconds("heartbeat-timeout", _PROC, "A worker silent for so long is replaced.", default=30.0),
    _integer(
        "limit-max-requests",
        _PROC,
        "Replace a worker after so many requests.",
        uvicorn="limit_max_requests",
        minimum=1,
    ),
    _integer(
        "limit-max-requests-jitter",
        _PROC,
        "Add up to so many at random, so that workers aren't replaced all at once.",
        default=0,
        uvicorn="limit_max_requests_jitter",
        minimum=0,
    ),
    _size("max-worker-rss", _PROC, "Replace a worker that uses more memory (512M, 2G)."),
    _size(
        "max-worker-rss-jitter",
        _PROC,
        "Add up to so much at random, so that workers don't come to it all at once.",
        shown_default="a tenth of it",
        minimum=0,
    ),
    _seconds("max-worker-age", _PROC, "Replace a worker that has run for so long."),
    _seconds(
        "max-worker-age-jitter",
        _PROC,
        "Add up to so much at random, so that workers don't come to it all at once.",
        shown_default="a tenth of it",
        minimum=0,
    ),
    _text(
        "strategy",
        _DEPLOY,
        "How a reload replaces workers: surge starts all new ones beside the old ones, rolling one at a time, replace "
        "stops the old ones first, for what can't run twice.",
        default="surge",
        choices=("surge", "rolling", "replace"),
    ),
    _seconds(
        "replace-timeout",
        _DEPLOY,
        "With --strategy replace, how long the old workers may finish what they have begun.",
        default=10.0,
        minimum=0,
    ),
    _integer(
        "canary",
        _DEPLOY,
        "Let so many workers of a new generation serve beside the old one first.",
        shown_default="none",
        minimum=1,
        maximum=1024,
        metavar="N",
    ),
    _seconds("canary-for", _DEPLOY, "How long they do, before all are replaced.", default=60.0),
    _seconds(
        "probation",
        _DEPLOY,
        "How long a new generation is watched: if a worker of it crashes, or too many of its answers are 5xx, the "
        "previous one is taken back. With --reload not at all, unless it is set.",
        default=10.0,
        minimum=0,
    ),
    Setting(
        key="probation-5xx",
        kind=Kind.NUMBER,
        group=_DEPLOY,
        help="Too many is a share of the answers larger by so much than the previous generation's, of at least 20.",
        default=0.2,
        above=0,
        maximum=1,
        metavar="SHARE",
    ),
    _seconds(
        "park-for",
        _DEPLOY,
        "How long the previous generation is kept warm after a reload, for 'segue rollback'.",
        shown_default="the probation time",
        minimum=0,
    ),
    _switch(
        "reload",
        _DEV,
        "Reload at each save. What breaks leaves the last good code serving.",
        default=False,
        uvicorn="reload",
        form=Form.ON,
        alias="--watch",
        restart=True,
    ),
    _list(
        "reload-dir",
        _DEV,
        "Watch this directory and everything below it. May be repeated.",
        uvicorn="reload_dirs",
        shown_default="working directory and --app-dir",
        metavar="DIR",
        restart=True,
    ),
    _list(
        "reload-include",
        _DEV,
        "Watch files that match this pattern, too, beside *.py. May be repeated.",
        uvicorn="reload_includes",
        metavar="GLOB",
        restart=True,
    ),
    _list(
        "reload-exclude",
        _DEV,
        "Ignore files that match this pattern, or this directory, beside hidden ones, caches and virtual "
        "environments. May be repeated.",
        uvicorn="reload_excludes",
        metavar="GLOB",
        restart=True,
    ),
    _seconds(
        "reload-delay",
        _DEV,
        "Look for the next save so long after the last: those that come meanwhile are one.",
        default=0.25,
        uvicorn="reload_delay",
        minimum=0,
        restart=True,
    ),
    _switch(
        "reload-pages",
        _DEV,
        "With --reload, pages that are open in a browser reload themselves, too: a script is added to them.",
        default=True,
        form=Form.PAIR,
    ),
    _list(
        "warm-up",
        _HEALTH,
        "Request this path inside each new worker before it is ready; a 5xx or an exception is a failed start. May be repeated.",
        metavar="PATH",
    ),
    _text("health-path", _HEALTH, "Answer readiness on this path of the public listeners.", metavar="PATH"),
    _switch(
        "request-metrics",
        _HEALTH,
        "Count responses by status class and time them, for the metrics.",
        default=True,
        form=Form.PAIR,
    ),
    _text(
        "admin",
        _HEALTH,
        "Serve the dashboard, metrics, health and status here, and with --token-file every command.",
        metavar="HOST:PORT",
        restart=True,
    ),
    _text(
        "control-group",
        _HEALTH,
        "Let the members of this group control the instance, beside its user and root.",
        metavar="GROUP",
        restart=True,
    ),
    _file(
        "token-file", _HEALTH, "The bearer token that lets commands in over --admin and the public listeners."
    ),
    _text(
        "loop",
        _HTTP,
        "Event loop implementation, or the import string of one.",
        default="auto",
        uvicorn="loop",
        choices=("none", "auto", "asyncio", "uvloop", "zuvloop"),
        importable=True,
    ),
    _text(
        "http",
        _HTTP,
        "HTTP implementation, or the import string of one.",
        default="auto",
        uvicorn="http",
        choices=("auto", "h11", "httptools", "zttp"),
        importable=True,
    ),
    _switch("http2", _HTTP, "HTTP/2; needs --http zttp.", default=False, uvicorn="http2", form=Form.ON),
    _integer(
        "timeout-keep-alive",
        _HTTP,
        "Close a connection that was idle for so long. Longer than the proxy in front keeps its own (nginx: 60).",
        default=75,
        uvicorn="timeout_keep_alive",
        minimum=0,
        maximum=_YEAR_S,
        unit="seconds",
        metavar="SECONDS",
    ),
    _integer(
        "limit-concurrency",
        _HTTP,
        "Answer 503 above so many connections or tasks of a worker.",
        uvicorn="limit_concurrency",
        minimum=1,
    ),
    _integer(
        "h11-max-incomplete-event-size",
        _HTTP,
        "For h11, how much of an incomplete event is buffered.",
        uvicorn="h11_max_incomplete_event_size",
        minimum=1,
        unit="bytes",
        metavar="BYTES",
    ),
    _text(
        "ws",
        _WS,
        "WebSocket implementation, or the import string of one.",
        default="auto",
        uvicorn="ws",
        choices=("auto", "none", "websockets", "websockets-sansio", "wsproto"),
        importable=True,
    ),
    _integer(
        "ws-max-size",
        _WS,
        "Largest message.",
        default=16777216,
        uvicorn="ws_max_size",
        minimum=1,
        unit="bytes",
        metavar="BYTES",
    ),
    _integer("ws-max-queue", _WS, "Messages that are queued.", default=32, uvicorn="ws_max_queue", minimum=1),
    _seconds("ws-ping-interval", _WS, "Time between pings.", default=20.0, uvicorn="ws_ping_interval"),
    _seconds("ws-ping-timeout", _WS, "How long a pong may take.", default=20.0, uvicorn="ws_ping_timeout"),
    _switch("ws-per-message-deflate", _WS, "Compression.", default=True, uvicorn="ws_per_message_deflate"),
    _file("ssl-keyfile", _TLS, "Private key.", uvicorn="ssl_keyfile"),
    _file("ssl-certfile", _TLS, "Certificate chain.", uvicorn="ssl_certfile"),
    _text(
        "ssl-keyfile-password",
        _TLS,
        "Password of the key. Other users can read a command line: prefer the environment or the settings file.",
        uvicorn="ssl_keyfile_password",
        secret=True,
    ),
    _integer(
        "ssl-version",
        _TLS,
        "Protocol, as in Python's ssl module.",
        shown_default="PROTOCOL_TLS_SERVER",
        uvicorn="ssl_version",
        minimum=0,
    ),
    _integer(
        "ssl-cert-reqs",
        _TLS,
        "Client certificates: 0 none, 1 optional, 2 required.",
        shown_default="0",
        uvicorn="ssl_cert_reqs",
        minimum=0,
        maximum=2,
    ),
    _file(
        "ssl-ca-certs",
        _TLS,
        "Certificates of the authorities that sign those of clients.",
        uvicorn="ssl_ca_certs",
    ),
    _text(
        "ssl-ciphers", _TLS, "Ciphers, in OpenSSL's words.", shown_default="OpenSSL's", uvicorn="ssl_ciphers"
    ),
    _switch(
        "proxy-headers",
        _PROXY,
        "Take client address and scheme from X-Forwarded-For and X-Forwarded-Proto.",
        default=True,
        uvicorn="proxy_headers",
        form=Form.PAIR,
    ),
    _text(
        "forwarded-allow-ips",
        _PROXY,
        "Whom to believe these headers: addresses, networks, paths, separated by commas, or '*'; "
        "also $FORWARDED_ALLOW_IPS.",
        shown_default="127.0.0.1,::1",
        uvicorn="forwarded_allow_ips",
        variable="FORWARDED_ALLOW_IPS",
    ),
    _text(
        "root-path",
        _PROXY,
        "The path under which a proxy offers the application.",
        default="",
        uvicorn="root_path",
        metavar="PATH",
    ),
    _list(
        "header",
        _PROXY,
        "Add 'Name: value' to each response. May be repeated.",
        uvicorn="headers",
        metavar="HEADER",
    ),
    _switch(
        "server-header", _PROXY, "The Server header.", default=True, uvicorn="server_header", form=Form.PAIR
    ),
    _switch("date-header", _PROXY, "The Date header.", default=True, uvicorn="date_header", form=Form.PAIR),
    _file(
        "log-config",
        _LOG,
        "Logging configuration: .ini, .json or .yaml.",
        uvicorn="log_config",
        shown_default="uvicorn's",
    ),
    _text(
        "log-level",
        _LOG,
        "Lowest level that is logged.",
        shown_default="info",
        uvicorn="log_level",
        choices=("critical", "error", "warning", "info", "debug", "trace"),
    ),
    _text(
        "log-format",
        _LOG,
        "How the log is written; auto is text on a terminal and JSON elsewhere.",
        default="auto",
        choices=("auto", "text", "json"),
    ),
    _text(
        "access-log-format",
        _LOG,
        "How the access log is written; auto is uvicorn's own format in a text log, else JSON.",
        default="auto",
        choices=("auto", "uvicorn", "combined", "json"),
    ),
    _switch("access-log", _LOG, "A line per request.", default=True, uvicorn="access_log", form=Form.PAIR),
    _switch(
        "use-colors",
        _LOG,
        "Colors in the log.",
        shown_default="on a terminal",
        uvicorn="use_colors",
        form=Form.PAIR,
    ),
)

BY_KEY: dict[str, Setting] = {setting.key: setting for setting in TABLE}
