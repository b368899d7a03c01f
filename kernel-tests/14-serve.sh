#!/usr/bin/env bash
# The short way: liveblk serve prints the device on stdout, snapshot adds an overlay, chain shows what is open, and stopping cleans up.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

new_image base.qcow2 64M
new_image top.qcow2 64M base.qcow2
"$LIVEBLK" serve top.qcow2 --socket s.qmp >device 2>serve.log &
served=$!
echo $served >serve.pid
for _ in $(seq 300); do
    [ ! -s device ] || break
    kill -0 $served 2>/dev/null || fail "serve ended:
$(cat serve.log)"
    sleep 0.1
done
DEVICE=$(cat device)
[ -b "$DEVICE" ] || fail "what serve printed is no block device: '$DEVICE'"
equal "size" $((64 << 20)) "$(blockdev --getsize64 "$DEVICE")"
verify randwrite 16m

must "$LIVEBLK" snapshot --socket s.qmp "$DEVICE" new.qcow2
verify randwrite 16m
"$LIVEBLK" chain --socket s.qmp >chain.out
for image in base top new; do grep -q "$image.qcow2" chain.out || fail "chain does not show $image.qcow2:
$(cat chain.out)"; done
"$LIVEBLK" chain --socket s.qmp --output json >chain.json
grep -q 'new.qcow2' chain.json || fail "chain --output json does not show new.qcow2"
equal "backing file of the new overlay" "$PWD/top.qcow2" \
    "$(qemu-img info -U --output json new.qcow2 | sed -nE 's/.*"full-backing-filename": "(.*)".*/\1/p' | head -n 1)"

copy_device after.raw
kill $served
wait_for_exit $served
wait $served || fail "serve ended with exit code $?"
wait_for_no_device "$DEVICE"
check_images base.qcow2 top.qcow2 new.qcow2
same_content after.raw new.qcow2

step "refusals leave nothing behind"
must_fail 'nosuch.qcow2' timeout 60 "$LIVEBLK" serve nosuch.qcow2 --socket s2.qmp
[ ! -e nosuch.qcow2 ] || fail "serve created an image"
