#!/usr/bin/env bash
# A chain of four images becomes a block device; a file system on it is written while a live snapshot is taken; everything is checked at the end.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

told() { printf '\n%s\n' "$*"; }

# Shows a command as one would type it, and runs it.
run() {
    local word line='  $'
    for word; do
        word=${word/#$LIVEBLKD/liveblkd}
        word=${word/#$LIVEBLK/liveblk}
        case $word in *[\ \;\'\"\|\&\>]* | '') line+=" '$word'" ;; *) line+=" $word" ;; esac
    done
    printf '%s\n' "$line"
    local status=0
    "$@" >run.out 2>&1 || status=$?
    sed 's/^/    /' run.out
    [ $status = 0 ] || fail "that command failed (exit code $status)"
}

told "1. Four images of 1 GiB, each the overlay of the one before: base <- l1 <- l2 <- l3."
run "$LIVEBLK" image create -f qcow2 base.qcow2 1G
run "$LIVEBLK" image create -f qcow2 -b base.qcow2 -F qcow2 l1.qcow2
run "$LIVEBLK" image create -f qcow2 -b l1.qcow2 -F qcow2 l2.qcow2
run "$LIVEBLK" image create -f qcow2 -b l2.qcow2 -F qcow2 l3.qcow2

told "2. The daemon opens the chain and shows its active layer, l3, as a block device."
DEVICE=/dev/ublkb$DEVICE_ID
run start_daemon d --blockdev driver=qcow2,node-name=l3,discard=unmap,file.driver=file,file.filename=l3.qcow2,cache.direct=on,file.cache.direct=on \
    --export type=ublk,id=e0,node-name=l3,writable=on,device-id="$DEVICE_ID"
wait_for_device "$DEVICE"
run lsblk -o NAME,SIZE,RO,LOG-SEC,DISC-GRAN "$DEVICE"
run "$LIVEBLK" qmp --socket d.qmp query-block-exports
told "   Zero copy is $([ "$(zero_copy_of d)" = true ] && echo active || echo "not available on Linux $(uname -r)")."

told "3. A file system on it, and 64 MiB of random data."
run mkfs.ext4 -q "$DEVICE"
mkdir mnt
run mount "$DEVICE" mnt
run dd if=/dev/urandom of=mnt/before bs=1M count=64 conv=fsync status=none
before=$(sha256sum <mnt/before)

told "4. Load: fio writes and verifies a file on the mounted device, and goes on during what follows."
fio --name=load --directory="$PWD/mnt" --size=64m --rw=randwrite --bsrange=4k-64k --ioengine=libaio --iodepth=16 \
    --direct=1 --verify=crc32c --verify_fatal=1 --verify_backlog=128 --time_based --runtime=12 --minimal >fio.out 2>&1 &
load=$!
sleep 4

told "5. A live snapshot: a new overlay, l4, under the running load. From now on l3 does not change."
run "$LIVEBLK" qmp --socket d.qmp blockdev-snapshot-sync node-name=l3 snapshot-file="$PWD/l4.qcow2" snapshot-node-name=l4 format=qcow2
kill -0 $load || fail "the load had ended before the snapshot was there"
l3=$(sha256sum <l3.qcow2)
run "$LIVEBLK" chain --socket d.qmp
told "   dd writes another 64 MiB meanwhile."
run dd if=/dev/urandom of=mnt/after bs=1M count=64 conv=fsync status=none
after=$(sha256sum <mnt/after)
wait $load || fail "fio found a wrong checksum, or an error:
$(cat fio.out)"
told "   fio has ended: every block it wrote read back as written."

told "6. Everything to disk; the files are read again from the device."
run sync
echo 3 >/proc/sys/vm/drop_caches
equal "checksum of the file from before the snapshot" "$before" "$(sha256sum <mnt/before)"
equal "checksum of the file written under load" "$after" "$(sha256sum <mnt/after)"
told "   Both checksums are as they were."
run umount mnt
run e2fsck -fn "$DEVICE"
copy_device device.raw

told "7. The daemon stops; the device goes."
run stop_daemon d
wait_for_no_device "$DEVICE"

told "8. Our check and QEMU's, of all five images; l3 must not have changed since the snapshot."
equal "l3.qcow2" "$l3" "$(sha256sum <l3.qcow2)"
for image in base l1 l2 l3 l4; do
    run "$LIVEBLK" image check $image.qcow2
    run qemu-img check -q $image.qcow2
done
told "9. QEMU reads from the chain what the device showed last."
run qemu-img compare -f raw -F qcow2 device.raw l4.qcow2
told "Done: served, written, snapshotted, checked, compared."
