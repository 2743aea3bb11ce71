#!/usr/bin/env bash
# The library under AddressSanitizer and UBSan, under ThreadSanitizer and under valgrind: `make
# cpp-check`. A finding ends it.
#
#     check.sh PYTHON BUNDLE INPUTS [OPTION OF CMAKE...]
#
# INPUTS is how many damaged files the readers are given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$1 bundle=$2 inputs=$3
options=("${@:4}")
here=$PWD/engines/cpp
prompt="a red circle above a blue square"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

build() { # FOLDER SANITIZERS
    cmake -S engines/cpp -B "$1" -G Ninja -Wno-dev "${options[@]}" -D FLUXDEPLOY_SANITIZE="$2" \
        -D FLUXDEPLOY_WERROR=ON -D FLUXDEPLOY_EXAMPLES=ON \
        -D FLUXDEPLOY_TESTS=ON >"$work/log" ||
        { cat "$work/log" && exit 1; }
    cmake --build "$1" >"$work/log" || { cat "$work/log" && exit 1; }
}

say() { echo "--- $*"; }

# One job is cancelled while it waits, and one while it runs.
server() { # FOLDER
    { printf '%s\n' "1 $prompt" "2 a" "3 b" "4 c" "cancel 4" && sleep 2 && echo "cancel 2"; } |
        "$1/server" "$bundle" "$work"
}

build build/cpp-address "address;undefined"
export UBSAN_OPTIONS=print_stacktrace=1 LSAN_OPTIONS=suppressions=$here/leaks.supp
command=build/cpp-address/fluxdeploy-cpp
small=(--width 64 --height 48 --steps 2 --seed 3 -o "$work/x.png")

say "AddressSanitizer: pictures"
"$command" "$bundle" "$prompt" "${small[@]}"
"$command" "$bundle" "$prompt" "${small[@]}" --negative-prompt blue --true-cfg-scale 3 --num-images 2
"$command" "$bundle" "$prompt" "${small[@]}" -o "$work/out.png" --image "$work/x-0.png" --strength 0.4
"$command" "$bundle" "$prompt" "${small[@]}" -o "$work/out.png" --image "$work/x-0.png" \
    --mask "$work/x-1.png" --low-vram
"$command" "$bundle" --check

say "AddressSanitizer: cancelling"
status=0
timeout --preserve-status -s INT 10 "$command" "$bundle" "$prompt" --steps 900 --width 160 \
    --height 160 -o "$work/out.png" || status=$?
[[ $status == 130 ]] || { echo "An interrupt ended the command with $status, not 130." && exit 1; }
server build/cpp-address
build/cpp-address/fluxdeploy-threads "$bundle"

say "AddressSanitizer: files, $inputs of them damaged"
"$python" -m pytest -q -n 0 -s --cpp-build "$PWD/build/cpp-address" --fuzz-examples "$inputs" \
    tests/engines/cpp/test_fuzz.py
"$python" -m pytest -q -n 0 --cpp-build "$PWD/build/cpp-address" \
    tests/engines/cpp/test_readers.py tests/engines/cpp/test_tokenizers.py

say "AddressSanitizer: ControlNets, and pictures in tiles"
"$python" -m pytest -q -n 0 --cpp-build "$PWD/build/cpp-address" \
    tests/engines/cpp/test_controlnets.py tests/engines/cpp/test_tiles.py -k "command or of_tiles"

say "ThreadSanitizer: clones, turns and cancelling"
build build/cpp-thread thread
export TSAN_OPTIONS="suppressions=$here/threads.supp ignore_noninstrumented_modules=1"
build/cpp-thread/fluxdeploy-threads "$bundle"
server build/cpp-thread

say 'valgrind: the example of `make cpp`'
valgrind --quiet --error-exitcode=1 --suppressions="$here/valgrind.supp" --leak-check=full \
    --show-leak-kinds=definite,indirect --errors-for-leak-kinds=definite,indirect \
    build/cpp/picture "$bundle" "$prompt" "$work/x.png"
