#!/usr/bin/env bash
# The daemon is killed while the device is written, again and again: the persistent bitmap is there, valid, and has every block that has changed.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

# dirty_extents FILE BITMAP: what QEMU reads of a bitmap in an image, as the JSON of qemu-img map; what is dirty has no data.
dirty_extents() {
    local server
    qemu-nbd -r -f qcow2 -B "$2" -k "$PWD/nbd.sock" -x '' "$1" >nbd.log 2>&1 &
    server=$!
    for _ in $(seq 100); do
        [ ! -S nbd.sock ] || break
        sleep 0.1
    done
    qemu-img map --output=json --image-opts \
        "driver=nbd,server.type=unix,server.path=$PWD/nbd.sock,x-dirty-bitmap=qemu:dirty-bitmap:$2"
    wait_for_exit "$server"
}

# all_marked BEFORE AFTER EXTENTS: every block of 64 KiB that differs is dirty; prints how many differ and are dirty.
all_marked() {
    python3 - "$@" <<'EOF'
import json, sys
BLOCK = 65536
before, after = (open(name, "rb").read() for name in sys.argv[1:3])
dirty = set()
for extent in json.load(open(sys.argv[3])):
    if not extent["data"]:
        first, last = extent["start"] // BLOCK, (extent["start"] + extent["length"] - 1) // BLOCK
        dirty.update(range(first, last + 1))
changed = {n for n in range(len(after) // BLOCK) if before[n * BLOCK:][:BLOCK] != after[n * BLOCK:][:BLOCK]}
if changed - dirty:
    sys.exit(f"changed, but not marked: {sorted(changed - dirty)}")
print(f"{len(changed)} blocks changed, {len(dirty)} are marked of {len(after) // BLOCK}")
EOF
}

new_image a.qcow2 32M
serve d a.qcow2
must fio --name=fill --filename="$DEVICE" --rw=write --bs=1M --size=32M --direct=1 --minimal
must qmp d block-dirty-bitmap-add node=q name=b persistent=on
stop_daemon d

# Three in the usual run, so that it stays short.
for round in $(seq $((SCALE == 1 ? 3 : 6 * SCALE))); do
    serve d a.qcow2
    if [ $((round % 5)) = 1 ]; then
        step "round $round: begins with an empty bitmap"
        copy_device before.raw
        must qmp d block-dirty-bitmap-clear node=q name=b
    fi
    fio --name=load --filename="$DEVICE" --offset=$((RANDOM % 28))M --size=3M --rw=randwrite --bsrange=4k-64k \
        --ioengine=libaio --iodepth=8 --direct=1 --time_based --runtime=600 --minimal \
        --allow_file_create=0 >fio.out 2>&1 &
    fio=$!
    # Not before it has begun: it would make a file in the device's place where that is gone.
    sleep "$((1 + RANDOM % 2)).$((RANDOM % 10))"
    pid=$(cat d.pid)
    kill -9 "$pid"
    wait_for_exit "$pid"
    kill $fio 2>/dev/null || true
    wait_for_exit $fio

    serve d a.qcow2
    copy_device after.raw
    stop_daemon d
    wait_for_no_device "$DEVICE"
    dirty_extents a.qcow2 b >extents.json || fail "the bitmap cannot be read: $(cat nbd.log)"
    told=$(all_marked before.raw after.raw extents.json 2>&1) || fail "round $round: $told"
    step "round $round: $told"
    check_leaks_only a.qcow2
done
