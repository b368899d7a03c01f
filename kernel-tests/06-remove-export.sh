#!/usr/bin/env bash
# An export is removed: idle at once, busy only when told to be hard on its users; the node stays, and can be exported again.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

new_image a.qcow2 128M
serve d a.qcow2

again() {
    qmp d block-export-add type=ublk id=e0 node-name=q writable=true device-id="$DEVICE_ID" >/dev/null
    wait_for_device "$DEVICE"
}

for _ in $(seq $((5 * SCALE))); do
    step "idle"
    dd if=/dev/urandom of="$DEVICE" bs=64k count=16 oflag=direct status=none
    must qmp d block-export-del id=e0
    wait_for_no_device "$DEVICE"
    [ "$(qmp d query-block-exports | tr -d ' \n' | grep -c '"e0"')" = 0 ] || fail "query-block-exports still lists the export"
    again
done

step "mounted: refused in safe mode, and nothing happens to the user"
must mkfs.ext4 -q "$DEVICE"
mkdir -p mnt
mount "$DEVICE" mnt
echo before >mnt/file
must_fail 'in use|busy' qmp d block-export-del id=e0 mode=safe
echo after >mnt/file
sync
equal "file" after "$(cat mnt/file)"
umount mnt

step "open: refused in safe mode while a process has the disk open, and done when it has closed it"
exec 5<"$DEVICE"
must_fail 'in use|busy' qmp d block-export-del id=e0
exec 5<&-
must qmp d block-export-del id=e0
wait_for_no_device "$DEVICE"
again

step "busy: removed in the middle of I/O, which ends with errors and not with a hang"
fio --name=busy --filename="$DEVICE" --rw=randrw --bs=16k --size=64m --ioengine=libaio --iodepth=32 --direct=1 \
    --time_based --runtime=60 --allow_file_create=0 --minimal >fio.out 2>&1 &
fio=$!
for _ in $(seq 300); do
    ! ls -l /proc/[0-9]*/fd 2>/dev/null | grep -qF -- "-> $DEVICE" || break
    sleep 0.1
done
sleep 2
must timeout 30 "$LIVEBLK" qmp --socket d.qmp block-export-del id=e0 mode=hard
wait_for_no_device "$DEVICE"
for _ in $(seq 150); do
    kill -0 $fio 2>/dev/null || break
    sleep 0.1
done
! kill -0 $fio 2>/dev/null || fail "the user of the removed device hangs"
! wait $fio || fail "the user of the removed device saw no error"

step "the daemon lives on"
again
verify randwrite 16m
stop_daemon d
check_images a.qcow2
