"""What each task may see, and in which labels."""

from dataclasses import replace

import pytest
import torch

from utils.data.datasets import Dataset
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Split
from utils.data.subsets import long_tail_counts
from utils.run.errors import ConfigError, DataError, SealedDataError

NAMES = ["ant", "bee", "cat", "dog", "eel"]


def toy_dataset(per_class=10, **changes) -> Dataset:
    """Five classes of 2x2 images; every pixel is ten times the original class id, plus one in the test set."""
    labels = torch.arange(5).repeat(per_class)
    pixels = (labels * 10).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    dataset = Dataset(
        name="toy", train=ImageSet.of(pixels, labels), test=ImageSet.of(pixels[:10] + 1, labels[:10]),
        class_names=NAMES, image_size=2, channels=1, in_memory=True, mean=(0.5,) * 3, std=(0.5,) * 3,
        augmentation="none", source="a test",
    )  # fmt: skip
    return replace(dataset, **changes)


def numbered(count) -> Dataset:
    """Training images whose every pixel is their own number; their class is the number modulo 5."""
    numbers = torch.arange(count)
    return toy_dataset(train=ImageSet.of(numbers.to(torch.uint8).view(-1, 1, 1, 1), numbers % 5))


def manager(dataset=None, upper_bound=False, **rules) -> DataManager:
    split = Split(**{"init_cls": 2, "increment": 2, "order_seed": 3, **rules})
    return DataManager(dataset or toy_dataset(), split, upper_bound)


def test_tasks_name_their_classes_in_the_order_of_learning():
    data = manager()
    tasks = list(data.tasks())
    assert [(task.num_old, task.num_new, task.num_seen) for task in tasks] == [(0, 2, 2), (2, 2, 4), (4, 1, 5)]
    assert [name for task in tasks for name in task.class_names] == data.class_names
    assert data.class_names == [NAMES[original] for original in data.class_order]


def test_labels_are_positions_in_the_class_order():
    data = manager()
    for task in data.tasks():
        images, tests = data.train_images(task), data.test_images(task.classes)
        assert images.classes == tests.classes == list(task.classes)
        originals = [data.class_order[label] for label in (images + tests).labels.tolist()]
        levels = torch.cat([images.parts[0].images // 10, (tests.parts[0].images - 1) // 10])[:, 0, 0, 0]
        assert levels.tolist() == originals


def test_past_and_future_images_cannot_be_read_but_by_upper_bounds():
    data, joint = manager(), manager(upper_bound=True)
    with pytest.raises(SealedDataError, match="task 1 has not begun"):
        data.train_images(data.task(1))
    first, second, third = data.tasks()
    data.advance(second)
    with pytest.raises(SealedDataError, match=r"task 0 are sealed while task 1.*exemplars.*source"):
        data.train_images(first)
    with pytest.raises(SealedDataError, match="task 2 has not begun: iterate"):
        data.train_images(third)
    with pytest.raises(SealedDataError, match="upper_bound"):
        data.all_seen_images(second)
    joint.advance(second)
    assert joint.all_seen_images(second).classes == [0, 1, 2, 3]
    assert data.train_images(next(data.tasks(start=2))).classes == [4]  # a resumed run begins at a later task


@pytest.mark.parametrize("draw", ["own", "reference"])
def test_few_shots_cut_every_task_but_the_first_by_the_run_seed_and_not_the_class_order(draw):
    one, same, other = (manager(kshot=3, few_shot_draw=draw, run_seed=seed) for seed in (3, None, 4))
    assert one.class_counts == [10, 10, 3, 3, 3] and sorted(one.few_shot_indices) == [2, 3, 4]
    assert one.few_shot_indices == same.few_shot_indices != other.few_shot_indices
    # raw pixels are counted after the cut
    assert (manager().all_real_bytes, one.all_real_bytes) == (50 * 4, (2 * 10 + 3 * 3) * 4)


def test_few_shot_positions_name_the_images_that_are_used():
    dataset = numbered(50)
    data = manager(dataset, kshot=3, val_share=0.2)
    used = data.train_images(next(data.tasks(start=2))).parts[0].images.flatten()
    of_class = torch.arange(50)[dataset.train.labels == data.class_order[4]]
    assert of_class[data.few_shot_indices[4]].tolist() == used.tolist()


def test_classes_come_in_an_order_that_is_given():
    own = manager(class_order=[4, 2, 0, 1, 3])
    assert own.class_order == [4, 2, 0, 1, 3] and own.class_names[0] == toy_dataset().class_names[4]
    with pytest.raises(ConfigError, match="class_order names 3 classes: name all 5 of toy"):
        manager(class_order=[1, 0, 2])


def test_tasks_come_in_an_order_that_is_given():
    own = manager(class_order=[4, 2, 0, 1, 3], task_order=[2, 0, 1])
    assert own.class_order == [3, 4, 2, 0, 1] and own.task_sizes == [1, 2, 2]
    assert manager(class_order=[4, 2, 0, 1, 3], task_order=[2, 0, 1], limit_tasks=2).class_order == [3, 4, 2]
    with pytest.raises(ConfigError, match="task_order names 2 tasks: name all 3"):
        manager(task_order=[1, 0])


def test_the_first_images_of_a_class_are_used_before_a_tail_is_cut_and_shots_are_drawn():
    data = numbered(100)
    few = manager(data, train_per_class=8)
    for task in few.tasks():
        for label in task.classes:
            numbers = few.train_images(task).select([label]).parts[0].images.flatten().tolist()
            assert numbers == [few.class_order[label] + 5 * i for i in range(8)]
    assert manager(data, train_per_class=50).class_counts == [20] * 5
    tail = manager(data, train_per_class=10, imb_factor=0.1)
    assert sorted(tail.class_counts, reverse=True) == long_tail_counts(50, 5, 0.1)
    assert manager(data, train_per_class=8, kshot=3).class_counts == [8, 8, 3, 3, 3]


def test_the_long_tail_follows_the_original_classes():
    data = manager(toy_dataset(per_class=100), imb_factor=0.1)
    by_original = [count for _, count in sorted(zip(data.class_order, data.class_counts))]
    assert by_original == long_tail_counts(500, 5, 0.1) == [100, 56, 31, 17, 10]


def test_a_tail_is_long_by_its_factor_or_by_nature_and_not_by_few_shots():
    rare = torch.tensor([0] * 20 + [1] * 2 + [2, 3, 4] * 20)
    natural = toy_dataset(train=ImageSet.of(torch.zeros(len(rare), 1, 2, 2, dtype=torch.uint8), rare))
    assert manager(natural).long_tailed and manager(toy_dataset(per_class=100), imb_factor=0.5).long_tailed
    assert not manager().long_tailed and not manager(toy_dataset(per_class=100), kshot=2).long_tailed


def test_impossible_settings_are_refused_at_construction():
    with pytest.raises(ConfigError, match="init_cls=6, but toy has only 5 classes: use a value from 1 to 5"):
        manager(init_cls=6)
    with pytest.raises(DataError, match=r"kshot=11, but class '\w+' has only 10 .* images: use kshot of at most 10"):
        manager(kshot=11)


@pytest.mark.parametrize(
    ("rules", "counts"),
    [
        ({}, [4] * 5),
        ({"kshot": 2}, [4] * 5),  # held out before the shots are drawn
        ({"limit_tasks": 2}, [4] * 4),
        ({"imb_factor": 0.25, "shuffle": False}, [4, 3, 2, 1, 1]),  # a fifth of 20, 14, 10, 7, 5
        ({"imb_factor": 0.25, "kshot": 2, "limit_tasks": 2, "shuffle": False}, [4, 3, 2, 1]),
    ],
)
def test_validation_images_are_of_their_class_and_never_trained_on(rules, counts):
    dataset = numbered(100)
    data = manager(dataset, upper_bound=True, val_share=0.2, **rules)
    held_out, last = data.val_images(range(5)), data.task(data.num_tasks - 1)
    assert data.val_images([1]).counts(2).tolist() == [0, counts[1]] and not len(manager(dataset).val_images(range(5)))
    data.advance(last)
    trained = data.all_seen_images(last)
    assert held_out.counts(data.num_classes).tolist() == counts
    numbers, used = (images.parts[0].images.flatten().tolist() for images in (held_out, trained))
    assert [number % 5 for number in numbers] == [data.class_order[label] for label in held_out.labels.tolist()]
    assert not set(numbers) & set(used)


def test_a_fingerprint_names_classes_counts_and_the_bytes_of_training_images():
    data = toy_dataset()
    pixels = data.train.parts[0].images.clone()
    pixels[7] += 1
    changed = toy_dataset(train=ImageSet.of(pixels, data.train.labels))
    first, same, other = (manager(dataset).fingerprint() for dataset in (data, toy_dataset(), changed))
    assert first == same and first["images"] != other["images"]
    assert (first["dataset"], first["counts"], sorted(first["class_names"])) == ("toy", [10] * 5, NAMES)
    assert first["images"] != manager(kshot=3).fingerprint()["images"]


def test_a_fingerprint_of_files_moves_with_names_and_sizes_but_not_with_their_folder(tmp_path):
    def fingerprint(folder: str, name: str = "a.jpg", size: int = 5) -> dict:
        paths = [tmp_path / folder / "train" / str(label) / name for label in range(5)]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * size)
        files = ImageSet.of([str(path) for path in paths], torch.arange(5))
        return manager(toy_dataset(train=files, root=str(tmp_path / folder))).fingerprint()

    assert fingerprint("here") == fingerprint("there")
    assert len({fingerprint(*case)["images"] for case in [("a",), ("b", "b.jpg"), ("c", "a.jpg", 6)]}) == 3
