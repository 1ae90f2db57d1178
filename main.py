"""Run an experiment file: `python main.py --config exps/cifar.json`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

DEFAULT_CONFIG = "exps/digits.json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="main.py",
        description="Reprise: class-incremental learning with diffusion replay. Without --config it learns ten "
        "handwritten digits in five tasks and needs nothing but itself.",
    )
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="experiment file (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override a key; may be given many times; dots reach into synth")  # fmt: skip
    parser.add_argument("--name", help="name of the run (default: prefix and file name, with a hash for overrides)")
    parser.add_argument("--overwrite", action="store_true", help="delete what this run wrote before and start anew")
    parser.add_argument("--plan", action="store_true", help="print what the run would do and need, and stop")
    parser.add_argument("--list", action="store_true", help="print learners, sources, data sets and backbones")
    parser.add_argument("--offline", action="store_true", help="fetch nothing from a network")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 after one message about a mistake that the user can repair."""
    args = parse_args(argv)
    from utils.run.command import exit_code

    return exit_code(run, args)


def run(args: argparse.Namespace) -> int:
    """Everything is checked, and the data read, before anything is written."""
    if args.offline:
        args.overrides = [*args.overrides, "offline=true"]
    if args.list:
        from learners.run.plan import describe_all

        print(describe_all())
        return 0
    from learners.run.configure import build_config
    from utils.run.words import apply_overrides, read_experiment

    config, unused = build_config(apply_overrides(read_experiment(args.config), args.overrides))
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # said in the file, it must reach the hub's own code as well
    name = checked_name(args.name) if args.name else run_name(args.config, config, args.overrides)
    if args.plan:
        from learners.run.plan import describe_run

        print(describe_run(config, name))
        return 0
    return run_seeds(config, name, unused, args.overwrite)


def checked_name(name: str) -> str:
    """A name that is one folder below output_dir, so that --overwrite can never delete anything else."""
    from utils.run.errors import ConfigError

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
        raise ConfigError(
            f"--name {name!r}: use letters, digits, '_', '-', '+' and '.', beginning with one of the first two"
        )
    return name


def run_name(path: str, config, overrides: list[str]) -> str:
    """Prefix and file name; a short hash tells apart runs whose keys were overridden."""
    from utils.run.config import NOT_IDENTITY

    changed = any(override.partition("=")[0].strip() not in NOT_IDENTITY for override in overrides)
    parts = [config.prefix, Path(path).stem, config.identity_hash() if changed else ""]
    return "_".join(part.replace("/", "-").replace(" ", "-") for part in parts if part)


def run_seeds(config, name: str, unused: list[str], overwrite: bool) -> int:
    """One full run per seed, then mean and spread."""
    from learners.run.experiment import Experiment, find_needs
    from utils.results.results import summarise
    from utils.run.folder import claim_folder, claim_machine, finished_results
    from utils.training.checkpoint import write_json
    from utils.training.run import log, log_to_console
    from utils.training.runtime import Runtime

    log_to_console(is_main=os.environ.get("RANK", "0") == "0")
    runtime = Runtime(config.device, config.precision)
    with runtime.accelerator.main_process_first():  # one process downloads
        dataset = find_needs(config)
    experiments = [Experiment(config, name, seed, dataset, runtime, unused) for seed in config.seed]
    for experiment in experiments:
        if overwrite or experiment.finished() is None:
            experiment.check()
            if config.init_from is None and (config.synth is None or config.synth.source_dir is None):
                break  # the others differ in their seed alone, and what another run kept is looked up by seed
    with runtime.accelerator.main_process_first():
        folder = claim_folder(config, name, overwrite and runtime.is_main)
        claim_machine(folder, runtime)
    results = []
    for experiment in experiments:
        done = experiment.finished()
        if done is not None:
            log.info("Seed %d is finished: %s (--overwrite repeats it)", experiment.seed, experiment.folder)
        results.append(done or experiment.run())
    if runtime.is_main:
        write_json(folder / "summary.json", summarise(finished_results(folder)))
    final = ", ".join(f"{result['final_accuracy']:.2f}" for result in results)
    log.info("Final accuracy: %s %%. Results lie in %s", final, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
