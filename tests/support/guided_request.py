"""Draw one guided request in many processes: `torchrun --nproc_per_node 2 -m tests.support.guided_request DIR`.

Every process writes the images that it gets into `DIR/<rank>.pt`.
"""

import sys
from pathlib import Path

import torch

from tests.support.toy import toy_experiment
from utils.training import seeding


def draw(folder: Path, rank: int):
    """uint8 (N, 1, 8, 8); the classifier of all ranks but the first has BatchNorm statistics of its own before."""
    experiment = toy_experiment("guide", folder / f"run_{rank}", "ddpm", batch_size=24, classifier_scale_min_new=5)
    learner, task = experiment.check(), experiment.data.task(1)
    learner.grow_network(task)
    seeding.seed_everything("untrained")
    for layer in (learner.replay.source.network.unet.conv_out, learner.network.head):
        torch.nn.init.normal_(layer.weight, std=0.3)
    for buffer in learner.network.buffers():
        buffer += rank
    learner.replay.source.fitted_classes = {0, 1}
    return torch.cat([part.images for part in learner.replay.draw_step(task, step=0).parts])


if __name__ == "__main__":
    from accelerate import PartialState

    state = PartialState(cpu=True)
    torch.save(draw(Path(sys.argv[1]), state.process_index), Path(sys.argv[1]) / f"{state.process_index}.pt")
    state.wait_for_everyone()  # the first process serves the others' store
    state.destroy_process_group()
