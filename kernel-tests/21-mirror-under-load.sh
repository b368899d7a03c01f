#!/usr/bin/env bash
# Mirrors of a mounted file system that fio writes and verifies: the device moves from copy to copy in a loop, by every mode, with cancels between, whose copies are whole file systems of one instant.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

# Ten rounds of five pivots in the long run.
ROUNDS=$((SCALE < 10 ? SCALE : 10))
RANDOM=${LIVEBLK_SEED:-$$}
step "$ROUNDS rounds of five pivots and two cancels, $FS; seed $RANDOM"

new_image 0.qcow2 $FS_SIZE
serve d 0.qcow2
make_file_system "$DEVICE"
mkdir mnt
must mount "$DEVICE" mnt
dd if=/dev/urandom of=mnt/kept bs=1M count=12 conv=fsync status=none
KEPT=$(sha256sum <mnt/kept)

# The active layer is node $NODE in $FILE of $FORMAT.
NODE=q FILE=0.qcow2 FORMAT=qcow2 LAST=0 PIVOTS=0

status() { qmp d query-jobs | tr -d ' \n' | sed -nE 's/.*"status":"([a-z]+)".*/\1/p'; }

# until_status STATUS…: waits until the job is in one of these states.
until_status() {
    local turn status
    for turn in $(seq 600); do
        status=$(status)
        case " $* " in *" $status "*) return 0 ;; esac
        case $((RANDOM % 12)) in
            0) qmp d block-job-set-speed device=j speed=$((RANDOM % 2 * 67108864)) >/dev/null 2>&1 || true ;;
            1) qmp d block-job-change id=j type=mirror copy-mode=write-blocking >/dev/null 2>&1 || true ;;
        esac
    done
    fail "the job does not become $*: $(qmp d query-block-jobs)"
}

concluded() {
    until_status concluded
    ! qmp d query-jobs | grep -q '"error"' || fail "$1: $(qmp d query-jobs)"
    must qmp d job-dismiss id=j
}

# start FORMAT SYNC ARGUMENT…: mirrors to a new image until it is ready; once in four times it is cancelled and begun
# again first.
start() {
    local format=$1 sync=$2
    shift 2
    LAST=$((LAST + 1))
    NEW=$PWD/$LAST.$format
    local begin=(drive-mirror device="$NODE" target="$NEW" format="$format" sync="$sync" node-name="n$LAST" job-id=j
        auto-dismiss=false "$@")
    if [ $((RANDOM % 4)) = 0 ]; then
        must qmp d "${begin[@]}" speed=4194304
        must qmp d job-cancel id=j
        until_status concluded
        must qmp d job-dismiss id=j
    fi
    must qmp d "${begin[@]}"
    until_status ready
}

pivot() {
    start "$@"
    must qmp d job-complete id=j
    concluded "$*"
    qmp d query-block-exports | grep -q "\"n$LAST\"" || fail "$*: the device is not on n$LAST"
    FORMAT=$1 NODE=n$LAST FILE=$NEW PIVOTS=$((PIVOTS + 1))
    kill -0 "$LOAD" 2>/dev/null || fail "the load ended in a pivot of $*"
    equal "$*: the file that nobody changes" "$KEPT" "$(dd if=mnt/kept bs=1M iflag=direct status=none | sha256sum)"
}

# The copy of a device that goes on is a file system that the journal brings in order.
copy() {
    start "$@"
    must qmp d block-job-cancel device=j
    concluded "$*"
    check_images_of "$1"
    local loop
    must qemu-img convert -f "$1" -O raw "$NEW" copy.raw
    loop=$(losetup --find --show copy.raw)
    check_moment_of "$loop" kept "$KEPT"
    must losetup -d "$loop"
    rm -f "$NEW" copy.raw
}

check_images_of() { [ "$1" != qcow2 ] || check_images "$NEW"; }

# What the last pivot has left behind.
drop_others() {
    local file
    for file in *.qcow2 *.raw; do
        [ ! -e "$file" ] || [ "$PWD/$file" = "$FILE" ] || rm -f "$file"
    done
}

overlay() {
    LAST=$((LAST + 1))
    must qmp d blockdev-snapshot-sync node-name="$NODE" snapshot-file="$PWD/$LAST.qcow2" \
        snapshot-node-name="n$LAST" format=qcow2
    NODE=n$LAST
}

round() {
    pivot qcow2 full
    drop_others
    copy qcow2 full copy-mode=write-blocking
    pivot raw full copy-mode=write-blocking
    drop_others
    copy raw full unmap=false
    overlay
    pivot qcow2 top copy-mode=write-blocking
    pivot qcow2 none
    pivot qcow2 full granularity=4096 buf-size=1048576
    drop_others
}

verify_until_stopped mnt/load &
LOAD=$!
for number in $(seq "$ROUNDS"); do
    step "round $number"
    round
done
touch stop
wait "$LOAD" || fail "verification failed under mirrors"
step "the load made $(cat passes) passes; $PIVOTS pivots"

must umount mnt
check_file_system "$DEVICE"
copy_device after.raw
stop_daemon d
[ "$FORMAT" != qcow2 ] || check_images "$FILE"
same_content after.raw "$FILE"
