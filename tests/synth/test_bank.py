"""Replay images on disk: drawn once, handed out in order, and refused where they are not this run's."""

import json
import os

import pytest
import torch

from synth.bank import Bank
from synth.drawing import found_images, preview
from synth.replay import Given, Redrawn, Stored
from tests.support.sources import build
from tests.support.toy import Interrupted, interrupt, toy_dataset
from tests.support.toy_sources import Remembers
from utils.data.images import ImageSet, decode_image, encode_image
from utils.data.manager import DataManager, Split
from utils.run.errors import BankError, DataError

TASKS = DataManager(toy_dataset(), Split(init_cls=2, increment=2))


class Painter(Remembers):
    """Paints every image in its label's grey and counts what it was asked for."""

    side, drawn = 8, 0

    def generate(self, requests):
        self.drawn += len(requests)
        grey = (requests.labels * 20 + requests.copy).to(torch.uint8)
        return ImageSet.of(grey.view(-1, 1, 1, 1).expand(-1, 1, self.side, self.side).contiguous(), requests.labels)


def bank_of(root, seed=7, source=Painter, **keys):
    painter = build(source, {"name": "painter", "syn_per_class": 3, **keys}, root / "run", seed)
    return Bank(root / "bank", painter, DataManager(toy_dataset(), Split(init_cls=2, increment=2, order_seed=seed)))


def drawn(root, tasks=2, **keys):
    """A bank that holds the images of the first tasks."""
    bank = bank_of(root, **keys)
    for index in range(tasks):
        bank.fill(index)
    return bank


def replay_of(kind, root, **keys):
    """A replay of this kind, whose images lie where `bank_of` has them."""
    bank = bank_of(root, **keys)
    return kind(None, bank.source, bank.data, bank.run, bank.root)


def given(root, **keys):
    return replay_of(Given, root, need_syn_imgs=False, **keys)


def greys(images):
    return [images.image(i)[0, 0, 0].item() for i in range(len(images))]


def put_images(root, per_class):
    """What another program would leave: images of task 0 and no manifest."""
    for label in (0, 1):
        folder = root / "bank" / "task_0" / str(label)
        folder.mkdir(parents=True)
        for i in range(per_class):
            image = torch.full((1, 8, 8), 20 * label + i, dtype=torch.uint8)
            (folder / f"{label}-{i}.png").write_bytes(encode_image(image, ".png"))


@pytest.mark.parametrize(
    ("side", "image_format", "suffix"),
    [(8, "auto", "png"), (64, "auto", "png"), (80, "auto", "jpg"), (80, "png", "png")],
)
def test_an_image_is_stored_lossless_up_to_64_pixels_whatever_the_data_sets_size(tmp_path, side, image_format, suffix):
    bank = bank_of(tmp_path, image_format=image_format)
    bank.source.side = side
    bank.fill(0)
    names = sorted(path.name for path in (tmp_path / "bank" / "task_0" / "1").iterdir())
    assert names == [f"1-{i}.{suffix}" for i in range(3)]


def test_stored_images_are_those_that_were_drawn_and_a_second_draw_draws_only_what_is_missing(tmp_path):
    drawn(tmp_path, sample_batch=2)
    (tmp_path / "bank" / "task_0" / "1" / "1-2.png").unlink()
    again = drawn(tmp_path, sample_batch=2)
    assert again.source.drawn == 2  # the chunk of the image that was gone
    images = again.stored([0, 2])
    assert images.labels.tolist() == [0, 0, 0, 2, 2, 2] and greys(images) == [0, 1, 2, 40, 41, 42]


def test_a_preview_that_a_kill_prevented_is_made_up_for(tmp_path):
    drawn(tmp_path)
    preview = tmp_path / "bank" / "task_0" / "preview.png"
    before = preview.read_bytes()
    preview.unlink()
    assert drawn(tmp_path).source.drawn == 0 and preview.read_bytes() == before


def test_given_images_are_used_and_nothing_is_drawn_or_given_up(tmp_path):
    drawn(tmp_path)
    replay = given(tmp_path)
    replay.require(), replay.learned(replay.data.task(0))
    assert len(replay.past(replay.data.task(2))) == 12 and len(replay.drawn_of_new(replay.data.task(1))) == 6
    assert replay.source.drawn == 0 and not replay.learns
    (line,) = replay.carried()
    assert line.nbytes > 0 and line.items.counts() == {}


@pytest.mark.parametrize("act", ["require", "past", "drawn_of_new"])
def test_too_few_given_images_are_refused_with_folder_and_counts(tmp_path, act):
    put_images(tmp_path, per_class=2)
    replay = given(tmp_path, adopt_syn_images=True)
    arguments = {"require": [], "past": [replay.data.task(1)], "drawn_of_new": [replay.data.task(0)]}[act]
    with pytest.raises(BankError, match=r'need_syn_imgs=false, but .*task_0 has {"0": 2, "1": 2} .* 3 are wanted'):
        getattr(replay, act)(*arguments)


def test_hidden_images_are_not_adopted_and_a_pipe_is_named(tmp_path):
    put_images(tmp_path, 3)
    folder = tmp_path / "bank" / "task_0"
    (folder / "0" / ".ipynb_checkpoints").mkdir()
    for name in ("._0-3.png", ".ipynb_checkpoints/0-0.png"):
        (folder / "0" / name).write_bytes(b"no image")
    assert found_images(folder) == [f"{label}/{label}-{i}.png" for label in (0, 1) for i in range(3)]
    os.mkfifo(folder / "0" / "0-3.png")
    with pytest.raises(DataError, match=r"0-3\.png is no file that could be read"):
        given(tmp_path, adopt_syn_images=True).past(TASKS.task(1))


def test_the_first_images_are_adopted_and_none_of_strange_names(tmp_path):
    put_images(tmp_path, per_class=12)
    image = tmp_path / "bank" / "task_0" / "1" / "1-0.png"
    image.with_name("1-1 - Copy.png").write_bytes(image.read_bytes())
    replay = given(tmp_path, adopt_syn_images=True)
    assert greys(replay.past(replay.data.task(1))) == [0, 1, 2, 20, 21, 22]


def test_images_that_another_setting_drew_may_be_given_but_not_those_of_another_order(tmp_path):
    drawn(tmp_path, tasks=1)
    replay = given(tmp_path, sample_batch=5, syn_per_class=2)
    assert len(replay.past(replay.data.task(1))) == 4
    for act in (lambda: drawn(tmp_path, tasks=1, seed=8), given(tmp_path, seed=8).require):
        with pytest.raises(BankError, match=r"task_0 is of another run: class_order is \[3, 5, .* there, \[.* here"):
            act()


def test_images_without_a_manifest_are_taken_over_only_on_request(tmp_path):
    put_images(tmp_path, per_class=3)
    with pytest.raises(BankError, match=r"no manifest\.json.*adopt_syn_images=true"):
        given(tmp_path).past(TASKS.task(1))
    given(tmp_path, adopt_syn_images=True).past(TASKS.task(1))
    assert json.loads((tmp_path / "bank" / "task_0" / "manifest.json").read_text())["adopted"] is True


@pytest.mark.parametrize("name", ["1-3.png", "1-0 - Copy.png", "1-x.png", "0-1.png", "1-00.jpg"])
def test_an_image_that_the_manifest_does_not_list_is_never_used(tmp_path, name):
    before = greys(drawn(tmp_path).stored(range(4)))
    (tmp_path / "bank" / "task_0" / "1" / name).write_bytes(encode_image(torch.zeros(1, 8, 8).byte(), ".png"))
    bank, replay = drawn(tmp_path, syn_per_class=3), given(tmp_path)
    assert greys(bank.stored(range(4))) == greys(replay.past(TASKS.task(2))) == before and bank.source.drawn == 0
    assert bank.newest(1) == [str(tmp_path / "bank" / "task_0" / "1" / f"1-{i}.png") for i in range(3)]


@pytest.mark.parametrize("act", ["draw", "stored", "prune", "given"])
@pytest.mark.parametrize("name", ["../../x.png", "0/../../0-1.png", "{root}/x.png", "0/1-1.png", None])
def test_a_manifest_that_lists_a_file_elsewhere_or_is_cut_off_is_refused_and_nothing_is_deleted(tmp_path, name, act):
    drawn(tmp_path, tasks=1)
    (tmp_path / "x.png").write_bytes(b"precious")
    spoil(tmp_path, name and (lambda content: content["files"].update({name.format(root=tmp_path): "0"})))
    before, bank = sorted(tmp_path.rglob("*")), bank_of(tmp_path)
    bank.kept = {0: 0}
    acts = {
        "draw": lambda: bank.fill(0), "stored": lambda: bank.stored([1]), "prune": bank.prune,
        "given": given(tmp_path).require,
    }  # fmt: skip
    said = r"task_0/manifest\.json (lists '.*', which is none of this folder's files|is damaged .*): Give.*delete the"
    with pytest.raises(BankError, match=said):
        acts[act]()
    assert sorted(tmp_path.rglob("*")) == before


def spoil(root, change):
    path = root / "bank" / "task_0" / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(path.read_text()[:50] if change is None else (change(content), json.dumps(content))[1])


def kill_after(root, num_chunks, monkeypatch, **keys):
    """A drawing of six images in chunks of two that ends before its chunk of this number."""
    generate, calls = Painter.generate, iter(range(num_chunks))

    def stop(self, requests):
        if next(calls, None) is None:
            interrupt()
        return generate(self, requests)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Painter, "generate", stop)
        drawn(root, tasks=1, sample_batch=2, **keys)
    return root / "bank" / "task_0"


def test_a_drawing_goes_on_behind_its_finished_chunks_with_the_same_bits(tmp_path, monkeypatch):
    folder = kill_after(tmp_path / "killed", 2, monkeypatch)
    assert not json.loads((folder / "manifest.json").read_text())["files"]
    again, whole = (drawn(tmp_path / name, tasks=1, sample_batch=2) for name in ("killed", "whole"))
    assert (again.source.drawn, whole.source.drawn) == (2, 6)
    assert greys(again.stored([0, 1])) == greys(whole.stored([0, 1])) and not [*folder.glob(".drawn*")]
    assert (folder / "manifest.json").read_bytes() == (whole.root / "task_0" / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "drawn_again"),
    [
        (lambda journal: journal[:-20], 4),  # its last line is torn
        (lambda journal: b'{"0/0-0.png": "0", "../x.png": "0"}\n7\n[1]\nnull\n', 6),  # not there, or not ours
    ],
)
def test_a_journal_counts_only_what_it_names_in_full_and_what_is_there(change, drawn_again, tmp_path, monkeypatch):
    (journal,) = kill_after(tmp_path, 2, monkeypatch).glob(".drawn*")
    journal.write_bytes(change(journal.read_bytes()))
    bank = drawn(tmp_path, tasks=1, sample_batch=2)
    assert bank.source.drawn == drawn_again and greys(bank.stored([0, 1])) == [0, 1, 2, 20, 21, 22]


def test_fewer_images_than_are_to_be_there_are_never_a_smaller_replay(tmp_path):
    drawn(tmp_path, tasks=1)
    spoil(tmp_path, lambda content: content["files"].pop("1/1-2.png"))
    with pytest.raises(BankError, match=r"task_0 has 2 of 3 replay images of class 1: a later checkpoint gave"):
        bank_of(tmp_path).stored([0, 1])


def test_a_stored_png_decodes_to_the_image_that_was_drawn(tmp_path):
    image = torch.randint(256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "image.png").write_bytes(encode_image(image, ".png"))
    torch.testing.assert_close(decode_image(tmp_path / "image.png"), image, rtol=0, atol=0)


def test_what_is_dropped_leaves_the_ledger_at_once_and_the_disk_when_pruned_and_is_not_missed(tmp_path):
    bank = drawn(tmp_path)
    before, path = bank.nbytes(), tmp_path / "bank" / "task_0" / "1" / "1-2.png"
    freed = bank.drop_last(1)
    assert freed == path.stat().st_size and bank.nbytes() == before - freed
    assert bank.counts() == {0: 3, 1: 2, 2: 3, 3: 3} and len(bank.stored([1])) == 2
    bank.prune()
    assert not path.exists() and bank.nbytes() == before - freed
    bank.drop_last(1), bank.drop_last(1), bank.prune()
    bank = bank_of(tmp_path)  # of a new process, with what a checkpoint says
    bank.kept = {1: 0}
    assert bank.source.drawn == 0 and bank.stored(range(3)).labels.tolist() == [0, 0, 0, 2, 2, 2]


def test_pruning_that_was_interrupted_leaves_what_is_kept_and_hands_out_nothing_else(tmp_path, monkeypatch):
    bank = drawn(tmp_path)
    bank.drop_last(1)
    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError):
        patch.setattr("pathlib.Path.unlink", lambda path, **_: path.with_name("nowhere").stat())
        bank.prune()
    for again in (bank, bank_of(tmp_path)):
        again.kept = {1: 2}  # as a checkpoint says
        again.prune()
        assert len(again.stored([0, 1])) == 5


@pytest.mark.parametrize(
    ("kind", "keys"),
    [(Redrawn, {"replay": "redraw"}), (Given, {"need_syn_imgs": False}), (Stored, {"syn_image_path": "named"})],
)
def test_nothing_is_dropped_where_nothing_is_kept_or_others_may_use_it(tmp_path, kind, keys):
    drawn(tmp_path)
    lines = replay_of(kind, tmp_path, **keys).carried()
    assert not lines or lines[0].items.counts() == {}


def test_a_preview_of_large_images_stays_small():
    large = ImageSet.of(torch.zeros(2, 3, 300, 400, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    assert preview([large, large]).shape == (3, 2 * (128 + 4) + 4, 10 * (128 + 4) + 4)
