#!/bin/bash
# run-systemd.sh - boot a throw-away real systemd (as PID 1 of its own namespaces), run a command
# inside it, return the command's exit status, tear everything down.
#
#   run-systemd.sh [options] [--] COMMAND [ARG...]
#
#   --bind PATH      make PATH visible read-write inside (repeatable; $PWD is always bound unless it is /)
#   --ro-bind PATH   the same, read-only
#   --share-net      use the host's network namespace (default: a private one with only lo)
#   --host-systemd   use the installed systemd even if it is < 253 (no Type=notify-reload)
#   --root DIR       use DIR (a debootstrap tree with systemd, dbus and util-linux in it) in place of the host's /
#   --pid-file FILE  once it is up, write the pid of its PID 1 to FILE: nsenter -t PID -m -u -i -n -p -C -- COMMAND
#   --journal FILE   after the command, write the sandbox's whole journal (short-precise) to FILE
#   --boot-timeout N seconds to wait for the boot (default 30)
#   --prepare        only download and unpack the systemd layer
#   -v               show PID 1's boot console on stderr
#
# Inside: / is a copy-on-write overlay of the host's / (every write goes to a tmpfs and is forgotten);
# /tmp, /run, /dev, /proc, /sys are private; the cgroup tree is a private cgroup v2 subtree;
# no unit that the host has enabled is started; only journald and dbus run. Install units with
# `systemctl link`, or by writing to /etc/systemd/system or /run/systemd/system.
# Needs: root, Debian 12+ (bash, util-linux, coreutils, apt). On Debian 12 the systemd of bookworm-backports
# (254) is downloaded with a private apt state and laid over /usr *inside the sandbox only*; nothing is
# installed on the host. Exit: the command's status; 125 = the sandbox itself failed; 128+N on signal N.
set -u
me=$(readlink -f "$0")
CACHE=${RUN_SYSTEMD_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/run-systemd}
die() { echo "run-systemd: $*" >&2; exit 125; }

# ---------------------------------------------------------------- inner half: runs as PID 1 of the new namespaces
if [ "${1-}" = --inner-init ]; then
  set -e
  W=$2 STATE=$3 LAYER=$4 BASE=$5 NET=$6; shift 6      # the rest: pairs "rw|ro PATH"
  read -r hostpid _ </proc/self/stat                  # /proc is still the host's: this is our pid out there
  mount -t tmpfs -o mode=755 sandbox "$W"
  mkdir "$W/upper" "$W/work" "$W/root"
  R=$W/root
  lower=$BASE                                         # the layer lies inside /, which overlayfs refuses (ELOOP): copy it
  [ -n "$LAYER" ] && { cp -a "$LAYER" "$W/layer"; lower=$W/layer:$BASE; }
  mount -t overlay -o "lowerdir=$lower,upperdir=$W/upper,workdir=$W/work" sandbox "$R"
  # --- in the copy-on-write root, drop the host's enabled units, generators, rc links, fstab
  E=$R/etc; S=$E/systemd/system
  rm -rf "$S" "$E/systemd/user" "$E/systemd/system-generators" "$E"/rc[0-6S].d
  mkdir -p "$S" "$E/systemd/user" "$E/systemd/system-generators" "$E/tmpfiles.d" "$E/systemd/journald.conf.d"
  mask() { local u; for u; do ln -sn /dev/null "$S/$u"; done; }
  # Things that would touch the shared kernel or (tmp.conf has "D /tmp") delete files, or just cost time:
  mask systemd-tmpfiles-setup.service systemd-tmpfiles-clean.service systemd-tmpfiles-clean.timer \
       systemd-tmpfiles-setup-dev.service systemd-tmpfiles-setup-dev-early.service \
       systemd-sysctl.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount proc-sys-fs-binfmt_misc.mount \
       systemd-modules-load.service kmod-static-nodes.service systemd-random-seed.service \
       systemd-udevd.service systemd-udev-trigger.service systemd-udevd-control.socket systemd-udevd-kernel.socket \
       sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount \
       dev-hugepages.mount dev-mqueue.mount systemd-remount-fs.service systemd-firstboot.service \
       systemd-machine-id-commit.service systemd-sysusers.service systemd-update-done.service ldconfig.service \
       systemd-journal-catalog-update.service systemd-hwdb-update.service systemd-repart.service \
       systemd-pcrphase.service systemd-pcrphase-sysinit.service systemd-pcrmachine.service \
       systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-logind.service \
       systemd-timesyncd.service systemd-networkd.service systemd-resolved.service \
       systemd-journald-audit.socket systemd-initctl.socket systemd-ask-password-console.path \
       systemd-ask-password-wall.path getty.target console-getty.service cryptsetup.target integritysetup.target \
       veritysetup.target swap.target remote-fs.target e2scrub_reap.service
  ln -sfn /usr/lib/systemd/system/multi-user.target "$S/default.target"
  for g in "$R"/usr/lib/systemd/system-generators/*; do ln -sfn /dev/null "$E/systemd/system-generators/${g##*/}"; done
  ln -sfn /dev/null "$E/tmpfiles.d/tmp.conf"          # never empty /tmp, whoever runs systemd-tmpfiles
  echo '# empty, in the sandbox' >"$E/fstab"
  rm -f "$E/machine-id"; { read -r id; echo "${id//-/}"; } </proc/sys/kernel/random/uuid >"$E/machine-id"
  printf '[Journal]\nStorage=volatile\nRateLimitIntervalSec=0\nForwardToSyslog=no\nForwardToWall=no\n' \
    >"$E/systemd/journald.conf.d/90-sandbox.conf"     # tests read the journal: volatile, no rate limit
  grep -q '^messagebus:' "$E/passwd" || {             # no dbus on the host: the layer's dbus needs its user
    echo 'messagebus:x:899:899::/nonexistent:/usr/sbin/nologin' >>"$E/passwd"; echo 'messagebus:x:899:' >>"$E/group"; }
  # --- private /proc /sys /dev /run /tmp
  mount -t proc -o nosuid,nodev,noexec proc "$R/proc"
  for p in sys sysrq-trigger irq bus; do [ -e "$R/proc/$p" ] && { mount --bind "$R/proc/$p" "$R/proc/$p"; mount -o remount,bind,ro "$R/proc/$p"; }; done
  mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$R/sys"
  mount -t cgroup2 -o rw,nosuid,nodev,noexec cgroup2 "$R/sys/fs/cgroup"
  mount -t tmpfs -o mode=755,nosuid dev "$R/dev"
  mknod_() { mknod -m 666 "$R/dev/$1" c "$2" "$3"; }
  mknod_ null 1 3; mknod_ zero 1 5; mknod_ full 1 7; mknod_ random 1 8; mknod_ urandom 1 9; mknod_ tty 5 0
  mkdir "$R/dev/pts" "$R/dev/shm" "$R/dev/mqueue"
  mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$R/dev/pts"
  mount -t tmpfs -o mode=1777,nosuid,nodev shm "$R/dev/shm"
  mount -t mqueue mqueue "$R/dev/mqueue"
  ln -s pts/ptmx "$R/dev/ptmx"; ln -s /proc/self/fd "$R/dev/fd"
  ln -s /proc/self/fd/0 "$R/dev/stdin"; ln -s /proc/self/fd/1 "$R/dev/stdout"; ln -s /proc/self/fd/2 "$R/dev/stderr"
  touch "$R/dev/console"; mount --bind "$STATE/console" "$R/dev/console"   # PID 1's messages -> a plain file
  mount -t tmpfs -o mode=755,nosuid,nodev run "$R/run"
  mkdir -m 755 "$R/run/lock" "$R/run/systemd"
  mount -t tmpfs -o mode=1777,nosuid,nodev tmp "$R/tmp"
  # --- binds (after /tmp, so that paths under /tmp work)
  while [ $# -gt 0 ]; do
    if [ -d "$2" ]; then mkdir -p "$R$2"; else mkdir -p "$(dirname "$R$2")"; [ -e "$R$2" ] || touch "$R$2"; fi
    mount --rbind "$2" "$R$2"
    [ "$1" = ro ] && mount -o remount,bind,ro "$R$2"
    shift 2
  done
  [ "$NET" = private ] && ip link set lo up 2>/dev/null || true   # systemd does it too
  # --- become the root
  mkdir -p "$R/.oldroot"
  cd "$R"; pivot_root . .oldroot; cd /
  exec </dev/null >/dev/console 2>&1
  printf '%s\n' "$hostpid" >"/.oldroot$STATE/pid.new"; mv "/.oldroot$STATE/pid.new" "/.oldroot$STATE/pid"
  umount -l /.oldroot; rmdir /.oldroot 2>/dev/null || true
  mount --make-rshared /
  hostname sandbox 2>/dev/null || true
  exec env -i container=run-systemd PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
    TERM=dumb SYSTEMD_COLORS=0 \
    setpriv --bounding-set -sys_time,-sys_module,-sys_rawio,-sys_boot,-syslog,-mac_admin,-mac_override,-wake_alarm,-block_suspend \
    /lib/systemd/systemd --system --unit=multi-user.target --show-status=no
fi

# ---------------------------------------------------------------- outer half
[ "$(id -u)" = 0 ] || die "must be root"
BINDS=() NET=private LAYERMODE=auto BASE=/ JOURNAL='' PIDFILE='' BOOT=30 PREPARE=0 VERBOSE=0
[ "$PWD" != / ] && BINDS+=(rw "$PWD")
while [ $# -gt 0 ]; do
  case $1 in
    --bind|--ro-bind) p=$(readlink -e "$2") || die "no such path: $2"
                      case $1 in --bind) BINDS+=(rw "$p");; *) BINDS+=(ro "$p");; esac; shift 2;;
    --share-net) NET=host; shift;;
    --host-systemd) LAYERMODE=none; shift;;
    --root) BASE=$(readlink -e "$2") || die "no such root: $2"; shift 2;;
    --pid-file) PIDFILE=$(readlink -m "$2"); shift 2;;
    --journal) JOURNAL=$(readlink -m "$2"); shift 2;;
    --boot-timeout) BOOT=$2; shift 2;;
    --prepare) PREPARE=1; shift;;
    -v) VERBOSE=1; shift;;
    --) shift; break;;
    -*) die "unknown option $1";;
    *) break;;
  esac
done
[ $# -gt 0 ] || [ $PREPARE = 1 ] || die "usage: $0 [options] -- COMMAND [ARG...]"

# --- 1. a systemd >= 253: the host's, or a layer unpacked from backports
[ "$BASE" = / ] || LAYERMODE=none
if [ $LAYERMODE = auto ]; then
  ver=$(dpkg-query -W -f '${Version}' systemd 2>/dev/null || echo 0)
  dbus=$(dpkg-query -W -f '${Status}' dbus 2>/dev/null || true)
  if dpkg --compare-versions "$ver" ge 253 && [ "$dbus" = 'install ok installed' ]; then LAYERMODE=none; fi
fi
LAYER=''
if [ $LAYERMODE = auto ]; then
  mkdir -p "$CACHE" || die "cannot make $CACHE"
  exec 9>"$CACHE/lock"; flock 9
  LAYER=$CACHE/layer
  if [ ! -e "$LAYER.done" ]; then
    codename=$(. /etc/os-release; echo "${VERSION_CODENAME-}")
    A=$CACHE/apt; rm -rf "$A" "$LAYER" "$LAYER.tmp"; mkdir -p "$A"/{lists,cache/archives}/partial
    key=/usr/share/keyrings/debian-archive-keyring.gpg
    mirror=${RUN_SYSTEMD_MIRROR:-$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | awk -v r="$codename" '$2==r{print $1; exit}')}
    [ -n "$mirror" ] || die "no Debian archive is configured for $codename (run apt-get update first)"
    for s in "$codename" "$codename-backports"; do
      echo "deb [signed-by=$key] $mirror $s main"
    done >"$A/sources.list"
    opt=(-q -y -o "Dir::Etc::sourcelist=$A/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$A/lists"
         -o "Dir::Cache=$A/cache" -o APT::Sandbox::User=root -o Debug::NoLocking=1 -o Acquire::Languages=none)
    apt-get "${opt[@]}" update >"$CACHE/apt.log" 2>&1 &&
    apt-get "${opt[@]}" --no-install-recommends --download-only -t "$codename-backports" \
      install systemd libsystemd-shared libnss-systemd dbus >>"$CACHE/apt.log" 2>&1 || { tail -20 "$CACHE/apt.log" >&2; die "apt failed"; }
    mkdir -p "$LAYER.tmp"/usr/{lib,bin,sbin}
    ln -s usr/lib usr/bin usr/sbin "$LAYER.tmp/"                # merged /usr, as on the host
    for d in "$A"/cache/archives/*.deb; do
      dpkg-deb --fsys-tarfile "$d" | tar -x --keep-directory-symlink -C "$LAYER.tmp" || die "cannot unpack $d"
    done
    rm "$LAYER.tmp"/{lib,bin,sbin}; chmod 755 "$LAYER.tmp"
    [ -x "$LAYER.tmp/usr/lib/systemd/systemd" ] || die "no newer systemd in $codename-backports (see $CACHE/apt.log)"
    mv "$LAYER.tmp" "$LAYER"; rm -rf "$A"; : >"$LAYER.done"
  fi
  flock -u 9; exec 9>&-
fi
[ $PREPARE = 1 ] && { echo "layer: ${LAYER:-none needed}"; exit 0; }

# --- 2. a cgroup v2 subtree of our own (never touches an existing cgroup)
CGROOT=$(awk '$3=="cgroup2"{print $2; exit}' /proc/mounts)
[ -n "$CGROOT" ] || die "no cgroup2 mount found"
self=$(awk -F: '$1==0{print $3}' /proc/self/cgroup); [ "$self" = / ] && self=''
CGBASE=$CGROOT$self; [ -d "$CGBASE" ] || CGBASE=$CGROOT
rmcg() { local i; for i in 1 2 3 4 5 6 7 8 9 10; do
           [ -d "$1" ] || return 0; find "$1" -depth -type d -exec rmdir {} \; 2>/dev/null; [ -d "$1" ] || return 0
           sleep 0.05; done; return 1; }
for c in "$CGBASE"/run-systemd-*; do                            # left by a run that was SIGKILLed
  [ -d "$c" ] && [[ ${c##*-} =~ ^[0-9]+$ ]] && ! kill -0 "${c##*-}" 2>/dev/null && { echo 1 >"$c/cgroup.kill"; sleep 0.1; rmcg "$c"; } 2>/dev/null
done
for s in "${TMPDIR:-/tmp}"/run-systemd.*.*; do
  p=${s%.*}; p=${p##*/run-systemd.}; [ -d "$s" ] && [[ $p =~ ^[0-9]+$ ]] && ! kill -0 "$p" 2>/dev/null && rm -rf --one-file-system "$s"
done
STATE=$(mktemp -d "${TMPDIR:-/tmp}/run-systemd.$$.XXXXXX") || die "mktemp"
chmod 700 "$STATE"; mkdir "$STATE/w"; : >"$STATE/console"
CG=$CGBASE/run-systemd-$$
UN='' CMD=''
cleanup() {
  trap '' EXIT INT TERM HUP
  exec 2>/dev/null
  [ -n "$CMD" ] && kill -KILL "$CMD"
  [ -n "$UN" ] && kill -KILL "$UN" 2>/dev/null                   # --kill-child: PID 1 and so the whole pid namespace die
  [ -d "$CG" ] && { echo 1 >"$CG/cgroup.kill"; } 2>/dev/null
  [ -n "$UN" ] && wait "$UN" 2>/dev/null
  rmcg "$CG"
  rm -rf --one-file-system "$STATE"
}
trap cleanup EXIT
trap 'exit 129' HUP; trap 'exit 130' INT; trap 'exit 143' TERM
mkdir "$CG" || die "cannot make $CG"

# --- 3. boot
netopt=(); [ $NET = private ] && netopt=(--net)
bash -c 'echo $$ >"$1/cgroup.procs" || exit 125; shift; exec "$@"' _ "$CG" \
  setpriv --pdeathsig KILL \
  unshare --mount --propagation private --cgroup --uts --ipc --pid "${netopt[@]}" --fork --kill-child=KILL \
  bash "$me" --inner-init "$STATE/w" "$STATE" "$LAYER" "$BASE" $NET "${BINDS[@]}" </dev/null >>"$STATE/console" 2>&1 &
UN=$!
t0=${EPOCHREALTIME/./}; INIT='' st=''
enter() { nsenter -t "$INIT" -m -u -i -n -p -C -- "$@"; }
fail() { echo "--- console of PID 1:" >&2; tail -40 "$STATE/console" >&2; die "$*"; }
while :; do
  kill -0 "$UN" 2>/dev/null || fail "PID 1 of the sandbox died during boot"
  if [ -z "$INIT" ] && [ -s "$STATE/pid" ]; then INIT=$(<"$STATE/pid"); fi
  if [ -n "$INIT" ]; then
    st=$(enter systemctl is-system-running 2>/dev/null)
    case $st in running|degraded) break;; esac
  fi
  [ $(( ${EPOCHREALTIME/./} - t0 )) -lt $((BOOT*1000000)) ] || fail "not up after $BOOT s (state: ${st:-none})"
  sleep 0.03
done
if [ $VERBOSE = 1 ]; then
  cat "$STATE/console" >&2
  echo "run-systemd: $st after $(( (${EPOCHREALTIME/./} - t0)/1000 )) ms, PID 1 is $INIT" >&2
fi
[ -n "$PIDFILE" ] && { echo "$INIT" >"$PIDFILE.new"; mv "$PIDFILE.new" "$PIDFILE"; }
[ "$st" = degraded ] && enter systemctl --failed --no-pager --plain >&2

# --- 4. run the command in a scope unit of the sandbox, with our stdio, environment and working directory
bash -c 'echo $$ >"$1/init.scope/cgroup.procs"; shift; exec "$@"' _ "$CG" \
  nsenter -t "$INIT" -m -u -i -n -p -C -- \
  setpriv --bounding-set -sys_time,-sys_module,-sys_rawio,-sys_boot,-syslog,-mac_admin,-mac_override,-wake_alarm,-block_suspend \
  env -C "$PWD" -u NOTIFY_SOCKET -u LISTEN_FDS -u LISTEN_PID -u LISTEN_FDNAMES -u WATCHDOG_USEC -u WATCHDOG_PID -u XDG_RUNTIME_DIR -u DBUS_SESSION_BUS_ADDRESS \
  RUN_SYSTEMD=1 systemd-run --scope --quiet --collect --unit=sandbox-command --slice=system.slice -- "$@" <&0 &
CMD=$!
{ wait "$CMD"; rc=$?; } 2>/dev/null                              # no "Killed" job notice from bash
CMD=''
[ -n "$JOURNAL" ] && enter journalctl --no-pager -o short-precise >"$JOURNAL" 2>/dev/null
kill -0 "$UN" 2>/dev/null || fail "PID 1 of the sandbox died while the command ran (command status $rc)"
exit $rc
