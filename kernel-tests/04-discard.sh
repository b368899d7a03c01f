#!/usr/bin/env bash
# Discarded and zeroed ranges read back as zeroes, also above a backing file with data there, and give space back to the host.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

# zeroed OFFSET LENGTH and kept OFFSET LENGTH, in MiB, of the device
zeroed() {
    cmp -s -n $(($2 << 20)) <(dd if="$DEVICE" bs=1M skip="$1" count="$2" iflag=direct status=none) /dev/zero ||
        fail "$2 MiB at $1 MiB are not zero"
}
kept() {
    cmp -s <(dd if="$DEVICE" bs=1M skip="$1" count="$2" iflag=direct status=none) \
        <(dd if=content bs=1M skip="$1" count="$2" status=none) || fail "$2 MiB at $1 MiB changed"
}
# Space that the image takes up, in sectors, once the device is flushed: clusters are given back only
# when the image on disk does not name them any more.
used() {
    dd if=/dev/null of="$DEVICE" conv=fsync,notrunc status=none
    stat -c %b top.qcow2
}

new_image base.qcow2 64M
must qemu-io -f qcow2 -c 'write -P 0x77 0 64M' base.qcow2
new_image top.qcow2 64M base.qcow2

for mode in off auto; do
    step "zero-copy=$mode"
    serve d top.qcow2 zero-copy=$mode
    random_file content 48
    dd if=content of="$DEVICE" bs=1M oflag=direct status=none
    kept 0 48
    full=$(used)

    must blkdiscard -o 4M -l 8M "$DEVICE"
    zeroed 4 8
    [ "$(used)" -le $((full - 8 * 2048 + 1024)) ] || fail "discarding 8 MiB released no space: $full before, $(used) after (in sectors)"

    must blkdiscard -z -o 16M -l 4M "$DEVICE"
    zeroed 16 4
    must fallocate --punch-hole -o 24M -l 4M "$DEVICE"
    zeroed 24 4
    must fallocate --zero-range -o 32M -l 4M "$DEVICE"
    zeroed 32 4
    for range in '0 4' '12 4' '20 4' '28 4' '36 12'; do kept $range; done

    step "ranges that are not whole clusters"
    must blkdiscard -z -o $((40 * 1048576 + 4096)) -l 12288 "$DEVICE"
    must blkdiscard -o $((41 * 1048576 + 512)) -l 131072 "$DEVICE"
    kept 37 3
    kept 42 6
    dd if="$DEVICE" of=piece bs=4k skip=$((40 * 256)) count=8 iflag=direct status=none
    cmp -s -n 12288 -i 4096:0 piece /dev/zero || fail "12 KiB in the middle of a cluster were not zeroed"
    cmp -s -n 4096 -i 0:$((40 << 20)) piece content || fail "zeroing touched the 4 KiB before"
    cmp -s -n 4096 -i 16384:$(((40 << 20) + 16384)) piece content || fail "zeroing touched the 4 KiB after"

    step "the whole device, then a file system that discards"
    must blkdiscard "$DEVICE"
    zeroed 0 64
    [ "$(used)" -le 4096 ] || fail "discarding everything left $(used) sectors in use"
    must mkfs.ext4 -q "$DEVICE"
    mkdir -p mnt
    mount -o discard "$DEVICE" mnt
    sync
    empty=$(used)
    random_file mnt/file 20
    sync
    full=$(used)
    [ "$full" -ge $((empty + 20 * 2048)) ] || fail "writing 20 MiB took no space: $empty before, $full after (in sectors)"
    rm mnt/file
    sync
    fstrim mnt
    umount mnt
    [ "$(used)" -le $((full - 16 * 2048)) ] || fail "fstrim released no space: $full before, $(used) after (in sectors)"
    must e2fsck -fn "$DEVICE"
    copy_device after.raw
    stop_daemon d
    check_images base.qcow2 top.qcow2
    same_content after.raw top.qcow2
done
