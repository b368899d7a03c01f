#!/usr/bin/env bash
# Block devices of the host under raw and qcow2 nodes: file systems, verify load, discard, zeroing, 4096-byte sectors, too small, in use.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

command -v losetup >/dev/null || skip "losetup is missing"
LOOPS=()
detach() { for loop in "${LOOPS[@]}"; do losetup -d "$loop" 2>/dev/null || true; done; }
trap detach EXIT

# new_loop FILE MEBIBYTES [LOSETUP-OPTION…]: sets LOOP, a block device over a new file.
new_loop() {
    local file=$1
    truncate -s "$2M" "$file"
    shift 2
    LOOP=$(losetup --find --show --direct-io=on "$@" "$file") || skip "no loop device: $(losetup -f 2>&1)"
    LOOPS+=("$LOOP")
}

# device DEVICE NAME DRIVER: the --blockdev value for an image in a block device.
device() { printf 'driver=%s,node-name=%s,discard=unmap,cache.direct=on,file.driver=host_device,file.filename=%s,file.discard=unmap,file.cache.direct=on' "$3" "$2" "$1"; }

# serve_device DEVICE DRIVER [EXPORT-OPTION]: sets DEVICE.
serve_device() {
    start_daemon d --blockdev "$(device "$1" q "$2")" \
        --export "type=ublk,id=e0,node-name=q,writable=on,device-id=$DEVICE_ID${3:+,$3}"
    DEVICE=/dev/ublkb$DEVICE_ID
    wait_for_device "$DEVICE"
}

# zeroed OFFSET LENGTH, in MiB, of the served device
zeroed() {
    cmp -s -n $(($2 << 20)) <(dd if="$DEVICE" bs=1M skip="$1" count="$2" iflag=direct status=none) /dev/zero ||
        fail "$2 MiB at $1 MiB are not zero"
}

file_system_and_load() {
    must mkfs.ext4 -q "$DEVICE"
    mkdir -p mnt
    mount "$DEVICE" mnt
    random_file mnt/file 12
    umount mnt
    must e2fsck -fn "$DEVICE"
    verify randwrite 24m
}

discard_and_zero() {
    dd if=/dev/urandom of="$DEVICE" bs=1M count=24 oflag=direct status=none
    must blkdiscard -o 4M -l 4M "$DEVICE"
    must blkdiscard -z -o 12M -l 4M "$DEVICE"
    zeroed 12 4
    must fallocate --punch-hole -o 16M -l 4M "$DEVICE"
    zeroed 16 4
    must blkdiscard -z -o $((20 * 1048576 + 4096)) -l 12288 "$DEVICE"
    cmp -s -n 12288 <(dd if="$DEVICE" bs=4k skip=$((20 * 256 + 1)) count=3 iflag=direct status=none) /dev/zero ||
        fail "12 KiB were not zeroed"
}

new_loop small-sectors 96
SMALL=$LOOP
for sector in 512 4096; do
    if [ $sector = 4096 ]; then
        new_loop large-sectors 96 --sector-size 4096
    fi
    equal "sector size" $sector "$(blockdev --getss "$LOOP")"

    step "raw on a device with sectors of $sector bytes"
    serve_device "$LOOP" raw
    equal "size" "$(blockdev --getsize64 "$LOOP")" "$(blockdev --getsize64 "$DEVICE")"
    equal "logical block size" $sector "$(blockdev --getss "$DEVICE")"
    file_system_and_load
    discard_and_zero
    copy_device after.raw
    stop_daemon d
    must cmp after.raw "$LOOP"

    step "qcow2 on a device with sectors of $sector bytes"
    must qemu-img create -q -f qcow2 "$LOOP" 64M
    serve_device "$LOOP" qcow2
    file_system_and_load
    discard_and_zero
    must blkdiscard "$DEVICE"
    zeroed 0 64
    verify write 48m
    must qmp d blockdev-snapshot-sync node-name=q snapshot-file="$PWD/overlay-$sector.qcow2" snapshot-node-name=o format=qcow2
    verify randwrite 16m
    copy_device after.raw
    stop_daemon d
    must qemu-img check -q -f qcow2 "$LOOP"
    check_images overlay-$sector.qcow2
    must qemu-img compare -f raw -F qcow2 after.raw overlay-$sector.qcow2
done

step "requests of 512 bytes above sectors of 4096 bytes"
serve_device "$LOOP" raw logical-block-size=512
dd if=/dev/urandom of=block bs=512 count=3 status=none
dd if="$DEVICE" of=before bs=4k count=2 iflag=direct status=none
dd if=block of="$DEVICE" bs=512 seek=3 oflag=direct status=none
dd if="$DEVICE" of=now bs=4k count=2 iflag=direct status=none
must cmp -n 1536 -i 0:1536 block now
must cmp -n 1536 before now
must cmp -n 5120 -i 3072:3072 before now
verify randwrite 4m --bsrange=512-8k
stop_daemon d

step "a device that is too small: no space, told as that, and the device lives on"
new_loop tiny 8
must qemu-img create -q -f qcow2 "$LOOP" 64M
serve_device "$LOOP" qcow2
if dd if=/dev/urandom of="$DEVICE" bs=64k count=512 oflag=direct 2>dd.err; then
    fail "32 MiB were written to 8 MiB"
fi
grep -qi 'no space left' dd.err || fail "dd was not told that there is no space: $(cat dd.err)"
dd if="$DEVICE" of=/dev/null bs=1M count=4 iflag=direct status=none
dd if=/dev/urandom of="$DEVICE" bs=64k count=4 oflag=direct conv=fsync status=none
must_fail 'device files|grow|resize' qmp d block_resize node-name="$(qmp d query-named-block-nodes | tr -d ' \n' | grep -o '"node-name":"#block[0-9]*"' | head -n 1 | cut -d'"' -f4)" size=$((64 << 20))
stop_daemon d
must qemu-img check -q -f qcow2 "$LOOP"

step "a raw device cannot grow"
serve_device "$LOOP" raw
# Where the kernel cannot resize a ublk device, nobody may resize its node.
reason='Cannot grow device files'
kernel_at_least 6.16 || reason="permissions 'resize' are both required"
must_fail "$reason" qmp d block_resize node-name=q size=$((64 << 20))
stop_daemon d

step "in use by another opener"
serve_device "$SMALL" qcow2
must_fail 'lock' timeout 60 "$LIVEBLKD" --blockdev "$(device "$SMALL" q qcow2)" \
    --export "type=ublk,id=e0,node-name=q,writable=on,device-id=$((DEVICE_ID + 1))"
must_fail 'lock' qemu-io -f qcow2 -c 'write 0 64k' "$SMALL"
stop_daemon d
qemu-storage-daemon --blockdev "$(device "$SMALL" q qcow2)" --nbd-server addr.type=unix,addr.path=q.sock \
    --export type=nbd,id=e0,node-name=q,writable=on --pidfile q.pid &
for _ in $(seq 100); do [ ! -s q.pid ] || break; sleep 0.1; done
must_fail 'lock' timeout 60 "$LIVEBLKD" --blockdev "$(device "$SMALL" q qcow2)" \
    --export "type=ublk,id=e0,node-name=q,writable=on,device-id=$DEVICE_ID"
kill $!
wait_for_exit $!

step "not a device, and not a file"
new_image a.qcow2 8M
must_fail 'block device' timeout 60 "$LIVEBLKD" --blockdev "$(device "$PWD/a.qcow2" q qcow2)"
must_fail 'regular file' timeout 60 "$LIVEBLKD" --blockdev "$(node "$SMALL" q)"
