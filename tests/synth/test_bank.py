"""Replay images on disk: drawn once, handed out in order, and refused where they are not this run's."""

import json

import pytest
import torch

from synth.bank import Bank
from synth.base import ReplaySource
from synth.drawing import preview
from tests.support.toy import toy_dataset
from utils.data.images import ImageSet, decode_image, encode_image
from utils.data.manager import DataManager, Split
from utils.run.config import SourceConfig
from utils.run.errors import BankError
from utils.training.run import Run
from utils.training.runtime import Runtime


class Painter(ReplaySource):
    """Paints every image in its label's grey and counts what it was asked for."""

    side, drawn = 8, 0

    def generate(self, requests):
        self.drawn += len(requests)
        grey = (requests.labels * 20 + requests.copy).to(torch.uint8)
        return ImageSet.of(grey.view(-1, 1, 1, 1).expand(-1, 1, self.side, self.side).contiguous(), requests.labels)

    def save(self, directory): ...

    def load(self, directory): ...


def bank_of(root, seed=7, **keys):
    config = SourceConfig.parse({"name": "painter", "syn_per_class": 3, **keys})
    data = DataManager(toy_dataset(), Split(init_cls=2, increment=2, order_seed=seed))
    run = Run(root / "run", seed, Runtime(["cpu"], "fp32"), progress=False)
    dataset = toy_dataset()
    return Bank(root / "bank", config, data, run), Painter(config, run, 6, dataset.class_names, dataset)


def drawn(root, tasks=2, **keys):
    """A bank that holds the images of the first tasks."""
    bank, source = bank_of(root, **keys)
    for index in range(tasks):
        bank.draw(source, bank.data.task(index), bank.data.task(index).classes)
    return bank, source


def put_images(root, per_class, classes=(0, 1), task=0):
    """What another program would leave: images and no manifest."""
    for label in classes:
        (root / "bank" / f"task_{task}" / str(label)).mkdir(parents=True)
        for i in range(per_class):
            image = torch.full((1, 8, 8), 20 * label + i, dtype=torch.uint8)
            (root / "bank" / f"task_{task}" / str(label) / f"{label}-{i}.png").write_bytes(encode_image(image, ".png"))


@pytest.mark.parametrize(
    ("side", "image_format", "suffix"),
    [(8, "auto", "png"), (64, "auto", "png"), (80, "auto", "jpg"), (80, "png", "png")],
)
def test_an_image_is_stored_lossless_up_to_64_pixels_whatever_the_data_sets_size(tmp_path, side, image_format, suffix):
    bank, source = bank_of(tmp_path, image_format=image_format)
    source.side = side
    bank.draw(source, bank.data.task(0), [0, 1])
    assert sorted(path.name for path in (tmp_path / "bank" / "task_0" / "1").iterdir()) == [
        f"1-{i}.{suffix}" for i in range(3)
    ]


def test_stored_images_are_those_that_were_drawn_in_their_order(tmp_path):
    bank, _ = drawn(tmp_path)
    images = bank.stored([0, 2])
    assert images.labels.tolist() == [0, 0, 0, 2, 2, 2]
    assert [images.image(i)[0, 0, 0].item() for i in range(6)] == [0, 1, 2, 40, 41, 42]


def test_a_second_draw_draws_what_is_missing_and_nothing_else(tmp_path):
    drawn(tmp_path, sample_batch=2)
    (tmp_path / "bank" / "task_0" / "1" / "1-2.png").unlink()
    _, source = drawn(tmp_path, sample_batch=2)
    assert source.drawn == 2  # the chunk of the image that was gone


def test_images_of_another_run_are_refused_with_the_difference(tmp_path):
    drawn(tmp_path, tasks=1)
    with pytest.raises(BankError, match=r"task_0 are of another run: class_order is \[3, 5, .* there, \[.* here"):
        drawn(tmp_path, tasks=1, seed=8)


def test_without_need_syn_imgs_nothing_is_drawn_and_what_is_there_is_used(tmp_path):
    drawn(tmp_path)
    bank, source = drawn(tmp_path, need_syn_imgs=False)
    assert len(bank.stored(range(4))) == 12
    assert source.drawn == 0


@pytest.mark.parametrize("act", ["draw", "stored", "redraw"])
def test_without_need_syn_imgs_too_few_images_are_refused_with_folder_and_counts(tmp_path, act):
    put_images(tmp_path, per_class=2)
    bank, source = bank_of(tmp_path, need_syn_imgs=False, adopt_syn_images=True)
    acts = {
        "draw": lambda: bank.draw(source, bank.data.task(0), [0, 1]),
        "stored": lambda: bank.stored([0]),
        "redraw": lambda: bank.redraw(source, bank.data.task(1)),
    }
    counts = {"redraw": '"0": 0, "1": 0'}.get(act, '"0": 2, "1": 2')
    with pytest.raises(BankError, match=f"need_syn_imgs=false, but .*task_0.* has {{{counts}}} .* 3 are wanted"):
        acts[act]()


def test_of_more_images_than_are_wanted_the_first_are_used(tmp_path):
    put_images(tmp_path, per_class=12)
    bank, _ = bank_of(tmp_path, need_syn_imgs=False, adopt_syn_images=True)
    images = bank.stored([1])
    assert [images.image(i)[0, 0, 0].item() for i in range(len(images))] == [20, 21, 22]


def test_images_that_another_setting_drew_may_be_used_but_not_those_of_another_order(tmp_path):
    drawn(tmp_path, tasks=1)
    bank, _ = bank_of(tmp_path, need_syn_imgs=False, sample_batch=5, syn_per_class=2)
    assert len(bank.stored([0, 1])) == 4
    other, _ = bank_of(tmp_path, seed=8, need_syn_imgs=False)
    with pytest.raises(BankError, match="class_order is"):
        other.stored([0, 1])


def test_images_without_a_manifest_are_taken_over_only_on_request(tmp_path):
    put_images(tmp_path, per_class=3)
    with pytest.raises(BankError, match=r"no manifest\.json.*adopt_syn_images=true"):
        bank_of(tmp_path, need_syn_imgs=False)[0].stored([0])
    bank_of(tmp_path, need_syn_imgs=False, adopt_syn_images=True)[0].stored([0])
    assert json.loads((tmp_path / "bank" / "task_0" / "manifest.json").read_text())["adopted"] is True


def test_a_stored_png_decodes_to_the_image_that_was_drawn(tmp_path):
    image = torch.randint(256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "image.png").write_bytes(encode_image(image, ".png"))
    torch.testing.assert_close(decode_image(tmp_path / "image.png"), image, rtol=0, atol=0)


def test_what_is_dropped_leaves_ledger_and_hands_at_once_and_the_disk_when_it_is_pruned(tmp_path):
    bank, _ = drawn(tmp_path)
    before, path = bank.memory_bytes(), tmp_path / "bank" / "task_0" / "1" / "1-2.png"
    freed = bank.drop_last(1)
    assert freed == path.stat().st_size and bank.memory_bytes() == before - freed
    assert bank.counts() == {0: 3, 1: 2, 2: 3, 3: 3} and len(bank.stored([1])) == 2
    bank.prune()
    assert not path.exists() and bank.memory_bytes() == before - freed


def test_pruned_images_are_not_drawn_again_nor_missed(tmp_path):
    bank, _ = drawn(tmp_path)
    for _ in range(3):
        bank.drop_last(1)
    bank.prune()
    bank, source = drawn(tmp_path)  # of a new process, with what a checkpoint says
    bank.kept = {1: 0}
    assert source.drawn == 0 and bank.stored(range(3)).labels.tolist() == [0, 0, 0, 2, 2, 2]


def test_pruning_that_was_interrupted_is_finished(tmp_path, monkeypatch):
    bank, _ = drawn(tmp_path)
    bank.drop_last(1)
    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError):
        patch.setattr("pathlib.Path.unlink", lambda path: path.with_name("nowhere").stat())
        bank.prune()
    bank.prune()
    assert len(list((tmp_path / "bank" / "task_0" / "1").iterdir())) == 2 and len(bank.stored([0, 1])) == 5


@pytest.mark.parametrize("keys", [{"replay": "redraw"}, {"need_syn_imgs": False}, {"syn_image_path": "named"}])
def test_nothing_is_dropped_where_nothing_is_kept_or_others_may_use_it(tmp_path, keys):
    drawn(tmp_path)
    assert bank_of(tmp_path, **keys)[0].counts() == {}


def test_a_preview_of_large_images_stays_small():
    large = ImageSet.of(torch.zeros(2, 3, 300, 400, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    assert preview([large, large]).shape == (3, 2 * (128 + 4), 10 * (128 + 4))
