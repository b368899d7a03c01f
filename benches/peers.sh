#!/usr/bin/env bash
# Measures the contestants in turn, round by round; started by benches/peers through kernel-tests/vm.
set -euo pipefail
. "$(dirname "$0")/../kernel-tests/harness.sh"

ALL="rublk-null rublk-loop rublk-loop-zc rublk-qcow2 liveblk-zc liveblk-poll liveblk-copy qsd-nbd"
SIZE=256
RUBLK=$LIVEBLK_CACHE/peers/bin/rublk
read -r ROUNDS SECONDS_EACH CONTESTANTS <<<"$LIVEBLK_BENCH"
CONTESTANTS=${CONTESTANTS:-$ALL}

start_rublk() { must "$RUBLK" add "$@" -n "$DEVICE_ID" --quiet; }
stop_rublk() { must "$RUBLK" del -n "$DEVICE_ID"; }

# start CONTESTANT: sets DEVICE, which then shows the image.
start() {
    DEVICE=/dev/ublkb$DEVICE_ID
    case $1 in
        rublk-null) start_rublk null ;;
        rublk-loop) start_rublk loop -f "$PWD/image.raw" ;;
        rublk-loop-zc) start_rublk loop -z -f "$PWD/image.raw" ;;
        rublk-qcow2) start_rublk qcow2 -f "$PWD/image.qcow2" ;;
        liveblk-zc) serve d image.qcow2 zero-copy=on queue-depth=128 ;;
        liveblk-poll)
            serve d image.qcow2 zero-copy=on queue-depth=128
            must qmp d object-add qom-type=iothread id=t poll-max-ns=1000000
            ;;
        liveblk-copy) serve d image.qcow2 zero-copy=off queue-depth=128 ;;
        liveblk-null) serve_node driver=null-co,node-name=q,size=$((SIZE << 20)) ;;
        liveblk-raw) serve_node driver=raw,node-name=q,cache.direct=on,file.driver=file,file.filename=image.raw,file.cache.direct=on ;;
        qsd-nbd) start_qsd ;;
        *) fail "no contestant '$1'" ;;
    esac
    wait_for_device "$DEVICE"
}

serve_node() {
    start_daemon d --blockdev "$1" --export "type=ublk,id=e0,node-name=q,writable=on,device-id=$DEVICE_ID,queue-depth=128"
}

start_qsd() {
    DEVICE=/dev/nbd0
    rm -f qsd.pid
    qemu-storage-daemon --blockdev "driver=qcow2,node-name=q,cache.direct=on,file.driver=file,file.filename=image.qcow2,file.cache.direct=on,file.aio=io_uring" \
        --nbd-server addr.type=unix,addr.path=qsd.sock --export type=nbd,id=e0,node-name=q,name=q,writable=on \
        --pidfile qsd.pid >qsd.log 2>&1 &
    for _ in $(seq 100); do
        [ ! -s qsd.pid ] || break
        sleep 0.1
    done
    must nbd-client -unix "$PWD/qsd.sock" -N q -b 512 /dev/nbd0
}

stop() {
    case $1 in
        rublk-*) stop_rublk ;;
        liveblk-*) stop_daemon d ;;
        qsd-nbd)
            must nbd-client -d /dev/nbd0
            local pid
            pid=$(cat qsd.pid)
            kill "$pid"
            wait_for_exit "$pid"
            ;;
    esac
    [ "$1" = qsd-nbd ] || wait_for_no_device "$DEVICE"
}

# load PATTERN KIBIBYTES DEPTH: prints IOPS and requests. The generator is as cheap as fio can be (ring with
# registered file and buffers, requests in batches, few looks at the clock), so that it is not what is measured.
load() {
    local depth=$3
    fio --name=b --filename="$DEVICE" --rw="$1" --bs="$2k" --iodepth="$depth" --size=${SIZE}m --direct=1 \
        --ioengine=io_uring --registerfiles=1 --fixedbufs=1 --gtod_reduce=1 \
        --iodepth_batch=$(((depth + 1) / 2)) --iodepth_batch_complete_min=$(((depth + 3) / 4)) \
        --time_based --runtime="$SECONDS_EACH" --randrepeat=0 --norandommap --minimal |
        awk -F';' -v kibibytes="$2" '{ printf "%d %d\n", $8 + $49, ($6 + $47) / kibibytes }'
}

# daemons CONTESTANT: the processes that serve the device.
daemons() {
    case $1 in
        rublk-*) pgrep -x rublk ;;
        liveblk-*) cat d.pid ;;
        qsd-nbd) cat qsd.pid ;;
    esac
}

# ticks CONTESTANT: CPU time that its processes have used in user and in kernel mode.
ticks() {
    local pid
    for pid in $(daemons "$1"); do
        sed 's/.*) //' "/proc/$pid/stat"
    done | awk '{ user += $12; kernel += $13 } END { print user + 0, kernel + 0 }'
}

measure() {
    local name=$1 label pattern size depth iops requests before after per_second
    per_second=$(getconf CLK_TCK)
    # The first pattern after the device has come up is several times slower than it is later.
    load randread 4 16 >/dev/null
    while read -r label pattern size depth; do
        before=$(ticks "$name")
        read -r iops requests < <(load "$pattern" "$size" "$depth")
        after=$(ticks "$name")
        printf 'RESULT %s %s %s ' "$name" "$label" "$iops"
        awk -v n="$requests" -v hz="$per_second" \
            '{ us = n ? 1000000 / hz / n : 0; printf "%.1f %.1f\n", ($3 - $1) * us, ($4 - $2) * us }' <<<"$before $after"
    done <<'PATTERNS'
4k-read-qd1 randread 4 1
4k-write-qd1 randwrite 4 1
4k-read-qd16 randread 4 16
4k-write-qd16 randwrite 4 16
128k-read-qd4 read 128 4
128k-write-qd4 write 128 4
PATTERNS
}

random_file image.raw $SIZE
must qemu-img convert -f raw -O qcow2 image.raw image.qcow2
# Whoever comes first after the machine has started is slower than in any later round.
start liveblk-copy
load randread 4 16 >/dev/null
stop liveblk-copy
for round in $(seq "$ROUNDS"); do
    step "round $round of $ROUNDS"
    for contestant in $CONTESTANTS; do
        start "$contestant"
        measure "$contestant"
        stop "$contestant"
    done
done
must qemu-img check -q -f qcow2 image.qcow2
