#!/usr/bin/env bash
# A new image is served; mkfs, mount, dd and fsck work on it, with ext4 and xfs, and the files are still there when it is served again.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

for FS in ext4 xfs; do
    step "$FS on a 512 MiB image"
    new_image $FS.qcow2 512M
    serve $FS $FS.qcow2
    make_file_system "$DEVICE"
    mkdir -p mnt
    mount "$DEVICE" mnt
    random_file mnt/random $((24 * SCALE < 200 ? 24 * SCALE : 200))
    for i in $(seq 200); do echo "file $i" >"mnt/small$i"; done
    dd if=/dev/zero of=mnt/zeroes bs=64k count=100 oflag=direct status=none
    rm mnt/small?5
    (cd mnt && sha256sum ./* 2>/dev/null) >$FS.sums || true
    umount mnt
    check_file_system "$DEVICE"
    stop_daemon $FS
    wait_for_no_device "$DEVICE"
    check_images $FS.qcow2

    step "$FS served again, read-only"
    serve $FS $FS.qcow2
    mount -o ro "$DEVICE" mnt
    (cd mnt && sha256sum --quiet -c ../$FS.sums) || fail "files changed"
    umount mnt
    stop_daemon $FS
done
