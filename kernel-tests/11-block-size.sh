#!/usr/bin/env bash
# A device with 4096-byte logical blocks says so, refuses smaller requests, and works with file systems and verify load.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

new_image a.qcow2 128M
serve d a.qcow2 logical-block-size=4096
equal "logical block size" 4096 "$(blockdev --getss "$DEVICE")"
equal "size" $((128 << 20)) "$(blockdev --getsize64 "$DEVICE")"
! dd if=/dev/zero of="$DEVICE" bs=512 count=1 oflag=direct status=none 2>/dev/null || fail "a 512-byte request was accepted"
verify randwrite 32m
must mkfs.ext4 -q "$DEVICE"
mkdir -p mnt
mount "$DEVICE" mnt
random_file mnt/file 20
sum=$(sha256sum <mnt/file)
umount mnt
must e2fsck -fn "$DEVICE"
stop_daemon d
check_images a.qcow2

step "the other limits that the kernel is told"
serve d a.qcow2
queue=/sys/block/$(basename "$DEVICE")/queue
equal "logical block size" 512 "$(cat "$queue/logical_block_size")"
equal "optimal I/O size (the cluster size)" 65536 "$(cat "$queue/optimal_io_size")"
equal "discard granularity (the cluster size)" 65536 "$(cat "$queue/discard_granularity")"
equal "volatile cache" "write back" "$(cat "$queue/write_cache")"
[ "$(cat "$queue/discard_max_bytes")" -gt 0 ] || fail "no discard"
[ "$(cat "$queue/write_zeroes_max_bytes")" -gt 0 ] || fail "no write zeroes"
mount "$DEVICE" mnt
equal "checksum" "$sum" "$(sha256sum <mnt/file)"
umount mnt
stop_daemon d
