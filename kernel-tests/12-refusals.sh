#!/usr/bin/env bash
# What cannot work is refused at start with words that say what is missing and what to do about it.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

new_image a.qcow2 64M
chmod 666 a.qcow2
chmod 777 .

# refused PATTERN [EXPORT-OPTION…]: the daemon does not start and says why.
refused() {
    local pattern=$1 export="type=ublk,id=e0,node-name=q,writable=on,device-id=$DEVICE_ID" option
    shift
    for option; do export+=",$option"; done
    must_fail "$pattern" timeout 60 "${AS[@]}" "$LIVEBLKD" --blockdev "$(node a.qcow2 q)" --export "$export"
    [ ! -e /dev/ublkb$DEVICE_ID ] || fail "a device was left behind"
}
AS=()

step "options out of range"
refused 'queue-depth' queue-depth=0
refused 'queue-depth' queue-depth=65535
refused 'queues' queues=0
refused 'logical-block-size' logical-block-size=1000
refused 'logical-block-size' logical-block-size=256
refused "zero-copy.*does not accept value 'maybe'" zero-copy=maybe
refused "nosuch.*unexpected" nosuch=1

step "a device id in use"
serve d a.qcow2
new_image b.qcow2 64M
must_fail "$DEVICE_ID|exists|in use" timeout 60 "$LIVEBLKD" --blockdev "$(node b.qcow2 q)" \
    --export "type=ublk,id=e0,node-name=q,device-id=$DEVICE_ID"
step "an image in use"
must_fail 'lock' timeout 60 "$LIVEBLKD" --blockdev "$(node a.qcow2 q)" \
    --export "type=ublk,id=e0,node-name=q,writable=on,device-id=$((DEVICE_ID + 1))"
stop_daemon d

step "no permission"
AS=(setpriv --reuid=65534 --regid=65534 --clear-groups)
refused 'permission|not permitted|root|CAP_SYS_ADMIN'
AS=()

if ! kernel_at_least 6.16; then
    step "zero copy on a kernel that has none"
    refused 'zero.copy' zero-copy=on
    serve d a.qcow2 zero-copy=auto
    equal "zero-copy with auto" false "$(zero_copy_of d)"
    stop_daemon d
fi

if [ -e /proc/sys/kernel/io_uring_disabled ] && [ "${LIVEBLK_WHERE:-}" = guest ]; then
    step "io_uring disabled"
    echo 2 >/proc/sys/kernel/io_uring_disabled
    trap 'echo 0 >/proc/sys/kernel/io_uring_disabled' EXIT
    refused 'io_uring'
    echo 0 >/proc/sys/kernel/io_uring_disabled
fi

if [ "${LIVEBLK_WHERE:-}" = guest ]; then
    step "no ublk driver"
    must rmmod ublk_drv
    refused 'ublk_drv'
    must modprobe ublk_drv
fi
serve d a.qcow2
stop_daemon d
