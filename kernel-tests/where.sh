# Where things are and where the kernel tests can run. Sourced by setup, vm, run and demo.sh.

TESTS_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SOURCE_DIR=$(dirname "$TESTS_DIR")
LIVEBLK_CACHE=${LIVEBLK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/liveblk}
TARGET_DIR=${CARGO_TARGET_DIR:-$SOURCE_DIR/target}
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf '%s\n' "$*"; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# True where this very machine can serve ublk devices, so that no virtual machine is needed.
# LIVEBLK_FORCE_VM=1 asks for the virtual machine all the same.
host_has_ublk() {
    [ -z "${LIVEBLK_FORCE_VM:-}" ] || return 1
    [ "$(id -u)" = 0 ] || return 1
    [ -c /dev/ublk-control ] && return 0
    command -v modprobe >/dev/null && modprobe -q ublk_drv 2>/dev/null && [ -c /dev/ublk-control ]
}
