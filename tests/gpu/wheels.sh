#!/usr/bin/env bash
# Wheels for a machine without a network whose Python has torch, torchvision, timm, transformers, accelerate, safetensors,
# scikit-learn and opencv, but nothing else of requirements.txt that a run needs: `tests/gpu/wheels.sh [folder] [Python version]`.
# There: `pip install --no-index --find-links FOLDER diffusers pydantic tabulate && tests/gpu/run.sh`.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-outputs/wheels}; version=${2:-3.12}; most=$((64 << 20))
platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64)
rm -f "$folder"/*.whl  # two versions of one package stop the installation
python3 -m pip download --quiet --dest "$folder" --only-binary=:all: --implementation cp --python-version "$version" \
  "${platforms[@]/#/--platform=}" diffusers pydantic tabulate
size=$(du -sb "$folder" | cut -f1)
echo "$folder: $(ls "$folder" | wc -l) wheels for Python $version, $((size >> 20)) MiB"
((size <= most)) || { echo "more than $((most >> 20)) MiB: too much to carry along" >&2; exit 1; }
