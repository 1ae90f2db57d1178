"""What a run costs: what is counted, where, and what comes back after a kill."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils.results.cost import Cost, add_up
from utils.training.flops import count_flops
from utils.training.ledger import Ledger, counted
from utils.training.runtime import Runtime

ROW = 2 * 6 * 5  # FLOPs of a row: a multiplication and an addition per weight


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(6), nn.Linear(6, 5)

    @counted
    def forward(self, x):
        return self.linear(F.dropout(self.norm(x), training=self.training))

    @counted
    def twice(self, x):
        return self(x) + self(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(Runtime(["cpu"], "fp32"), tmp_path / "checkpoints")


def counts_of(ledger):
    return {part: (cost.evaluations, cost.flops) for part, cost in ledger.total().items()}


def test_a_forward_pass_counts_its_images_once_and_a_backward_pass_twice_more(net, ledger):
    with ledger.part("train"):
        net(torch.ones(4, 6)).sum().backward()
        net(torch.ones(3, 6))  # nobody asks for its gradient
        with torch.no_grad():
            net(torch.ones(2, 6))
    assert counts_of(ledger) == {"train": (3 * 4 + 3 + 2, (3 * 4 + 3 + 2) * ROW)}


def test_what_is_called_inside_an_evaluation_or_outside_of_every_part_is_no_other_one(net, ledger):
    net(torch.ones(4, 6))
    with ledger.part("train"):
        with torch.no_grad():
            net.twice(torch.ones(4, 6))
        net(torch.ones(0, 6))
    assert counts_of(ledger) == {"train": (4, 2 * 4 * ROW)}


def test_the_innermost_part_of_the_present_task_pays_and_a_copy_counts_like_the_network(net, ledger):
    with torch.no_grad(), ledger.part("train"):
        net(torch.ones(4, 6))
        with ledger.part("draw"):
            copy.deepcopy(net)(torch.ones(2, 6))
    ledger.close_task()
    with torch.no_grad(), ledger.part("evaluate"):
        net.eval()(torch.ones(1, 6))
    assert [list(costs) for costs in ledger.tasks] == [["train", "draw"]]
    assert counts_of(ledger) == {"train": (4, 4 * ROW), "draw": (2, 2 * ROW), "evaluate": (1, ROW)}
    assert all(cost.peak_memory > 10**6 for cost in ledger.total().values())


def test_counting_moves_no_bit_and_no_random_number(net, ledger):
    results = []
    for network, part in ((copy.deepcopy(net), None), (net, "train")):
        torch.manual_seed(1)
        x = torch.randn(8, 6, requires_grad=True)
        if part is None:
            losses = [network(x).square().sum() for _ in range(2)]
        else:
            with ledger.part(part):
                losses = [network(x).square().sum() for _ in range(2)]
        gradients = torch.autograd.grad(sum(losses), [x, *network.parameters()])
        results.append([*losses, *gradients, *network.buffers(), torch.rand(1)])
    for plain, while_counted in zip(*results):
        torch.testing.assert_close(plain, while_counted, rtol=0, atol=0)


@pytest.mark.parametrize("width", [8, 16])
def test_attention_is_counted_on_a_cpu_too(width):
    q = torch.randn(2, 3, 7, width)
    _, flops = count_flops(lambda: F.scaled_dot_product_attention(q, q, q))
    assert flops == 2 * (2 * 2 * 3 * 7 * 7 * width)  # two products


def test_counts_of_a_training_come_back_from_its_checkpoint(net, ledger, tmp_path):
    with torch.no_grad(), ledger.part("fit"):
        net(torch.ones(4, 6))
        before = ledger.counts()
        net(torch.ones(3, 6))
        with ledger.part("draw"):
            net(torch.ones(2, 6))
    kept = ledger.since(before)
    other = Ledger(ledger.runtime, tmp_path)
    other.add(kept)
    assert counts_of(other) == {"fit": (3, 3 * ROW), "draw": (2, 2 * ROW)}


def test_what_was_drawn_onto_the_disk_is_known_to_the_process_that_goes_on(net, ledger):
    with torch.no_grad(), ledger.part("draw"):
        for name, rows in (("a", 4), ("b", 3), ("a", 2)):  # what is drawn again takes the place of what was there
            with ledger.drawing(name):
                net(torch.ones(rows, 6))
        assert not ledger.counts()  # so that a checkpoint inside a training has none of it
    with open(ledger.folder / "drawn_0.jsonl", "a") as file:
        file.write('\n{"task": 0, "name": "c", "co')
    other = Ledger(ledger.runtime, ledger.folder)
    other.load([])
    assert counts_of(other) == counts_of(ledger) == {"draw": (5, 5 * ROW)}
    ledger.close_task()
    other.load(ledger.state())  # a checkpoint has them now
    assert counts_of(other) == counts_of(ledger) and not other.kept


def test_costs_add_up_and_peaks_do_not():
    assert add_up([Cost(1, 10, 0.5, 7), Cost(2, 20, 0.25, 3)]) == Cost(3, 30, 0.75, 7)
