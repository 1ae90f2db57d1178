#!/usr/bin/env bash
# Everything that only a GPU can show, in a few minutes on one card: `tests/gpu/run.sh [folder of results]`.
# Rates at full size first, each alone on the card; then the embedded experiments, beside each other.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-outputs/gpu}; device=${DEVICE:-0}; mkdir -p "$out"
python3 -c "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')" | tee "$out/card.txt"
python3 -m tests.gpu.full_size --device "$device" ${NARROW:+--narrow} --json "$out/full_size.json" 2>&1 | tee "$out/full_size.txt"
for name in digits guide_digits escort_digits digits_fscil; do
  ( start=$(date +%s)
    python3 main.py --config "exps/$name.json" --name "gpu_$name" --set device="$device" --set output_dir="$out/runs" ${SHORT:-} >"$out/$name.log" 2>&1
    echo "$name: exit code $?, $(( $(date +%s) - start )) s, $(grep 'Final accuracy' "$out/$name.log" || tail -n 3 "$out/$name.log")" ) &
done
wait
