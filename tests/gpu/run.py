"""Everything that only a GPU can show, in at most eight minutes on one card: `tests/gpu/run.sh`.

First the rates of `full_size.py`, each part alone on the card, then the embedded experiments beside each other. A part
is a process with a time limit of its own: one that fails or hangs is a line of the table and does not take the rest
along. results.json, results.md and log.txt are written anew after every part, so a run that is cut off leaves those.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate

ROOT = Path(__file__).parents[2]
MOST = 480  # seconds for everything
RATES = {"classifier": 60, "asp": 60, "ddpm_bf16": 75, "ddpm_fp32": 80, "ldm": 100, "controlnet": 80}  # seconds at most
EXPERIMENTS = {"digits": 200, "guide_digits": 200, "escort_digits": 200, "digits_fscil": 200}
# What makes an experiment short enough for a look at whether it runs at all.
NARROW = {
    "digits": ["init_epoch=1", "epochs=1", "synth.first_task_num_steps=2", "synth.num_steps=2",
               "synth.timestep_respacing=ddim2"],
    "digits_fscil": ["pretrain_epochs=1", "tuned_epoch=1", "fs_epoch=1", "synth.vae_steps=2", "synth.unet_steps=2",
                     "synth.g_local_train_steps=2", "synth.sample_steps=2", "synth.syn_per_class=2"],
}  # fmt: skip


class Part(NamedTuple):
    """A command, the most seconds that it may take, and the folder for its rows and log."""

    name: str
    limit: float
    command: list[str]
    folder: Path

    def run(self, until: float) -> dict:
        """Run it until its limit or the moment ``until``, and return its line of results.json."""
        start, log = time.monotonic(), self.folder / f"{self.name}.txt"
        limit = min(self.limit, until - start)
        if limit <= 0:
            return {"part": self.name, "outcome": "left out: no time is left", "seconds": 0, "rows": []}
        try:
            with log.open("w") as file:
                code = subprocess.run(self.command, cwd=ROOT, stdout=file, stderr=file, timeout=limit).returncode
            outcome = f"exit code {code}: {last_line(log)}" if code else "done"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s: {last_line(log)}"
        return {"part": self.name, "outcome": outcome, "seconds": time.monotonic() - start, "rows": self.rows()}

    def rows(self) -> list[dict]:
        """Return what it has measured, also if it was stopped on the way."""
        summary = self.folder / self.name / "summary.json"  # of an experiment
        if summary.is_file():
            value = json.loads(summary.read_text())["final_accuracy"]["mean"]
            return [{"what": f"exps/{self.name}.json, final accuracy", "value": value, "unit": "%", "peak_gib": None}]
        rows = self.folder / f"{self.name}.json"
        return json.loads(rows.read_text()) if rows.is_file() else []


def last_line(log: Path) -> str:
    """Return the last thing said, which of an exception is its message."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip()[:160] for line in reversed(lines) if line.strip()), "nothing was said")


def parts(folder: Path, narrow: bool) -> list[list[Part]]:
    """Return the parts in the order of their runs; those of one list run at the same time."""
    patience = 5 if narrow else 1  # narrow forms run on a CPU

    def part(name: str, limit: float, *words: str) -> Part:
        return Part(name, patience * limit, [sys.executable, *words], folder)

    def rate(name: str) -> Part:
        flags = ["--json", f"{folder / name}.json", *(["--narrow"] if narrow else [])]
        return part(name, RATES[name], "-m", "tests.gpu.full_size", name, *flags)

    def experiment(name: str) -> Part:
        keys = [f"output_dir={folder}", *(NARROW[name] if narrow else [])]
        settings = [word for key in keys for word in ("--set", key)]
        return part(name, EXPERIMENTS[name], "main.py", "--config", f"exps/{name}.json", "--name", name, *settings)

    return [*([rate(name)] for name in RATES), [experiment(name) for name in (NARROW if narrow else EXPERIMENTS)]]


def machine() -> dict[str, str | int]:
    """Say what the numbers were measured on."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda or "none",
            "python": platform.python_version(), "cores": os.cpu_count() or 0}  # fmt: skip


def table(found: dict) -> str:
    """Return everything as a page of Markdown."""
    lines = []
    for part in found["parts"]:
        for row in part["rows"]:
            peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f} GiB"
            value = f"{row['value']:,.{2 if row['value'] < 100 else 0}f} {row['unit']}"
            lines.append((part["part"], row["what"], value, peak))
        outcome = part["outcome"] if part["outcome"] == "done" else f"**{part['outcome']}**".replace("|", "/")
        lines.append((part["part"], outcome, f"{part['seconds']:.0f} s", ""))
    said = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    head = f"{said}; {'narrow sizes, which say nothing of speed; ' * found['narrow']}{found['seconds']:.0f} s in all"
    return f"{head}\n\n{tabulate(lines, ('part', 'what', 'value', 'peak memory'), 'github', disable_numparse=True)}\n"


def write(out: Path, found: dict, folder: Path) -> None:
    (out / "results.json").write_text(json.dumps(found, indent=1))
    (out / "results.md").write_text(table(found))
    logs = sorted(folder.glob("*.txt"), key=lambda path: path.stat().st_mtime)
    (out / "log.txt").write_text("".join(f"==== {log.stem}\n{log.read_text(errors='replace')}\n" for log in logs))


def run(groups: list[list[Part]], out: Path, folder: Path, narrow: bool, most: float) -> bool:
    """Run all parts within ``most`` seconds, write what they found, and return whether all went well."""
    start, found = time.monotonic(), {"machine": machine(), "narrow": narrow, "seconds": 0.0, "parts": []}
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            for result in pool.map(lambda part: part.run(start + most), group):
                found["parts"].append(result)
                print(f"{result['part']}: {result['outcome']} [{result['seconds']:.0f} s]", flush=True)
        found["seconds"] = time.monotonic() - start
        write(out, found, folder)
    print(table(found))
    return all(part["outcome"] == "done" for part in found["parts"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--narrow", action="store_true", help="tiny sizes on any device: whether everything runs")
    narrow = parser.parse_args().narrow
    if not narrow and not torch.cuda.is_available():
        print("no GPU is seen: --narrow shows on a CPU whether everything runs", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT") or ROOT / "outputs" / "gpu").absolute()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        return 0 if run(parts(folder, narrow), out, folder, narrow, most=(10 if narrow else 1) * MOST) else 1


if __name__ == "__main__":
    sys.exit(main())
