#!/usr/bin/env bash
# A device of `liveblk serve` gets its link /dev/liveblk/INSTANCE/ID from the udev rule, and the link goes with the device.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

command -v udevadm >/dev/null || skip "udevadm is not installed (Debian: apt-get install udev)"
rule=/run/udev/rules.d/60-liveblk.rules
[ ! -e $rule ] || skip "$rule is there already"
mkdir -p /run/udev/rules.d
sed "s|/usr/local/bin/liveblk|$LIVEBLK|" "$(dirname "$0")/../udev/60-liveblk.rules" >$rule
if [ -S /run/udev/control ]; then
    udevadm control --reload
else
    (exec -a systemd-udevd "$(command -v udevadm)") >udevd.log 2>&1 &
    udevd=$!
fi
trap 'rm -f $rule; [ -z "${udevd:-}" ] || kill $udevd' EXIT
sleep 2

new_image top.qcow2 64M
"$LIVEBLK" serve --name udevtest top.qcow2 >device 2>serve.log &
served=$!
for _ in $(seq 300); do
    [ ! -s device ] || break
    kill -0 $served 2>/dev/null || fail "serve ended:
$(cat serve.log)"
    sleep 0.1
done
DEVICE=$(cat device)
for _ in $(seq 300); do [ ! -e /dev/liveblk/udevtest/top ] || break; sleep 0.1; done
equal "link" "$DEVICE" "$(readlink -f /dev/liveblk/udevtest/top)"

kill $served
wait_for_exit $served
wait_for_no_device "$DEVICE"
for _ in $(seq 300); do [ -L /dev/liveblk/udevtest/top ] || break; sleep 0.1; done
[ ! -L /dev/liveblk/udevtest/top ] || fail "the link stays"
