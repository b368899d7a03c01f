#!/usr/bin/env bash
# Two devices at once, in one daemon and in two, each under load of its own, do not get into each other's way.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

for i in 1 2 3; do new_image $i.qcow2 96M; done
start_daemon both \
    --blockdev "$(node 1.qcow2 one)" --export "type=ublk,id=e1,node-name=one,writable=on,device-id=$DEVICE_ID" \
    --blockdev "$(node 2.qcow2 two)" --export "type=ublk,id=e2,node-name=two,writable=on,device-id=$((DEVICE_ID + 1))"
serve other 3.qcow2 device-id=$((DEVICE_ID + 2))

step "three loads at once"
loads=()
for i in 0 1 2; do
    DEVICE=/dev/ublkb$((DEVICE_ID + i))
    wait_for_device "$DEVICE"
    verify randwrite $((24 * SCALE < 90 ? 24 * SCALE : 90))m &
    loads+=($!)
done
for load in "${loads[@]}"; do wait "$load" || fail "a load failed"; done

step "one goes, the others stay"
for i in 0 1 2; do
    DEVICE=/dev/ublkb$((DEVICE_ID + i))
    copy_device $((i + 1)).raw
done
must qmp both block-export-del id=e1
wait_for_no_device /dev/ublkb$DEVICE_ID
stop_daemon other
DEVICE=/dev/ublkb$((DEVICE_ID + 1))
copy_device again.raw
cmp 2.raw again.raw || fail "the second device changed"
stop_daemon both
check_images 1.qcow2 2.qcow2 3.qcow2
for i in 1 2 3; do same_content $i.raw $i.qcow2; done
