#!/usr/bin/env bash
# On a machine with one GPU, from a fresh checkout: an environment, then every check and timing that needs the device.
#   benchmarks/gpu.sh [--device cuda|cpu] [--small] [--out DIR]
# A Python with a torch for the device that is there already is used as it is (PYTHON=...), and nothing is installed but
# what is missing of: numpy scipy sympy networkx rich typer safetensors pytest transformers.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-}"
if [ -z "$python" ]; then
    if python3 -c "import torch" 2>/dev/null; then
        python=python3
    else
        python3 -m venv .gpu-venv
        .gpu-venv/bin/pip install -q torch
        python=.gpu-venv/bin/python
    fi
fi
missing=""
for package in numpy scipy sympy networkx rich typer safetensors pytest transformers; do
    "$python" -c "import $package" 2>/dev/null || missing="$missing $package"
done
if [ -n "$missing" ]; then
    "$python" -m pip install -q $missing || echo "not installed:$missing" >&2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 AUTOPAR_CACHE=0
exec "$python" -m benchmarks.gpu "$@"
