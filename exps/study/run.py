"""Run what is missing of a study, row after row: `python exps/study/run.py --set data_dir=FOLDER`.

Every JSON file beside this one is a row. A finished one takes a few seconds, one that was cut off goes on, and one that
fails does not keep the others from running. Other arguments are main.py's. Afterwards, a table of all:
`python -m utils.results.compare outputs/study_*`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAIN = HERE.parents[1] / "main.py"


def main(arguments: list[str] | None = None) -> int:
    """Return exit code 0, or 1 if a row failed."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="exps/study/run.py", description=__doc__, formatter_class=form)
    parser.add_argument("--only", default="", metavar="NAME", help="rows whose names begin so (default: all)")
    options, of_main = parser.parse_known_args(arguments)
    rows = sorted(path for path in HERE.glob("*.json") if path.stem.startswith(options.only))
    if not rows:
        parser.error(f"no row's name begins with {options.only!r}")
    failed = []
    for row in rows:
        print(f"--- {row.stem}", flush=True)
        command = [sys.executable, str(MAIN), "--config", str(row), "--name", f"study_{row.stem}", *of_main]
        if subprocess.run(command).returncode:
            failed.append(row.stem)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
