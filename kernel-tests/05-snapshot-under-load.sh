#!/usr/bin/env bash
# Fifty live snapshots while fio writes and verifies: each layer keeps what was written before its snapshot and nothing of what came after.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

SNAPSHOTS=$((50 * SCALE < 300 ? 50 * SCALE : 300))

new_image 0.qcow2 96M
serve d 0.qcow2

# Load without end; a pass is complete only when all that it wrote was read back.
load() {
    local passes=0
    while [ ! -e stop ]; do
        verify randrw 24m --rwmixread=30 --verify_backlog=256
        passes=$((passes + 1))
    done
    echo "$passes" >passes
}

# A block past the load's range that says how many snapshots there were: the number, repeated.
mark() {
    printf "%4096s" '' | tr ' ' "\\$(printf %o $(($1 % 255 + 1)))" |
        dd of="$DEVICE" bs=4k seek=$((80 << 8)) count=1 iflag=fullblock oflag=direct conv=notrunc status=none
}

step "$SNAPSHOTS snapshots under load"
load &
load=$!
for i in $(seq "$SNAPSHOTS"); do
    mark $((i - 1))
    qmp d blockdev-snapshot-sync node-name="$([ "$i" = 1 ] && echo q || echo "n$((i - 1))")" \
        snapshot-file="$PWD/$i.qcow2" snapshot-node-name="n$i" format=qcow2 >snapshot.out 2>&1 ||
        fail "snapshot $i: $(cat snapshot.out)"
    kill -0 "$load" 2>/dev/null || fail "the load ended before snapshot $i"
done
mark "$SNAPSHOTS"
touch stop
wait "$load" || fail "verification failed under snapshots"
step "the load made $(cat passes) passes"
copy_device after.raw
stop_daemon d

step "checking the $((SNAPSHOTS + 1)) layers"
for i in $(seq 0 "$SNAPSHOTS"); do
    must qemu-img check -q -U -f qcow2 "$i.qcow2"
done
for i in $(seq 0 7 "$SNAPSHOTS") "$SNAPSHOTS"; do
    must qemu-io -r -f qcow2 -c "read -P $((i % 255 + 1)) 80M 4k" "$i.qcow2"
done
must "$LIVEBLK" image check -f qcow2 "$SNAPSHOTS.qcow2"
same_content after.raw "$SNAPSHOTS.qcow2"
