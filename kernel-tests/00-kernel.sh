#!/usr/bin/env bash
# The kernel under test has what the others build on: the ublk driver, io_uring, a place for images.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

uname -r
[ -c /dev/ublk-control ] || fail "no /dev/ublk-control although ublk_drv was loaded"
[ "$(cat /proc/sys/kernel/io_uring_disabled 2>/dev/null || echo 0)" = 0 ] || fail "io_uring is disabled"
dd if=/dev/urandom of=probe bs=4096 count=256 oflag=direct status=none || fail "no O_DIRECT in $PWD"
dd if=probe of=copy bs=4096 iflag=direct status=none
cmp probe copy || fail "a file does not read back as written"
fallocate --punch-hole --offset 0 --length 1M probe || fail "no holes in $PWD"
[ "$(stat -c %b probe)" -lt 64 ] || fail "punching a hole released nothing"

# A device that forgets what is written to it must be found out, or the load tests prove nothing.
if modprobe -q null_blk nr_devices=1 gb=1 2>/dev/null; then
    ! (DEVICE=/dev/nullb0 verify randwrite 4m) >forgetful.out || fail "fio --verify accepts a device that stores nothing"
    grep -q 'bad magic\|verify failed\|bad header' forgetful.out || fail "fio failed on a forgetful device for another reason: $(cat forgetful.out)"
    rmmod null_blk
else
    echo "no null_blk here: not shown that fio finds wrong data"
fi
