#!/usr/bin/env bash
# Puts the packages in place that building the library takes, from Debian's index alone: compilers
# and libraries into the system where they are missing, which takes root, and the headers of ONNX
# Runtime into the folder that is named. Debian has those since version 13; on an older system they
# are taken from there, without a change to the system's list of packages.
set -euo pipefail
headers=$1

missing=()
has() { command -v "$1" >/dev/null || missing+=("$2"); }
has c++ g++
has cmake cmake
has ninja ninja-build
has pkg-config pkg-config
for package in nlohmann-json3-dev libpng-dev; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
        missing+=("$package")
done
if ((${#missing[@]})); then
    if [[ $EUID != 0 ]]; then
        echo "These packages are missing: sudo apt-get install ${missing[*]}" >&2
        exit 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

[[ -e $headers/onnxruntime_c_api.h ]] && exit
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
download() { apt-get -qq -o APT::Sandbox::User=root "$@" download libonnxruntime-dev; }
if ! download 2>/dev/null; then
    archive=$(apt-get indextargets --format '$(REPO_URI) $(COMPONENT)' |
        awk '$1 ~ /\/debian\/?$/ && $2 == "main" { print $1; exit }')
    if [[ -z $archive ]]; then
        echo "Install the headers of ONNX Runtime, and name them to CMake with" \
            "-D FLUXDEPLOY_ONNXRUNTIME_INCLUDE=FOLDER: this system has no archive of Debian." >&2
        exit 1
    fi
    mkdir -p lists/partial cache/archives/partial
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $archive trixie main" \
        >sources.list
    apart=(-o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=-
        -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache"
        -o Acquire::Languages=none -o APT::Sandbox::User=root)
    apt-get -qq "${apart[@]}" update
    download "${apart[@]}"
fi
dpkg -x libonnxruntime-dev*.deb unpacked
mkdir -p "$headers"
cp "$(find unpacked -name onnxruntime_c_api.h)" "$headers"
