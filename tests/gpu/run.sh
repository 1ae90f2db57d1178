#!/usr/bin/env bash
# Everything that only a GPU can show, in at most eight minutes on one card: `tests/gpu/run.sh`, or with --narrow whether it
# runs at all, on any device. results.md, results.json and log.txt go to $OUT, or to outputs/gpu. Where packages are
# missing and there is no network: wheels.sh.
cd "$(dirname "$0")/../.." && exec python3 -m tests.gpu.run "$@"
