# What the kernel test scripts share: serving an image as a block device, and assertions.
# A script runs in an empty directory on a real file system, as root, with a ublk driver.

. "$(dirname "${BASH_SOURCE[0]}")/where.sh"

LIVEBLKD=$TARGET_DIR/${LIVEBLK_PROFILE:-release}/liveblkd
LIVEBLK=$TARGET_DIR/${LIVEBLK_PROFILE:-release}/liveblk
# More loops for longer runs.
SCALE=${LIVEBLK_SCALE:-1}
# The first of the ublk device ids used here; high, as a host may have devices of its own.
DEVICE_ID=${LIVEBLK_DEVICE_ID:-40}

# ---- Telling -------------------------------------------------------------------------------

step() { printf -- '-- %s\n' "$*"; }

fail() {
    printf 'FAILED: %s\n' "$*"
    exit 1
}

skip() {
    printf '%s\n' "$*"
    exit 77
}

# must COMMAND…: its output only if it fails.
must() {
    local output
    output=$("$@" 2>&1) || fail "$* (exit code $?):
$output"
}

# must_fail PATTERN COMMAND…: it fails, and says so in words that match PATTERN.
must_fail() {
    local pattern=$1 output
    shift
    ! output=$("$@" 2>&1) || fail "this should have failed: $*
$output"
    grep -qiE -- "$pattern" <<<"$output" || fail "the error of '$*' does not say '$pattern':
$output"
}

equal() { [ "$2" = "$3" ] || fail "$1: expected '$2', got '$3'"; }

# True where the running kernel's version is at least that.
kernel_at_least() { [ "$(printf '%s\n' "$1" "$(uname -r)" | sort -V | head -n 1)" = "$1" ]; }

# ---- The daemon --------------------------------------------------------------------------------

# start_daemon NAME ARGUMENT…: a daemon with a QMP socket NAME.qmp, set up when this returns.
start_daemon() {
    local name=$1 pid
    shift
    [ -x "$LIVEBLKD" ] || fail "$LIVEBLKD is not built"
    rm -f "$name.pid"
    "$LIVEBLKD" --chardev "socket,id=mon,path=$name.qmp,server=on,wait=off" --monitor mon \
        --pidfile "$name.pid" "$@" >>"$name.log" 2>&1 &
    pid=$!
    for _ in $(seq 300); do
        [ ! -s "$name.pid" ] || return 0
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    fail "the daemon did not start:
$(cat "$name.log")"
}

# stop_daemon NAME [SIGNAL]: ends it and wants exit code 0 from it.
stop_daemon() {
    local name=$1 pid status=0
    pid=$(cat "$name.pid")
    kill "-${2:-TERM}" "$pid"
    wait_for_exit "$pid"
    wait "$pid" || status=$?
    [ "$status" = 0 ] || fail "the daemon ended with exit code $status:
$(tail -n 20 "$name.log")"
}

# Waits a minute for one of this shell's processes to end.
wait_for_exit() {
    for _ in $(seq 600); do
        case $(sed -n 's/^State:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null) in '' | Z* | X*) return 0 ;; esac
        sleep 0.1
    done
    fail "process $1 does not end:
$(cat "/proc/$1/stack" "/proc/$1/status" 2>/dev/null)"
}

# qmp NAME COMMAND [KEY=VALUE…]: prints what the command returns.
qmp() {
    local name=$1
    shift
    "$LIVEBLK" qmp --socket "$name.qmp" "$@"
}

# node FILE NAME [OPTION…]: the --blockdev value for a qcow2 image opened as a user would,
# past the page cache.
node() {
    local file=$1 name=$2 option
    shift 2
    printf 'driver=qcow2,node-name=%s,discard=unmap,cache.direct=on' "$name"
    printf ',file.driver=file,file.filename=%s,file.discard=unmap,file.cache.direct=on' "$file"
    for option; do printf ',%s' "$option"; done
}

# serve NAME FILE [EXPORT-OPTION…]: a daemon NAME with node q and export e0 of it; sets DEVICE.
# Options replace the defaults.
serve() {
    local name=$1 file=$2 export="type=ublk,id=e0,node-name=q" option
    local -A options=([writable]=on [device-id]=$DEVICE_ID)
    shift 2
    for option; do options[${option%%=*}]=${option#*=}; done
    for option in "${!options[@]}"; do export+=",$option=${options[$option]}"; done
    start_daemon "$name" --blockdev "$(node "$file" q)" --export "$export"
    DEVICE=/dev/ublkb${options[device-id]}
    wait_for_device "$DEVICE"
}

wait_for_device() {
    for _ in $(seq 100); do
        [ ! -b "$1" ] || return 0
        sleep 0.1
    done
    fail "no block device $1"
}

wait_for_no_device() {
    for _ in $(seq 100); do
        [ -e "$1" ] || return 0
        sleep 0.1
    done
    fail "the block device $1 is still there"
}

# zero_copy_of NAME: what query-block-exports says of its first export: true or false.
zero_copy_of() {
    qmp "$1" query-block-exports | tr -d ' \n' | sed -nE 's/.*"zero-copy":(true|false).*/\1/p'
}

# ---- Images ---------------------------------------------------------------------------------------

# new_image FILE SIZE [BACKING-FILE]
new_image() {
    must "$LIVEBLK" image create -f qcow2 ${3:+-b "$3" -F qcow2} "$1" "$2"
}

# four_layers SIZE: base <- l1 <- l2 <- l3, each with data of its own and holes that show
# the layer below.
four_layers() {
    local below='' layer number=0
    for layer in base l1 l2 l3; do
        new_image $layer.qcow2 "$1" $below
        must qemu-io -f qcow2 -c "write -P 0x$((10 + number)) $((number * 7))M 9M" \
            -c "write -P 0x$((20 + number)) $((number * 100 + 64 * 1024 + 12))k 20k" $layer.qcow2
        below=$layer.qcow2
        number=$((number + 1))
    done
}

# verify_until_stopped FILE: fio writes and verifies FILE of a mounted file system, pass after pass, until there is
# a file "stop"; then "passes" has their number. A pass is complete only when all that it wrote was read back.
verify_until_stopped() {
    local passes=0
    while [ ! -e stop ]; do
        must fio --name=verify --filename="$1" --rw=randrw --rwmixread=30 --size=16m --bsrange=4k-64k \
            --ioengine=libaio --iodepth=8 --direct=1 --verify=crc32c --verify_fatal=1 --do_verify=1 \
            --verify_backlog=64 --randrepeat=0 --minimal
        passes=$((passes + 1))
    done
    echo "$passes" >passes
}

# check_images FILE…: neither the reference tool nor ours finds an error or a leak.
check_images() {
    local file
    for file; do
        must qemu-img check -q -f qcow2 "$file"
        must "$LIVEBLK" image check -f qcow2 "$file"
    done
}

# check_leaks_only FILE: there is nothing wrong with an image that was in use when its daemon died, but leaks.
check_leaks_only() {
    local status=0
    qemu-img check -q -f qcow2 "$1" >check.out 2>&1 || status=$?
    [ "$status" = 0 ] || [ "$status" = 3 ] || fail "$1 is corrupt:
$(cat check.out)"
}

# copy_device FILE: what the device shows now, as a raw image.
copy_device() { dd if="$DEVICE" of="$1" bs=1M iflag=direct conv=sparse status=none; }

# same_content RAW QCOW2
same_content() { must qemu-img compare -f raw -F qcow2 "$1" "$2"; }

# random_file FILE MEBIBYTES
random_file() { dd if=/dev/urandom of="$1" bs=1M count="$2" status=none; }

# ---- File systems -------------------------------------------------------------------------------

# What is mounted where a script does not care: ext4 on the kernels with zero copy, xfs on the others.
FS=${LIVEBLK_FS:-$(kernel_at_least 6.15 && echo ext4 || echo xfs)}
# Room for either; xfs wants 300 MiB.
FS_SIZE=320M

make_file_system() {
    case $FS in
        ext4) must mkfs.ext4 -q "$1" ;;
        xfs) must mkfs.xfs -q "$1" ;;
        *) fail "LIVEBLK_FS wants ext4 or xfs, not '$FS'" ;;
    esac
}

# check_file_system DEVICE: nothing is wrong with one that is not mounted.
check_file_system() {
    case $FS in
        ext4) must fsck.ext4 -fn "$1" ;;
        xfs) must xfs_repair -n "$1" ;;
    esac
}

# check_moment_of DEVICE FILE SUM: a file system as it was at one moment of its use is clean once its journal was replayed,
# and FILE in it has that checksum. The original may be mounted meanwhile.
check_moment_of() {
    local status=0 options=ro
    [ -d moment ] || mkdir moment
    case $FS in
        ext4)
            fsck.ext4 -fp "$1" >fsck.log 2>&1 || status=$?
            [ "$status" -le 1 ] || fail "$1 after the journal (exit code $status):
$(cat fsck.log)"
            ;;
        xfs)
            options+=,nouuid
            must mount -o nouuid "$1" moment
            must umount moment
            ;;
    esac
    check_file_system "$1"
    must mount -o "$options" "$1" moment
    equal "$1: $2" "$3" "$(sha256sum <"moment/$2")"
    must umount moment
}

# ---- Load ---------------------------------------------------------------------------------------

# verify PATTERN SIZE [FIO-OPTION…]: writes the device in that pattern and reads all of it
# back against checksums, 32 requests at a time.
verify() {
    local pattern=$1 size=$2
    shift 2
    must fio --name=verify --filename="$DEVICE" --rw="$pattern" --size="$size" --bsrange=4k-128k \
        --ioengine=libaio --iodepth=32 --direct=1 --verify=crc32c --verify_fatal=1 --do_verify=1 \
        --randrepeat=0 --minimal "$@"
}
