#!/usr/bin/env bash
# The same chain and load with zero copy: pages go between the image files and the guest without passing through the daemon.
set -euo pipefail
. "$(dirname "$0")/harness.sh"

kernel_at_least 6.16 || skip "Linux $(uname -r) has no zero copy for ublk with automatic buffer registration (6.16 has)"
ZERO_COPY=on EXPECTED=true exec bash "$(dirname "$0")/02-verify-copy.sh"
