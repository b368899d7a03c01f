#!/usr/bin/env bash
# The eight cases of stream and commit on a mounted file system that fio writes and verifies, round after round, with pauses, speed limits and cancels thrown in.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

# One in the usual run, twenty in the long one.
ROUNDS=$((SCALE == 1 ? 1 : 2 * SCALE < 20 ? 2 * SCALE : 20))
SEED=${LIVEBLK_SEED:-$((SRANDOM % 32768))}
RANDOM=$SEED
step "$ROUNDS rounds of eight cases; seed $SEED"

new_image 0.qcow2 160M
serve d 0.qcow2
must mkfs.ext4 -q "$DEVICE"
mkdir mnt
must mount "$DEVICE" mnt
dd if=/dev/urandom of=mnt/kept bs=1M count=12 status=none
KEPT=$(sha256sum <mnt/kept)

# The chain from the base to the active layer: numbers; layer N is node nN in N.qcow2.
CHAIN=(0)
LAST=0
name_of() { [ "$1" = 0 ] && echo q || echo "n$1"; }
active() { name_of "${CHAIN[-1]}"; }

grow_chain() {
    while [ ${#CHAIN[@]} -lt 4 ]; do
        dd if=/dev/urandom of=mnt/changing bs=256k count=$((1 + RANDOM % 8)) conv=fsync status=none
        LAST=$((LAST + 1))
        must qmp d blockdev-snapshot-sync node-name="$(active)" snapshot-file="$PWD/$LAST.qcow2" \
            snapshot-node-name="n$LAST" format=qcow2
        CHAIN+=("$LAST")
    done
}

# drop INDEX…: these layers are not in the chain any more.
drop() {
    local index
    for index; do
        rm -f "${CHAIN[$index]}.qcow2"
        unset "CHAIN[$index]"
    done
    CHAIN=("${CHAIN[@]}")
}

status() { qmp d query-jobs | tr -d ' \n' | sed -nE 's/.*"status":"([a-z]+)".*/\1/p'; }

# Waits until the job is ready or has ended, disturbing it now and then; sets STATUS.
wait_for_job() {
    local turn
    for turn in $(seq 600); do
        STATUS=$(status)
        case $STATUS in ready | concluded) return 0 ;; esac
        case $((RANDOM % 12)) in
            0) qmp d block-job-set-speed device=j speed=$((RANDOM % 2 * 33554432)) >/dev/null 2>&1 || true ;;
            1) if qmp d job-pause id=j >/dev/null 2>&1; then qmp d job-resume id=j >/dev/null 2>&1 || true; fi ;;
        esac
    done
    fail "the job does not end: $(qmp d query-block-jobs)"
}

# job COMMAND ARGUMENT…: once in four times it is cancelled first, then it runs to its end.
job() {
    local ended
    if [ $((RANDOM % 4)) = 0 ]; then
        must qmp d "$@" job-id=j auto-dismiss=false speed=4194304
        qmp d block-job-cancel device=j force=true >/dev/null 2>&1 || true
        for _ in $(seq 600); do [ "$(status)" != concluded ] || break; done
        ended=$(qmp d query-jobs)
        must qmp d job-dismiss id=j
        # It may have been quicker than its cancel.
        grep -q '"error"' <<<"$ended" || return 0
    fi
    must qmp d "$@" job-id=j auto-dismiss=false
    wait_for_job
    if [ "$STATUS" = ready ]; then
        must qmp d job-complete id=j
        for _ in $(seq 600); do [ "$(status)" != concluded ] || break; done
    fi
    ! qmp d query-jobs | grep -q '"error"' || fail "$*: $(qmp d query-jobs)"
    equal "the job's state" concluded "$(status)"
    must qmp d job-dismiss id=j
}

layer() { name_of "${CHAIN[$1]}"; }

round() {
    local case=$1
    grow_chain
    case $case in
        stream-all) job block-stream device="$(layer 3)" && drop 0 1 2 ;;
        stream-to-base) job block-stream device="$(layer 3)" base-node="$(layer 0)" && drop 1 2 ;;
        stream-between) job block-stream device="$(layer 2)" base-node="$(layer 0)" && drop 1 ;;
        commit-b-a) job block-commit device="$(active)" top-node="$(layer 1)" base-node="$(layer 0)" && drop 1 ;;
        commit-bc-a) job block-commit device="$(active)" top-node="$(layer 2)" base-node="$(layer 0)" && drop 1 2 ;;
        commit-all) job block-commit device="$(active)" base-node="$(layer 0)" && drop 1 2 3 ;;
        commit-c-b) job block-commit device="$(active)" top-node="$(layer 2)" base-node="$(layer 1)" && drop 2 ;;
        commit-cd-b) job block-commit device="$(active)" base-node="$(layer 1)" && drop 2 3 ;;
    esac
    kill -0 "$LOAD" 2>/dev/null || fail "the load ended in a round of $case"
    equal "$case: the file that nobody changes" "$KEPT" "$(dd if=mnt/kept bs=1M iflag=direct status=none | sha256sum)"
}

verify_until_stopped mnt/load &
LOAD=$!
for case in stream-all stream-to-base stream-between commit-b-a commit-bc-a commit-all commit-c-b commit-cd-b; do
    step "$case, $ROUNDS rounds"
    for _ in $(seq "$ROUNDS"); do round $case; done
done
touch stop
wait "$LOAD" || fail "verification failed under jobs"
step "the load made $(cat passes) passes; $LAST snapshots"

must umount mnt
must fsck.ext4 -fn "$DEVICE"
copy_device after.raw
stop_daemon d
for index in "${!CHAIN[@]}"; do check_images "${CHAIN[$index]}.qcow2"; done
same_content after.raw "${CHAIN[-1]}.qcow2"
