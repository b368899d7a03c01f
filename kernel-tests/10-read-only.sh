#!/usr/bin/env bash
# A device that is not writable shows the image, takes no writes, and the image file does not change by a byte.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

four_layers 96M
must qemu-img convert -f qcow2 -O raw l3.qcow2 before.raw
sum=$(sha256sum l3.qcow2)
chmod a-w ./*.qcow2

step "export without writable=on"
start_daemon d --blockdev "$(node l3.qcow2 q read-only=on)" \
    --export "type=ublk,id=e0,node-name=q,device-id=$DEVICE_ID"
DEVICE=/dev/ublkb$DEVICE_ID
wait_for_device "$DEVICE"
equal "read-only" 1 "$(blockdev --getro "$DEVICE")"
copy_device seen.raw
cmp before.raw seen.raw || fail "the device does not show the chain's content"
! dd if=/dev/zero of="$DEVICE" bs=4k count=1 oflag=direct status=none 2>/dev/null || fail "a write was accepted"
! blkdiscard -o 0 -l 1M "$DEVICE" 2>/dev/null || fail "a discard was accepted"
must_fail 'read-only' qmp d block-export-add type=ublk id=e1 node-name=q writable=true
stop_daemon d
equal "image file" "$sum" "$(sha256sum l3.qcow2)"
