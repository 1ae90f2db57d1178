"""What drawn digits are worth against what they cost: `python -m tests.benchmarks.replay_cost`.

The generator of `exps/digits.json`, of all ten digits as one task. First by its training: predictions and weightings
of the loss, after 250, 500 and 1,000 steps, drawn as the file says. Then by its drawing: samplers in 2 to 50 steps, of
the last of these. Scores are the accuracy, on real digits, of a classifier that has seen drawn ones alone (CAS), and
their kernel distance to real ones in the features of a ResNet-20 of all real digits. Half an hour on one core; a second
start goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.benchmarks.evaluate import measure, train_generator, train_judge
from utils.run.files import read_json, write_json

BATCH, TRAININGS, DRAWINGS = 32, (250, 500, 1000), (2, 5, 10, 20, 50)
LOSSES = {
    "epsilon": ("epsilon", "none"), "epsilon, min_snr": ("epsilon", "min_snr"), "v": ("v", "none"),
    "v, min_snr": ("v", "min_snr"), "v, soft_min_snr": ("v", "soft_min_snr"), "x0": ("x0", "none"),
    "x0, min_snr": ("x0", "min_snr"),
}  # fmt: skip
SAMPLERS = ("ddim", "ddpm", "ipndm", "dpmpp", "unipc")
DRAWN_FROM = "v, min_snr"
Scores = dict[str, dict[str, list[float]]]  # CAS and KD by curve and number of evaluations


def score(folder: Path, name: str, loss: str, steps: int, cas_epochs: int, **drawing) -> list[float]:
    """Return [CAS, KD] of a generator, which is trained first where it is not there."""
    prediction, weighting = LOSSES[loss]
    fitted = folder / f"generator {loss} {steps}"
    train_generator(fitted, first_task_num_steps=steps, prediction=prediction, loss_weighting=weighting)
    measures = measure(folder, fitted, folder / name, cas_epochs, **drawing)
    return [measures["CAS"]["value"], measures["KD"]["value"]]


def run(folder: Path, cas_epochs: int) -> dict[str, Scores]:
    """Score every curve's points; what was scored before is read again."""
    train_judge(folder)
    path = folder / "scores.json"
    found = read_json(path, "delete it") if path.exists() else {}

    def point(panel: str, curve: str, evaluations: int, *args, **drawing) -> None:
        points = found.setdefault(panel, {}).setdefault(curve, {})
        if str(evaluations) not in points:
            points[str(evaluations)] = score(folder, f"{panel} {curve} {evaluations}", *args, cas_epochs, **drawing)
            write_json(path, found)
            print(panel, curve, evaluations, points[str(evaluations)], sep="\t", flush=True)

    for loss in LOSSES:
        for steps in TRAININGS:
            point("training", loss, 3 * BATCH * steps, loss, steps)
    for sampler in SAMPLERS:
        for steps in DRAWINGS:
            point("drawing", sampler, steps, DRAWN_FROM, TRAININGS[-1],
                  sampler=sampler, timestep_respacing=str(steps) if sampler == "ddpm" else f"ddim{steps}")  # fmt: skip
    return found


def plot(found: dict[str, Scores], path: Path) -> None:
    """Draw both scores of both panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    titles = {"training": "evaluations in training (DDIM, 25 steps)",
              "drawing": f"evaluations per drawn image ({DRAWN_FROM}, {TRAININGS[-1]} training steps)"}  # fmt: skip
    for column, (panel, title) in enumerate(titles.items()):
        for row, label in enumerate(("accuracy of a classifier of drawn digits (%)", "kernel distance")):
            axis = axes[row, column]
            for curve, points in found[panel].items():
                axis.plot([int(x) for x in points], [scores[row] for scores in points.values()], "o-", label=curve)
            axis.set(xscale="log", xlabel=title if row else "", ylabel="" if column else label)
            ticks = [int(x) for x in next(iter(found[panel].values()))]
            axis.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0, column].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("outputs/replay_cost"))
    parser.add_argument("--cas_epochs", type=int, default=30)
    parser.add_argument("--plot", type=Path, help="file of the figure (default: scores.png in the folder)")
    arguments = parser.parse_args()
    plot(run(arguments.folder, arguments.cas_epochs), arguments.plot or arguments.folder / "scores.png")
