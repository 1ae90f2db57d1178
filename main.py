"""Learn classes task after task, with diffusion replay: `python main.py --config exps/cifar.json`.

Without --config it learns ten handwritten digits in five tasks and needs nothing but itself.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="main.py", description=__doc__)
    digits = Path(__file__).parent / "exps" / "digits.json"  # wherever the command is given
    help_text = "experiment file, or flagfile of absl (default: exps/digits.json)"
    parser.add_argument("--config", "--flagfile", default=digits, help=help_text)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override a key; may be given many times; dots reach into synth")  # fmt: skip
    parser.add_argument("--name", help="name of the run (default: prefix and file name, with a hash for overrides)")
    parser.add_argument("--jobs", default="1", metavar="N", help="seeds that are learned side by side (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="delete what this run wrote before and start anew")
    parser.add_argument("--plan", action="store_true", help="print what the run would do and need, and stop")
    parser.add_argument("--list", action="store_true", help="print learners, sources, data sets and backbones")
    parser.add_argument("--offline", action="store_true", help="fetch nothing from a network")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Return exit code 0, or 2 after one message about a mistake that the user can repair."""
    from utils.run.command import exit_code

    return exit_code(start, parse_args(argv))


def start(args: argparse.Namespace) -> None:
    """Do what the command line asks for; everything is checked, and the data read, before anything is written."""
    if args.offline:
        args.overrides = [*args.overrides, "offline=true"]
    if args.list:
        from learners.run.plan import describe_all

        return print(describe_all())
    from utils.run.words import read_experiment

    jobs = read_jobs(args.jobs)
    raw = read_experiment(args.config)
    if not args.plan:
        refuse_second(args, raw)
    from learners.run.configure import build_config
    from utils.run.errors import ConfigError
    from utils.run.folder import require_places
    from utils.run.registry import shown

    config, unused = build_config(raw, args.overrides)
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # said in the file, it must reach the hub's own code as well
    name = args.name or run_name(args.config, config, args.overrides)
    # One folder below output_dir, so that --overwrite can never delete another, with room for what is added to it.
    if not re.fullmatch(r"\w[\w.+-]*", name) or len(name.encode()) > 200:
        rule = "give --name (or the key prefix) letters, digits and _-+. alone, up to 200 bytes, none of -+. first"
        raise ConfigError(f"the run's name {shown(name)}: {rule}")
    require_places(config, name)
    if args.plan:
        from learners.run.plan import describe_run

        return print(*describe_run(config, name), sep="\n")
    run_seeds(config, name, unused, args.overwrite, jobs)


def read_jobs(text: str) -> int:
    """Read `--jobs`."""
    from utils.run.errors import ConfigError
    from utils.run.registry import shown

    if not re.fullmatch("0*[1-9][0-9]{0,3}", text, re.ASCII):
        raise ConfigError(f"--jobs {shown(text)}: say how many seeds are learned side by side, from 1 to 9999")
    if int(text) > 1 and "RANK" in os.environ:
        raise ConfigError(f"--jobs {text}: processes of torchrun share every seed: leave --jobs out, or torchrun")
    return int(text)


def refuse_second(args: argparse.Namespace, raw: dict[str, Any]) -> None:
    """Say that another process is at this run before all packages are loaded, if the name can be told by then."""
    from utils.run.config import RunConfig
    from utils.run.lock import require_free

    if os.environ.get("RANK", "0") == "0" and (args.name or not changes_identity(args.overrides)):
        said = raw | dict(override.partition("=")[::2] for override in args.overrides)
        name = args.name or join_name(args.config, str(said.get("prefix") or ""))
        place = said.get("output_dir") or RunConfig.model_fields["output_dir"].default
        require_free(Path(str(place)) / name)


def changes_identity(overrides: list[str]) -> bool:
    """Whether a key is overridden that makes another experiment of a file."""
    from utils.run.config import NOT_IDENTITY

    return any(override.partition("=")[0].strip() not in NOT_IDENTITY for override in overrides)


def run_name(path: str, config, overrides: list[str]) -> str:
    """Join prefix and file name; a short hash tells apart runs whose keys were overridden."""
    return join_name(path, config.prefix, config.identity_hash() if changes_identity(overrides) else "")


def join_name(path: str, prefix: str, changed: str = "") -> str:
    return "_".join(part.replace("/", "-").replace(" ", "-") for part in (prefix, Path(path).stem, changed) if part)


def run_seeds(config, name: str, unused: list[str], overwrite: bool, jobs: int = 1) -> None:
    """Run every seed in full, as the only process that owns the run's folder."""
    from utils.run.lock import locked
    from utils.run.log import log_to_console

    is_main = os.environ.get("RANK", "0") == "0"
    log_to_console(is_main)
    folder = Path(config.output_dir) / name
    # Who owns a folder that is there is said at once; for a new one nothing is written before all is checked.
    with locked(folder, is_main) if folder.exists() else nullcontext():
        experiments = check_seeds(config, name, unused, overwrite)
    with locked(folder, is_main):
        learn_seeds(experiments, folder, overwrite, jobs)


def check_seeds(config, name: str, unused: list[str], overwrite: bool) -> list:
    """Make an experiment of every seed, of which what does not fit is said before anything is written."""
    from learners.run.experiment import Experiment, find_needs
    from utils.run.folder import read_results
    from utils.training.runtime import Runtime

    runtime = Runtime(config.device, config.precision)
    with runtime.accelerator.main_process_first():  # one process downloads
        dataset = find_needs(config)
    experiments = [Experiment(config, name, seed, dataset, runtime, unused) for seed in config.seed]
    for experiment in experiments:
        if overwrite or read_results(experiment.folder) is None:
            experiment.check(anew=overwrite)
            if config.init_from is None and (config.synth is None or config.synth.source_dir is None):
                break  # the others differ in their seed alone, and what another run kept is looked up by seed
    return experiments


def learn_seeds(experiments: list, folder: Path, overwrite: bool, jobs: int) -> None:
    """Learn the seeds that are not finished, then write mean and spread."""
    from learners.run.jobs import learn_side_by_side
    from utils.results.results import summarise
    from utils.run.files import write_json
    from utils.run.folder import claim_folder, claim_machine, finished_results, read_results
    from utils.run.log import log

    config, runtime = experiments[0].config, experiments[0].runtime
    with runtime.accelerator.main_process_first():
        claim_folder(config, folder.name, overwrite and runtime.is_main)
        claim_machine(folder, runtime, experiments[0].count_work)
    unfinished = [experiment for experiment in experiments if read_results(experiment.folder) is None]
    if jobs > 1 and len(unfinished) > 1:
        learn_side_by_side(unfinished, jobs)
    results = []
    for experiment in experiments:
        if (done := read_results(experiment.folder)) is not None:
            log.info("Seed %d is finished: %s (--overwrite repeats it)", experiment.seed, experiment.folder)
        results.append(done or experiment.learn_all())
    if runtime.is_main:
        write_json(folder / "summary.json", summarise(finished_results(folder)))
    final = ", ".join(f"{result['final_accuracy']:.2f}" for result in results)
    log.info("Final accuracy: %s %%. Results lie in %s", final, folder)


if __name__ == "__main__":
    sys.exit(main())
