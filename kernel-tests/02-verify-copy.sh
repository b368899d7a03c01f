#!/usr/bin/env bash
# A chain of four layers serves fio --verify at depth 32, random and sequential, with the data copied through the daemon.
set -euo pipefail
. "$(dirname "$0")/harness.sh"
ZERO_COPY=${ZERO_COPY:-off}
EXPECTED=${EXPECTED:-false}

four_layers 128M
serve d l3.qcow2 zero-copy="$ZERO_COPY" queue-depth=64
equal "zero-copy in query-block-exports" "$EXPECTED" "$(zero_copy_of d)"

step "what was in the chain before shows through it"
must qemu-img convert -U -f qcow2 -O raw l3.qcow2 before.raw
copy_device seen.raw
cmp before.raw seen.raw || fail "the device does not show the chain's content"
rm before.raw seen.raw

for round in $(seq "$SCALE"); do
    step "random writes, verified"
    verify randwrite 48m --offset=5m
    step "sequential writes, verified"
    verify write 32m --offset=48m
    step "random writes that are not aligned to clusters, mixed with reads"
    verify randrw 24m --offset=$((80 * 1024 + 20))k --bs_unaligned=0 --bsrange=512-40k
done

copy_device after.raw
stop_daemon d
check_images base.qcow2 l1.qcow2 l2.qcow2 l3.qcow2
same_content after.raw l3.qcow2
