#!/usr/bin/env bash
# A base that is longer than its overlay takes its place: the device grows with it on a kernel that can, else it keeps its size.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

new_image base.qcow2 96M
new_image top.qcow2 32M base.qcow2
start_daemon d --blockdev "$(node base.qcow2 base read-only=on)" \
    --blockdev "$(node top.qcow2 top backing=base)" \
    --export "type=ublk,id=e0,node-name=top,writable=on,device-id=$DEVICE_ID"
DEVICE=/dev/ublkb$DEVICE_ID
wait_for_device "$DEVICE"
equal "size" $((32 << 20)) "$(blockdev --getsize64 "$DEVICE")"
random_file data 20
dd if=data of="$DEVICE" bs=1M oflag=direct conv=notrunc status=none

step "the commit of the active layer pivots"
must qmp d block-commit device=top job-id=j
for _ in $(seq 100); do
    [[ $(qmp d query-jobs) != *ready* ]] || break
    sleep 0.1
done
must qmp d job-complete id=j
for _ in $(seq 100); do
    [[ $(qmp d query-jobs) == *'"j"'* ]] || break
    sleep 0.1
done

if kernel_at_least 6.16; then
    for _ in $(seq 50); do
        [ "$(blockdev --getsize64 "$DEVICE")" = $((32 << 20)) ] || break
        sleep 0.1
    done
    equal "size" $((96 << 20)) "$(blockdev --getsize64 "$DEVICE")"
    step "block_resize goes on working"
    must qmp d blockdev-del node-name=top
    must qmp d block_resize node-name=base size=$((160 << 20))
    equal "size" $((160 << 20)) "$(blockdev --getsize64 "$DEVICE")"
else
    step "Linux $(uname -r) cannot resize a ublk device: it keeps its size"
    equal "size" $((32 << 20)) "$(blockdev --getsize64 "$DEVICE")"
    must grep -q 'users keep the size that they know' d.log
fi
cmp -n $((20 << 20)) data "$DEVICE" || fail "the data is another"
stop_daemon d
check_images base.qcow2
