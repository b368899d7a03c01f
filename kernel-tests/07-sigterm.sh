#!/usr/bin/env bash
# SIGTERM, SIGINT, SIGHUP and quit end the daemon in good order: the device goes, the image is clean and has everything.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

new_image a.qcow2 128M
for signal in TERM INT HUP; do
    step "SIG$signal after writes that nobody flushed"
    serve d a.qcow2
    random_file content 20
    dd if=content of="$DEVICE" bs=100k oflag=direct status=none
    stop_daemon d $signal
    wait_for_no_device "$DEVICE"
    check_images a.qcow2
    must qemu-img convert -f qcow2 -O raw a.qcow2 a.raw
    cmp -n $((20 << 20)) content a.raw || fail "writes are missing after SIG$signal"
done

step "quit"
serve d a.qcow2
must qmp d quit
wait_for_exit "$(cat d.pid 2>/dev/null || jobs -p | tail -n 1)"
wait_for_no_device "$DEVICE"
check_images a.qcow2

step "SIGTERM in the middle of I/O"
serve d a.qcow2
fio --name=busy --filename="$DEVICE" --rw=randwrite --bs=16k --size=64m --ioengine=libaio --iodepth=32 --direct=1 \
    --time_based --runtime=60 --minimal >fio.out 2>&1 &
fio=$!
sleep 3
stop_daemon d
wait_for_no_device "$DEVICE"
wait_for_exit $fio
check_images a.qcow2
