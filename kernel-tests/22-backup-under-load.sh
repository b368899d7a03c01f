#!/usr/bin/env bash
# Backups of a mounted file system that fio writes and verifies: each is one moment of it, whole after the journal was replayed; a slow target and a reader of a kept moment do not disturb the guest.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

ROUNDS=$((SCALE < 10 ? SCALE : 10))
RANDOM=${LIVEBLK_SEED:-$$}
step "$ROUNDS rounds; seed $RANDOM"

# A raw node above the image, so that a filter can be put between.
new_image q.qcow2 128M
start_daemon d --blockdev "$(node q.qcow2 q)" --blockdev driver=raw,node-name=top,discard=unmap,file=q \
    --export "type=ublk,id=e0,node-name=top,writable=on,device-id=$DEVICE_ID"
DEVICE=/dev/ublkb$DEVICE_ID
wait_for_device "$DEVICE"
must mkfs.ext4 -q "$DEVICE"
mkdir mnt backup
must mount "$DEVICE" mnt
dd if=/dev/urandom of=mnt/kept bs=1M count=12 conv=fsync status=none
KEPT=$(sha256sum <mnt/kept)

load() {
    local passes=0
    while [ ! -e stop ]; do
        must fio --name=verify --filename=mnt/load --rw=randrw --rwmixread=30 --size=16m --bsrange=4k-64k \
            --ioengine=libaio --iodepth=8 --direct=1 --verify=crc32c --verify_fatal=1 --do_verify=1 \
            --verify_backlog=64 --randrepeat=0 --minimal
        passes=$((passes + 1))
    done
    echo "$passes" >passes
}

# Waits until the job has ended; it has no error.
end_of_job() {
    for _ in $(seq 1200); do
        ! qmp d query-jobs | grep -q '"concluded"' || break
        sleep 0.1
    done
    ! qmp d query-jobs | grep -q '"error"' || fail "$1: $(qmp d query-jobs)"
    must qmp d job-dismiss id=j
}

# add_target FILE FORMAT NAME
add_target() {
    must qmp d blockdev-add driver="$2" node-name="$3" discard=unmap file.driver=file file.filename="$PWD/$1"
}

# A moment of the file system: clean once its journal was replayed, with the file that nobody changes.
check_moment() {
    local file=$1 format=$2 status=0 device=/dev/ublkb$((DEVICE_ID + 1))
    start_daemon b --blockdev "driver=$format,node-name=b,file.driver=file,file.filename=$file" \
        --export "type=ublk,id=eb,node-name=b,writable=on,device-id=$((DEVICE_ID + 1))"
    wait_for_device "$device"
    fsck.ext4 -fp "$device" >fsck.log 2>&1 || status=$?
    [ "$status" -le 1 ] || fail "$file after the journal (exit code $status):
$(cat fsck.log)"
    must fsck.ext4 -fn "$device"
    must mount -o ro "$device" backup
    equal "$file: the file that nobody changes" "$KEPT" "$(sha256sum <backup/kept)"
    must umount backup
    stop_daemon b
}

# backup FILE FORMAT ARGUMENT…
backup() {
    local file=$1 format=$2
    shift 2
    if [ "$format" = raw ]; then truncate -s 128M "$file"; else new_image "$file" 128M; fi
    add_target "$file" "$format" t
    must qmp d blockdev-backup device=q target=t job-id=j sync=full auto-dismiss=false "$@"
    end_of_job "$*"
    must qmp d blockdev-del node-name=t
    [ "$format" = raw ] || check_images "$file"
    check_moment "$file" "$format"
    rm -f "$file"
}

load &
LOAD=$!
sleep 2

for _ in $(seq "$ROUNDS"); do
    step "to qcow2, to raw, compressed"
    backup t.qcow2 qcow2
    backup t.raw raw
    backup c.qcow2 qcow2 compress=true
done

step "a full backup, and increments on top of it"
must qmp d block-dirty-bitmap-add node=q name=changes persistent=true
must qmp d drive-backup device=q target="$PWD/i0.qcow2" format=qcow2 job-id=j sync=full bitmap=changes \
    bitmap-mode=on-success auto-dismiss=false
end_of_job "full backup with a bitmap"
for number in $(seq $((ROUNDS * 3))); do
    must qmp d drive-backup device=q target="$PWD/i$number.qcow2" format=qcow2 job-id=j sync=incremental bitmap=changes \
        auto-dismiss=false
    end_of_job "increment $number"
    must qemu-img rebase -u -f qcow2 -b "i$((number - 1)).qcow2" -F qcow2 "i$number.qcow2"
    # What replays the journal writes to an overlay.
    must qemu-img create -q -f qcow2 -b "i$number.qcow2" -F qcow2 o.qcow2
    check_moment o.qcow2 qcow2
    rm o.qcow2
done
rm i*.qcow2

step "a target that is slow, and a guest that comes first"
must qmp d object-add qom-type=throttle-group id=slow limits.bps-write=65536
new_image s.qcow2 128M
add_target s.qcow2 qcow2 s
must qmp d blockdev-add driver=throttle node-name=t throttle-group=slow file=s
must qmp d blockdev-backup device=q target=t job-id=j sync=full auto-dismiss=false \
    on-cbw-error=break-snapshot cbw-timeout=1
BEGAN=$SECONDS
dd if=/dev/urandom of=mnt/fast bs=1M count=8 oflag=direct conv=fsync status=none
[ $((SECONDS - BEGAN)) -lt 60 ] || fail "a slow target has held the guest up for $((SECONDS - BEGAN)) s"
for _ in $(seq 600); do
    ! qmp d query-jobs | grep -q '"concluded"' || break
    sleep 0.1
done
qmp d query-jobs | grep -q '"error"' || fail "the snapshot should have come to an end: $(qmp d query-jobs)"
must qmp d job-dismiss id=j
must qmp d blockdev-del node-name=t
must qmp d blockdev-del node-name=s

step "a moment kept for a reader over NBD"
new_image f.qcow2 128M
add_target f.qcow2 qcow2 f
must qmp d blockdev-add driver=copy-before-write node-name=cbw file=q target=f
must qmp d blockdev-reopen options.0.driver=raw options.0.node-name=top options.0.discard=unmap options.0.file=cbw
must qmp d blockdev-add driver=snapshot-access node-name=then file=cbw
must qmp d nbd-server-start addr.type=unix addr.data.path="$PWD/nbd.sock"
must qmp d block-export-add type=nbd id=e1 node-name=then
must qemu-img convert -f raw -O raw "nbd+unix:///then?socket=$PWD/nbd.sock" one.raw
sleep 2
must qemu-img compare -f raw -F raw one.raw "nbd+unix:///then?socket=$PWD/nbd.sock"
must qmp d block-export-del id=e1
must qmp d nbd-server-stop
must qmp d blockdev-del node-name=then
must qmp d blockdev-reopen options.0.driver=raw options.0.node-name=top options.0.discard=unmap options.0.file=q
must qmp d blockdev-del node-name=cbw
must qmp d blockdev-del node-name=f
check_moment one.raw raw

kill -0 "$LOAD" 2>/dev/null || fail "the load ended early"
touch stop
wait "$LOAD" || fail "verification failed under backups"
step "the load made $(cat passes) passes"
must umount mnt
must fsck.ext4 -fn "$DEVICE"
copy_device after.raw
stop_daemon d
check_images q.qcow2
same_content after.raw q.qcow2
