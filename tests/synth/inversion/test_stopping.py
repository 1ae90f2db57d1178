"""A search that ends by DVAR's rule: when, with which bits, and what is kept of it."""

import logging

import pytest
import torch
from torch.testing import assert_close

from synth.inversion.stopping import fixed_batches, settled
from tests.support.tiny_inversion import fitted, make_inversion, toy_task

# A training of 24 steps that the rule ends on its way.
STOPPING = {"g_local_train_steps": 24, "stop_ratio": 0.9, "stop_window": 3, "stop_every": 2}
FALLING = [8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.1]


@pytest.mark.parametrize(
    ("losses", "window", "ratio", "done"),
    [
        (FALLING, 3, 0.1, True),  # variance 0.0033 of the last three, 6.8 of all
        (FALLING[:4], 3, 0.1, False),  # still on its way
        (FALLING[:4], 3, 0.5, True),  # 2.3 of 9.6
        (FALLING, 7, 0.99, False),  # nothing before the window
        ([1.0] * 9, 3, 0.9, False),  # what never moved cannot have settled
        ([], 3, 0.9, False),
    ],
)
def test_a_loss_has_settled_when_its_window_varies_little_beside_all_of_it(losses, window, ratio, done):
    assert settled(losses, window, ratio) is done


def test_fixed_batches_are_whole_and_show_every_class_before_any_twice():
    labels = torch.tensor([5, 5, 5, 2, 2, 9, 9, 9])
    moments = torch.stack([torch.arange(8.0), torch.full((8,), 7.0)], 1).view(8, 1, 2, 1, 1)
    batches = fixed_batches(moments, labels, 2, torch.device("cpu"))
    assert [batch.labels.tolist() for batch in batches] == [[2, 5], [9, 2]]
    assert torch.cat([batch.images.flatten() for batch in batches]).tolist() == [3, 0, 5, 4]  # means, never 7


def test_a_stopped_search_is_the_beginning_of_the_whole_one_and_says_how_long_it_was(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("reprise"), "propagate", True)
    caplog.set_level(logging.INFO, "reprise")
    stopped = fitted(tmp_path / "stopped", **STOPPING)
    steps = stopped.search_steps[0]
    assert 6 < steps < 24 and stopped.search_steps == {0: steps, 1: steps}
    assert f"took {steps} of 24 steps" in caplog.text
    plain = fitted(tmp_path / "plain", g_local_train_steps=steps)
    assert_close(stopped.vectors, plain.vectors, rtol=0, atol=0)
    assert plain.search_steps == {}


def test_its_steps_are_kept_beside_the_vectors_and_added_over_rounds(tmp_path):
    source = fitted(tmp_path, **STOPPING, com_round_gen=2)
    source.save(tmp_path / "saved")
    other = make_inversion(tmp_path)
    other.load(tmp_path / "saved")
    assert other.search_steps == source.search_steps
    assert 12 < source.search_steps[0] <= 48
    assert other.fingerprint() == source.fingerprint()


def test_one_that_was_cut_off_or_had_ended_goes_on_with_the_same_bits(tmp_path):
    whole = fitted(tmp_path / "whole", **STOPPING)
    for stop in range(1, whole.search_steps[0], 3):
        broken, number = make_inversion(tmp_path / str(stop), **STOPPING), 0
        broken.run.checkpoint_every, loss = 2, broken.loss

        def loss_until(*args, loss=loss, stop=stop, **kw):
            nonlocal number
            number += torch.is_grad_enabled()  # evaluations of the fixed loss have no gradient
            if number > stop:
                raise KeyboardInterrupt
            return loss(*args, **kw)

        broken.loss = loss_until
        with pytest.raises(KeyboardInterrupt):  # stands for the end of the process
            broken.fit_before(*toy_task())
        again = fitted(tmp_path / str(stop), **STOPPING)
        assert_close(again.vectors, whole.vectors, rtol=0, atol=0)
        assert again.search_steps == whole.search_steps
    after = fitted(tmp_path / "whole", **STOPPING)  # killed when the search was over, but the task was not
    assert_close(after.vectors, whole.vectors, rtol=0, atol=0)
    assert after.search_steps == whole.search_steps
