"""``segue unit``: unit files for systemd with the paths, addresses and time-outs of a place.

The files in ``systemd/`` are what this prints for `segue.supervisor.place.EXAMPLE`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from segue.supervisor.place import NOTIFY, NOTIFY_RELOAD, NOTIFY_RELOAD_SINCE, TEMPLATE_NAME, Place, UnitError

_BACKLOG = 2048
_UNPRIVILEGED_PORT = 1024


def _literal(text: str, place: Place) -> str:
    """Without specifiers (systemd.unit(5)); a template's own stay."""
    if not text.isprintable():
        raise UnitError(f"{text!r} can't be written into a unit: not everything in it can be printed")
    return text if place.is_template and TEMPLATE_NAME in text else text.replace("%", "%%")


def _quoted(word: str, place: Place) -> str:
    """As one of several words in a line (systemd.syntax(7))."""
    word = _literal(word, place).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{word}"' if not word or re.search(r"[\s'\";]", word) else word


def _line(words: Sequence[str], place: Place) -> str:
    """Arguments of ``ExecStart=`` (systemd.service(5)), where a dollar sign begins a variable."""
    return " ".join(_quoted(word.replace("$", "$$"), place) for word in words)


def _program(place: Place) -> str:
    """What runs segue; in the path itself nothing is replaced, and not everything is allowed."""
    path, *arguments = place.command
    if re.search(r"['\"\\]", path):
        raise UnitError(f"systemd runs no program with a quote or a backslash in its path: move {path}")
    return " ".join([_quoted(path, place), *map(str, arguments)])


def _whole(path: str, place: Place) -> str:
    """As all that a line says: it is not unquoted, but a backslash at its end would make the next line a part of it."""
    if path.endswith("\\") or path != path.strip():
        raise UnitError(f"{path!r} can't be written into a unit: it ends with a backslash or a space")
    return _literal(path, place)


# ----------------------------------------------------------------------------------------------------- the service


def service(place: Place) -> str:
    """The service unit. Raises `UnitError`."""
    segue = _program(place)
    name = ("--name", place.name) if place.is_template else ()
    start = f"{segue} serve {_line((*place.arguments, *name), place)}".rstrip()
    runtime = f" {_line(('--runtime-dir', place.runtime_dir), place)}" if place.runtime_dir else ""
    sections = [
        _head(place),
        _UNIT.format(description=_description(place)),
        _SERVICE.format(
            type=_TYPES[place.type].format(
                segue=segue,
                where=runtime or f" --runtime-dir %t/{place.base}",
                name=place.name.replace("%", "%%") if not place.is_template else place.name,
            ),
            user=place.user,
            group=_GROUP.format(group=place.group) if place.group else "",
            directory=_whole(place.directory, place),
            pwd=_quoted(f"PWD={place.directory}", place),
            start=start,
            hook=f"{segue} stop --unit %n{runtime}",
            directories=_directories(place),
            start_timeout=place.start_timeout_s,
            stop_timeout=place.stop_timeout_s,
        ),
        _HARDENING.format(
            home=_home(place),
            tmp=_tmp(place),
            writable=_writable(place),
            privileges=_privileges(place),
            calls="# Its socket is given to the group.\nSystemCallFilter=@chown\n" if place.group else "",
        ),
        "[Install]\nWantedBy=multi-user.target\n",
    ]
    return "\n".join(sections)


def _head(place: Place) -> str:
    name = f"{place.unit}.service"
    started = f"{place.unit}NAME.service" if place.is_template else name
    text = [f"# {name}: save it in /etc/systemd/system, then"]
    text += [f"#     systemctl daemon-reload && systemctl enable --now {started}"]
    if place.is_template:
        text += ["# One instance for each configuration: segue@shop.service reads /etc/segue/shop.toml."]
    if place.type == NOTIFY:
        text += [
            f"# For any systemd from 248 on; from {NOTIFY_RELOAD_SINCE} on take the one with Type=notify-reload."
        ]
    else:
        text += [
            f"# For systemd {NOTIFY_RELOAD_SINCE} or newer; before, take the one with Type=notify (segue unit --type notify)."
        ]
    return "\n".join(text) + "\n"


def _description(place: Place) -> str:
    if place.is_template:
        return "segue: %i"
    return f"segue: {_whole(place.app or 'the AI backend', place)}"


_UNIT = """[Unit]
Description={description}
Documentation=https://pypi.org/project/segue/
After=network-online.target
Wants=network-online.target
# While the master is tried again and again, its workers serve: giving up would leave them without one for good.
StartLimitIntervalSec=0
"""

_TYPES = {
    NOTIFY_RELOAD: """# Active once the first generation serves. A reload is SIGHUP, and "systemctl reload" waits for its end; it can't show
# one that was refused: "segue reload" does, and the Status: line of "systemctl status".
Type=notify-reload""",
    NOTIFY: """# Active once the first generation serves. "systemctl reload" waits for the outcome, and fails if it was refused.
Type=notify
ExecReload={segue} reload{where} --name {name}""",
}

_SERVICE = """[Service]
{type}
NotifyAccess=main
User={user}
{group}# May be a symbolic link to the release that is to run (current -> releases/42): each reload resolves it anew. systemd
# tells a process only where it leads to, hence PWD. One that leads nowhere is told of by segue, and what serves goes on.
WorkingDirectory=-{directory}
Environment={pwd}
ExecStart={start}
# The master alone is ended or killed by systemd. A crash costs no worker: the next master takes them over. In a restart,
# too, they serve on until the code on the disk has been started beside them. At a stop the hooks leave no process.
KillMode=process
ExecStop={hook}
ExecStopPost={hook}
{directories}# The listening sockets and the relay, with the connections in it, outlive every process here. Two descriptors are the
# relay's, each address has one or two.
FileDescriptorStoreMax=64
# At once, since between a crash and the restart systemd would run no hook for a stop. After a start that fails soon,
# ExecStopPost= waits a second. A mistake in flags or settings (2) doesn't heal by itself, nor one for which neither can
# be run: no such program (203), group (216), user (217) or directory (226).
Restart=on-failure
RestartSec=1ms
RestartPreventExitStatus=2 203 216 217 226
# Each is more than the sum of segue's own deadlines. A start that makes progress asks for more time by itself.
TimeoutStartSec={start_timeout}
TimeoutStopSec={stop_timeout}
# Sent by the master's one loop, so a master that hangs is killed and followed by another; its workers notice nothing.
WatchdogSec=30
# A worker that the kernel ends for want of memory is started anew by the master; it is no reason to stop the rest.
OOMPolicy=continue
# Connections, and those in flight between generations, which count against it too.
LimitNOFILE=65536
"""

_GROUP = """# Its members may control the instance.
SupplementaryGroups={group}
"""

_DIRECTORIES = """# Sockets and journal of the instance. Kept, since the next master finds the workers by them.
RuntimeDirectory={base}
RuntimeDirectoryMode={mode}
RuntimeDirectoryPreserve=yes
# $STATE_DIRECTORY: what must last, such as the built-in application's memory. All else is read-only.
StateDirectory={base}
StateDirectoryMode=0700
"""


def _directories(place: Place) -> str:
    if place.runtime_dir:
        return ""
    # the instance's own directory in it is for the group alone
    return _DIRECTORIES.format(base=place.base, mode="0755" if place.group else "0700")


_HARDENING = """# What neither segue nor an ordinary application needs. An application that does: put the opposite into a drop-in
# (systemctl edit), for example ReadWritePaths=/srv/uploads or PrivateDevices=no for a GPU.
NoNewPrivileges=yes
{privileges}
# The file system: read-only but for the directories above{writable}
ProtectSystem=strict
{home}
{tmp}
UMask=0077
PrivateDevices=yes
ProtectProc=invisible
# The kernel
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
LockPersonality=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
KeyringMode=private
# IP, Unix sockets, and netlink, with which name look-ups learn which address families there are
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
# @system-service has what services do; of it nothing that needs privileges. A call that is denied fails with EPERM.
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
{calls}SystemCallErrorNumber=EPERM
# Not set: MemoryDenyWriteExecute=, since compilers at run time (numba, torch, cffi's callbacks) need such memory;
# ProcSubset=pid, since psutil and the sizing of thread pools read /proc/stat and /proc/meminfo; IPAddressDeny=, since
# who may connect is for the address and the firewall to say; RemoveIPC=, which takes the shared memory of workers away
# when their master ends; PrivateUsers=, since the next master, in a user namespace of its own, could not look after them.
"""


def _home(place: Place) -> str:
    if any(path.startswith(("/home/", "/root/", "/run/user/")) for path in place.paths):
        return "# Code or interpreter are in a home directory.\nProtectHome=read-only"
    return "ProtectHome=yes"


def _tmp(place: Place) -> str:
    if any(path.startswith(("/tmp/", "/var/tmp/")) for path in place.paths):
        return "# Code or interpreter are in a directory for temporary files.\nReadWritePaths=/tmp /var/tmp"
    return """# Not PrivateTmp=, which is emptied when the master ends, under the feet of the workers that serve on.
TemporaryFileSystem=/tmp:mode=1777,size=50% /var/tmp:mode=1777,size=50%"""


def _writable(place: Place) -> str:
    """Directories in which segue itself has to make something."""
    return "".join(f"\nReadWritePaths={_quoted(f'-{path}', place)}" for path in place.writable)


def _privileges(place: Place) -> str:
    if any(0 < _port(bind) < _UNPRIVILEGED_PORT for bind in place.binds):
        return "# A port below 1024.\nAmbientCapabilities=CAP_NET_BIND_SERVICE\nCapabilityBoundingSet=CAP_NET_BIND_SERVICE"
    return "CapabilityBoundingSet="


def _port(bind: str) -> int:
    port = bind.rpartition(":")[2]
    return int(port) if not bind.startswith(("unix:", "fd:")) and port.isdigit() else 0


# ------------------------------------------------------------------------------------------------------ the socket


def socket(place: Place) -> str:
    """The socket unit. Raises `UnitError`."""
    listen = "\n".join(f"ListenStream={_stream(bind, place)}" for bind in place.binds)
    name = f"{place.unit}.socket"
    service_name = f"{place.unit}.service"
    return f"""# {name}, beside {service_name}: systemd holds the listening sockets, from the boot on and while the service
# is stopped; who connects then starts it, and waits.
#     systemctl enable --now {name.replace("@.", "@NAME.")}
# The service serves on all of them. If its command line or settings name addresses, they must be these.
[Unit]
Description=The listening sockets of {service_name.replace("@.", "@%i.")}

[Socket]
{listen}
# The names that the service sees ($LISTEN_FDNAMES): several socket units may belong to one (Sockets=).
FileDescriptorName=http
# One socket for all connections: Accept=yes would start a service for each.
Accept=no
Backlog={_BACKLOG}
{_more(place)}
[Install]
WantedBy=sockets.target
"""


def _more(place: Place) -> str:
    lines = []
    if any(not bind.startswith("unix:") for bind in place.binds):
        lines += ["NoDelay=yes"]
    if any(bind.startswith("unix:") for bind in place.binds):
        lines += [
            "# Who may connect: everybody who can go to the directory.",
            "SocketMode=0666",
            "RemoveOnStop=yes",
        ]
    return "".join(f"{line}\n" for line in lines)


def _stream(bind: str, place: Place) -> str:
    if bind.startswith("unix:"):
        return _whole(bind.removeprefix("unix:"), place)
    host, _, port = bind.rpartition(":")
    if bind.startswith("fd:") or port == "0":
        raise UnitError(f"a socket unit can't listen on {bind}: name an address with --bind")
    if not host:
        return port
    if host == "localhost":
        return f"127.0.0.1:{port}"
    if not host.startswith("[") and not re.fullmatch(r"[0-9.]+", host):
        raise UnitError(f"a socket unit takes no host name: give the address of {host} with --bind")
    return bind
