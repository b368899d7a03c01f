#!/usr/bin/env bash
# A new image is served; mkfs, mount, dd and fsck work on it, with ext4 and xfs, and the files are still there when it is served again.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

check_file_system() {
    case $1 in
        ext4) must e2fsck -fn "$DEVICE" ;;
        xfs) must xfs_repair -n "$DEVICE" ;;
    esac
}

for type in ext4 xfs; do
    step "$type on a 512 MiB image"
    new_image $type.qcow2 512M
    serve $type $type.qcow2
    must mkfs.$type -q "$DEVICE"
    mkdir -p mnt
    mount "$DEVICE" mnt
    random_file mnt/random $((24 * SCALE < 200 ? 24 * SCALE : 200))
    for i in $(seq 200); do echo "file $i" >"mnt/small$i"; done
    dd if=/dev/zero of=mnt/zeroes bs=64k count=100 oflag=direct status=none
    rm mnt/small?5
    (cd mnt && sha256sum ./* 2>/dev/null) >$type.sums || true
    umount mnt
    check_file_system $type
    stop_daemon $type
    wait_for_no_device "$DEVICE"
    check_images $type.qcow2

    step "$type served again, read-only"
    serve $type $type.qcow2
    mount -o ro "$DEVICE" mnt
    (cd mnt && sha256sum --quiet -c ../$type.sums) || fail "files changed"
    umount mnt
    stop_daemon $type
done
