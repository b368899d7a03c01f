#!/usr/bin/env bash
# block_resize grows the image and, on a kernel that can, the device with it, while it is mounted.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

new_image a.qcow2 64M
serve d a.qcow2
equal "size" $((64 << 20)) "$(blockdev --getsize64 "$DEVICE")"
must mkfs.ext4 -q "$DEVICE"
mkdir -p mnt
mount "$DEVICE" mnt
random_file mnt/file 20
sum=$(sha256sum <mnt/file)

if ! kernel_at_least 6.16; then
    step "Linux $(uname -r) cannot resize a ublk device: refused, and nothing changes"
    must_fail '6\.16|resiz|size' qmp d block_resize node-name=q size=$((160 << 20))
    equal "size" $((64 << 20)) "$(blockdev --getsize64 "$DEVICE")"
    umount mnt
    stop_daemon d
    check_images a.qcow2
    exit
fi

step "grown to 160 MiB while mounted"
must qmp d block_resize node-name=q size=$((160 << 20))
for _ in $(seq 50); do
    [ "$(blockdev --getsize64 "$DEVICE")" = $((64 << 20)) ] || break
    sleep 0.1
done
equal "size" $((160 << 20)) "$(blockdev --getsize64 "$DEVICE")"
must resize2fs "$DEVICE"
random_file mnt/more 60
sync
equal "checksum" "$sum" "$(sha256sum <mnt/file)"
umount mnt
must e2fsck -fn "$DEVICE"

copy_device after.raw
stop_daemon d
check_images a.qcow2
same_content after.raw a.qcow2
equal "virtual size" $((160 << 20)) "$(stat -c %s after.raw)"
