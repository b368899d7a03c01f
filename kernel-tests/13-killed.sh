#!/usr/bin/env bash
# The daemon is killed while its device is mounted and written: nothing that was flushed is lost, the host goes on, the next daemon serves the image.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

new_image a.qcow2 128M
mkdir -p mnt

for round in $(seq $((2 * SCALE < 20 ? 2 * SCALE : 20))); do
    step "round $round: killed under load"
    serve d a.qcow2
    if [ "$round" = 1 ]; then must mkfs.ext4 -q "$DEVICE"; fi
    mount "$DEVICE" mnt
    random_file mnt/flushed$round 8
    sync -f mnt/flushed$round
    (cd mnt && sha256sum flushed*) >sums
    fio --name=load --directory="$PWD/mnt" --size=32m --rw=randwrite --bs=16k --ioengine=libaio --iodepth=16 --direct=1 \
        --time_based --runtime=600 --minimal >fio.out 2>&1 &
    fio=$!
    sleep 3
    pid=$(cat d.pid)
    kill -9 "$pid"
    wait_for_exit "$pid"

    step "users of the device see errors and can leave it"
    kill $fio 2>/dev/null || true
    wait_for_exit $fio
    timeout 60 umount mnt || fail "the file system of the killed device cannot be unmounted"

    step "the next daemon takes the id of the dead device over"
    serve d a.qcow2
    stop_daemon d
    wait_for_no_device "$DEVICE"
    step "at most leaks in the image, and what was flushed is there"
    check_leaks_only a.qcow2
    serve d a.qcow2
    # Exit code 1: replayed the journal and corrected counts, as after any power failure.
    e2fsck -fy "$DEVICE" >fsck.out 2>&1 || [ $? = 1 ] || fail "the file system is beyond its journal: $(cat fsck.out)"
    mount -o ro "$DEVICE" mnt
    (cd mnt && sha256sum --quiet -c ../sums) || fail "flushed data is lost"
    umount mnt
    stop_daemon d
done
