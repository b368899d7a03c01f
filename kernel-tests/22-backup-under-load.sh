#!/usr/bin/env bash
# Backups of a mounted file system that fio writes and verifies: each is one moment of it, whole after the journal was replayed; a slow target and a reader of a kept moment do not disturb the guest.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

ROUNDS=$((SCALE < 10 ? SCALE : 10))
RANDOM=${LIVEBLK_SEED:-$$}
step "$ROUNDS rounds on $FS; seed $RANDOM"

# A raw node above the image, so that a filter can be put between.
new_image q.qcow2 $FS_SIZE
start_daemon d --blockdev "$(node q.qcow2 q)" --blockdev driver=raw,node-name=top,discard=unmap,file=q \
    --export "type=ublk,id=e0,node-name=top,writable=on,device-id=$DEVICE_ID"
DEVICE=/dev/ublkb$DEVICE_ID
wait_for_device "$DEVICE"
make_file_system "$DEVICE"
mkdir mnt
must mount "$DEVICE" mnt
dd if=/dev/urandom of=mnt/kept bs=1M count=12 conv=fsync status=none
KEPT=$(sha256sum <mnt/kept)

# Waits two minutes at most for the job to end.
until_concluded() {
    for _ in $(seq 1200); do
        ! qmp d query-jobs | grep -q '"concluded"' || return 0
        sleep 0.1
    done
    fail "the job does not end: $(qmp d query-jobs)"
}

# Waits until the job has ended; it has no error.
end_of_job() {
    until_concluded
    ! qmp d query-jobs | grep -q '"error"' || fail "$1: $(qmp d query-jobs)"
    must qmp d job-dismiss id=j
}

# add_target FILE FORMAT NAME
add_target() {
    must qmp d blockdev-add driver="$2" node-name="$3" discard=unmap file.driver=file file.filename="$PWD/$1"
}

# A moment of the file system: clean once its journal was replayed, with the file that nobody changes.
check_moment() {
    local file=$1 format=$2 device=/dev/ublkb$((DEVICE_ID + 1))
    start_daemon b --blockdev "driver=$format,node-name=b,file.driver=file,file.filename=$file" \
        --export "type=ublk,id=eb,node-name=b,writable=on,device-id=$((DEVICE_ID + 1))"
    wait_for_device "$device"
    check_moment_of "$device" kept "$KEPT"
    stop_daemon b
}

# The same of an image with layers below it, which stays as it is: the journal goes to an overlay.
check_moment_above() {
    must qemu-img create -q -f qcow2 -b "$1" -F qcow2 o.qcow2
    check_moment o.qcow2 qcow2
    rm o.qcow2
}

# increment NUMBER ARGUMENT…: one more layer on top of the last.
increment() {
    local number=$1
    shift
    must qmp d drive-backup device=q target="$PWD/i$number.qcow2" format=qcow2 job-id=j bitmap=changes auto-dismiss=false "$@"
    end_of_job "increment $number"
    must qemu-img rebase -u -f qcow2 -b "i$((number - 1)).qcow2" -F qcow2 "i$number.qcow2"
    check_moment_above "i$number.qcow2"
}

# backup FILE FORMAT ARGUMENT…
backup() {
    local file=$1 format=$2
    shift 2
    if [ "$format" = raw ]; then truncate -s $FS_SIZE "$file"; else new_image "$file" $FS_SIZE; fi
    add_target "$file" "$format" t
    must qmp d blockdev-backup device=q target=t job-id=j sync=full auto-dismiss=false "$@"
    end_of_job "$*"
    must qmp d blockdev-del node-name=t
    [ "$format" = raw ] || check_images "$file"
    check_moment "$file" "$format"
    rm -f "$file"
}

verify_until_stopped mnt/load &
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
LAST=$((ROUNDS * 3))
for number in $(seq $LAST); do increment "$number" sync=incremental; done
step "increments that keep the bits, and that take them"
increment $((LAST + 1)) sync=bitmap bitmap-mode=never
increment $((LAST + 1)) sync=bitmap bitmap-mode=always
increment $((LAST + 2)) sync=bitmap bitmap-mode=on-success
rm i*.qcow2
must qmp d block-dirty-bitmap-remove node=q name=changes

step "what the newest layer has"
must qmp d blockdev-snapshot-sync node-name=q snapshot-file="$PWD/l1.qcow2" snapshot-node-name=l1 format=qcow2
sleep 2
must qmp d drive-backup device=l1 target="$PWD/t1.qcow2" format=qcow2 job-id=j sync=top auto-dismiss=false
end_of_job "sync=top"
check_moment_above t1.qcow2

step "a target that is slow, and a guest that comes first"
must qmp d object-add qom-type=throttle-group id=slow limits.bps-write=524288
new_image s.qcow2 $FS_SIZE
add_target s.qcow2 qcow2 s
must qmp d blockdev-add driver=throttle node-name=t throttle-group=slow file=s
must qmp d blockdev-backup device=l1 target=t job-id=j sync=full auto-dismiss=false \
    on-cbw-error=break-snapshot cbw-timeout=1
BEGAN=$SECONDS
dd if=/dev/urandom of=mnt/fast bs=1M count=8 oflag=direct conv=fsync status=none
[ $((SECONDS - BEGAN)) -lt 60 ] || fail "a slow target has held the guest up for $((SECONDS - BEGAN)) s"
until_concluded
qmp d query-jobs | grep -q '"error"' || fail "the snapshot should have come to an end: $(qmp d query-jobs)"
must qmp d job-dismiss id=j
must qmp d blockdev-del node-name=t
must qmp d blockdev-del node-name=s

# read_moment NODE: over NBD the moment that the node keeps stays as it is.
read_moment() {
    must qmp d nbd-server-start addr.type=unix addr.data.path="$PWD/nbd.sock"
    must qmp d block-export-add type=nbd id=e1 node-name="$1"
    must qemu-img convert -f raw -O raw "nbd+unix:///$1?socket=$PWD/nbd.sock" one.raw
    sleep 2
    must qemu-img compare -f raw -F raw one.raw "nbd+unix:///$1?socket=$PWD/nbd.sock"
    must qmp d block-export-del id=e1
    must qmp d nbd-server-stop
    check_moment one.raw raw
    rm one.raw
}

# put_under_top NODE: what the device's raw node reads from.
put_under_top() {
    must qmp d blockdev-reopen options.0.driver=raw options.0.node-name=top options.0.discard=unmap options.0.file="$1"
}

step "a moment kept for a reader by a job without a copy"
new_image n.qcow2 $FS_SIZE
must qmp d blockdev-add driver=qcow2 node-name=n discard=unmap backing=l1 file.driver=file file.filename="$PWD/n.qcow2"
must qmp d blockdev-backup device=l1 target=n job-id=j sync=none auto-dismiss=false
read_moment n
must qmp d job-cancel id=j
until_concluded
must qmp d job-dismiss id=j
must qmp d blockdev-del node-name=n

step "a moment kept for a reader by a filter"
new_image f.qcow2 $FS_SIZE
add_target f.qcow2 qcow2 f
must qmp d blockdev-add driver=copy-before-write node-name=cbw file=l1 target=f
put_under_top cbw
must qmp d blockdev-add driver=snapshot-access node-name=then file=cbw
read_moment then
must qmp d blockdev-del node-name=then
put_under_top l1
must qmp d blockdev-del node-name=cbw
must qmp d blockdev-del node-name=f

kill -0 "$LOAD" 2>/dev/null || fail "the load ended early"
touch stop
wait "$LOAD" || fail "verification failed under backups"
step "the load made $(cat passes) passes"
must umount mnt
check_file_system "$DEVICE"
copy_device after.raw
stop_daemon d
check_images q.qcow2 l1.qcow2
same_content after.raw l1.qcow2
