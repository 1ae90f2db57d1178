"""How what a source makes enters a training: what each kind of replay hands out, draws, counts and carries."""

import pytest
import torch

from synth.replay import Features, Given, Redrawn, Replay, Stored, replay_kind
from tests.synth.test_bank import Painter, greys, replay_of
from utils.data.images import FeatureSet, ImageSet
from utils.run.config import RunConfig


class Centres(Painter):
    """Makes features that tell label and copy, and notes under which keys."""

    samples = "features"

    def generate(self, requests):
        self.keys = {*getattr(self, "keys", ()), requests.key}
        return FeatureSet.of(torch.stack([requests.labels.float(), requests.copy.float()], 1), requests.labels)


def learn(replay, index):
    """The source learns a task, and the replay hears of it."""
    task = replay.data.task(index)
    replay.source.fitted_classes |= set(task.classes)
    replay.learned(task)


def test_a_stored_class_is_drawn_once_when_its_source_has_learned_it_and_is_memory(tmp_path):
    replay = replay_of(Stored, tmp_path)
    replay.learned(replay.data.task(0))
    assert len(replay.drawn_of_new(replay.data.task(0))) == replay.source.drawn == 0  # it has not learned it
    learn(replay, 0), learn(replay, 1)
    assert replay.source.drawn == 12 and greys(replay.past(replay.data.task(1))) == [0, 1, 2, 20, 21, 22]
    assert len(replay.past(replay.data.task(2))) == 12 and replay.source.drawn == 12
    (line,) = replay.carried()
    size = sum(path.stat().st_size for path in (tmp_path / "bank").glob("task_*/*/*-*.png"))
    assert (line.name, line.nbytes, line.items.counts()) == ("bank", size, dict.fromkeys(range(4), 3))


def test_redrawn_classes_are_drawn_anew_before_every_task_and_nothing_is_carried(tmp_path):
    replay = replay_of(Redrawn, tmp_path, replay="redraw")
    learn(replay, 0), learn(replay, 1)
    counts = [(len(replay.past(replay.data.task(index))), replay.source.drawn) for index in (1, 2)]
    assert counts == [(6, 6), (12, 18)] and replay.carried() == []
    assert replay.newest(0)[0].endswith("task_0/redraw_2/0/0-0.png")


def test_features_are_made_anew_before_every_task_and_nothing_is_carried(tmp_path):
    replay = replay_of(Features, tmp_path, source=Centres)
    made = replay.past(replay.data.task(2))
    assert made.labels.tolist() == [label for label in range(4) for _ in range(3)] and replay.carried() == []
    assert made.tensor()[:3].tolist() == [[0, 0], [0, 1], [0, 2]] and replay.source.keys == {(7, "painter", 2)}


@pytest.mark.parametrize(
    ("kind", "keys", "count"),
    [
        (Replay, {}, 0),
        (Stored, {}, 6 * 3),  # all classes, once, for this source learns before the classifier, also the last task
        (Stored, {"syn_per_class": None}, 6 * 10),  # as many as there are real ones
        (Given, {"need_syn_imgs": False}, 4 * 3),  # all but the last task's classes must be there
        (Redrawn, {"replay": "redraw"}, (2 + 4) * 3),
        (Features, {}, (2 + 4) * 3),
    ],
)
def test_samples_that_a_run_will_draw_are_counted(tmp_path, kind, keys, count):
    assert replay_of(kind, tmp_path, **keys).expected() == count


def test_by_itself_it_is_no_replay(tmp_path):
    replay, real = replay_of(Replay, tmp_path), ImageSet()
    assert replay.present(replay.data.task(0), real) is real and len(replay.past(replay.data.task(1))) == 0
    assert replay.divide(5) == (5, 0) and replay.divide(None) == (0, 0)


@pytest.mark.parametrize(
    ("source", "synth", "own", "kind"),
    [
        (None, {}, None, Replay),
        (Painter, {}, None, Stored),
        (Painter, {"replay": "redraw"}, None, Redrawn),
        (Painter, {"need_syn_imgs": False}, None, Given),
        (Centres, {}, None, Features),
        (Painter, {}, Redrawn, Redrawn),  # a learner's own
    ],
)
def test_a_source_is_replayed_as_its_config_says_unless_the_learner_has_its_own_way(source, synth, own, kind):
    keys = {"model_name": "x", "dataset": "toy", "init_cls": 2, "increment": 2}
    config = RunConfig(**keys, synth=Painter.Config.parse({"name": "painter", **synth}))
    assert replay_kind(config, source, own) is kind
