"""Class orders, task sizes, few-shot draws and long tails of the specification cards.

PyCIL sections 2 and 11, ESCORT checks 1 and 2, DDDR section 3, ASP 2.3, TDFA 9.1 and 9.2.
"""

import hashlib

import pytest
import torch

from utils.data.subsets import class_order, few_shot_indices, long_tail_counts, long_tail_indices, task_sizes

PYCIL_1993 = """
68,56,78,8,23,84,90,65,74,76,40,89,3,92,55,9,26,80,43,38,58,70,77,1,85,19,17,50,28,53,13,81,45,82,6,59,83,16,15,44,
91,41,72,60,79,52,20,10,31,54,37,95,14,71,96,98,97,2,64,66,42,22,35,86,24,34,87,21,99,0,88,27,18,94,11,12,47,25,30,46,
62,69,36,61,7,63,75,5,32,4,51,48,73,93,39,67,29,49,57,33
"""


def test_seed_1993_gives_pycils_order_of_100_classes():
    assert class_order(100, shuffle=True, seed=1993) == [int(item) for item in PYCIL_1993.split(",")]


@pytest.mark.parametrize(
    ("num_classes", "seed", "start"),
    [
        (10, 1993, [4, 2, 7, 6, 0, 3, 5, 8, 9, 1]),
        (101, 1993, [68, 56, 78, 8, 23, 84, 90, 65]),  # ESCORT, Food-101
        (256, 1993, [224, 35, 54, 169, 9, 202, 231, 50]),  # ESCORT, Caltech-256
        (100, 2023, [56, 12, 68, 0, 82, 66, 91, 44, 46, 20]),  # DDDR
        (100, 2024, [35, 19, 26, 17, 77, 24, 70, 58, 95, 14]),
        (100, 2025, [49, 77, 61, 69, 6, 95, 68, 19, 2, 5]),
    ],
)
def test_class_orders_start_as_the_references_do(num_classes, seed, start):
    assert class_order(num_classes, shuffle=True, seed=seed)[: len(start)] == start


@pytest.mark.parametrize(
    ("num_classes", "init_cls", "increment", "sizes"),
    [
        (100, 10, 10, [10] * 10),
        (100, 50, 10, [50] + [10] * 5),
        (100, 50, 5, [50] + [5] * 10),  # eleven phases
        (100, 7, 7, [7] * 14 + [2]),
        (100, 100, 10, [100]),
        (101, 51, 5, [51] + [5] * 10),  # ESCORT, Food-101: eleven phases
        (256, 26, 26, [26] * 9 + [22]),
        (256, 6, 25, [6] + [25] * 10),
        (100, 60, 5, [60] + [5] * 8),  # ASP, CIFAR-100: nine sessions
        (200, 100, 10, [100] + [10] * 10),  # ASP, CUB and ImageNet-R
    ],
)
def test_phase_lists_are_those_of_the_references(num_classes, init_cls, increment, sizes):
    assert task_sizes(num_classes, init_cls, increment) == sizes


def test_asps_effective_few_shot_set_is_its_second_draw():
    labels = torch.arange(100).repeat_interleave(500)
    sessions = [range(start, start + 5) for start in range(60, 100, 5)]
    drawn = few_shot_indices(labels, sessions, kshot=5, seed=2024, draw="reference")
    expected = {
        60: [385, 341, 206, 488, 21], 61: [96, 342, 15, 94, 58], 64: [135, 73, 239, 154, 482], 65: [119, 25, 1, 57, 54],
        99: [210, 359, 421, 35, 383],
    }  # fmt: skip
    assert {label: drawn[label] for label in expected} == expected
    assert sorted(drawn) == list(range(60, 100))


def test_long_tail_counts_are_those_of_cbdm():
    counts = long_tail_counts(50_000, 100, 0.01)
    assert counts[:6] == [500, 477, 455, 434, 415, 396]
    assert (counts[34:36], counts[69:71], counts[-6:]) == ([102, 98], [20, 19], [6, 6, 5, 5, 5, 5])
    assert long_tail_counts(50_000, 10, 0.01) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@pytest.mark.parametrize(
    ("imb_factor", "cifar100", "cifar10"),
    [(0.1, 19573, 20431), (0.05, 15907, 17023), (0.02, 12608, 13996), (0.01, 10847, 12406), (0.005, 9502, 11203)],
)
def test_long_tail_totals_are_those_of_cbdm(imb_factor, cifar100, cifar10):
    assert sum(long_tail_counts(50_000, 100, imb_factor)) == cifar100
    assert sum(long_tail_counts(50_000, 10, imb_factor)) == cifar10


CBDM = [
    (100, 50_000, [9000, 25400, 28300, 44500, 46100, 1500], [34899, 15399, 36399, 36199, 29999], 271164136,
     "7ebcb6242d814b39233926ff2bf7384134fe218439f2616771d2a54baec405cb"),
    (10, 50_000, [3980, 38330, 48360], [], 309550124,
     "563055e23a86ca16a1817853b5083e2cc07118f9307ecc8082d4fcdc922f6f6b"),
    (10, 1000, [260, 860, 20], [969], 121360, "062cfd5a27bc4fba38e65382de825b1951f19332bfc529987f87c7fad11993c7"),
]  # fmt: skip


@pytest.mark.parametrize(("num_classes", "num_images", "start", "end", "total", "digest"), CBDM)
def test_long_tail_selection_is_that_of_cbdm_to_the_bit(num_classes, num_images, start, end, total, digest):
    kept = long_tail_indices(torch.arange(num_images) % num_classes, num_classes, 0.01)
    assert kept[: len(start)].tolist() == start
    assert kept[len(kept) - len(end) :].tolist() == end
    assert kept.sum().item() == total
    assert hashlib.sha256(kept.numpy().astype("<i8").tobytes()).hexdigest() == digest
