#!/usr/bin/env bash
# Starts Triton's official container on this repository. Arguments go to tritonserver.
#
#   IMAGE       the container; a plan of TensorRT needs the release whose TensorRT has built it
#   FLUXDEPLOY  what pip installs of fluxdeploy: a version, a wheel's name below /models, or a URL
#   GPUS        what --gpus says; empty for a machine without a GPU
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
image="${IMAGE:-nvcr.io/nvidia/tritonserver:25.10-py3}"
gpus="${GPUS-all}"

# Python models and the server share memory: 64 MB, which containers have, is too little.
exec docker run --rm --init ${gpus:+--gpus "$gpus"} --shm-size=1g \
  -p 8000:8000 -p 8001:8001 -p 8002:8002 \
  -e FLUXDEPLOY="${FLUXDEPLOY:-}" -e ORT_DISABLE_TELEMETRY=1 \
  -v "$here":/models:ro "$image" \
  bash -c '
    set -e
    grep -v "^fluxdeploy" /models/requirements.txt > /tmp/pins.txt
    pip install --quiet --constraint /tmp/pins.txt "${FLUXDEPLOY:-$(grep "^fluxdeploy" /models/requirements.txt)}"
    exec tritonserver --model-repository=/models --disable-auto-complete-config "$@"
  ' run "$@"
