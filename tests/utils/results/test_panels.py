"""Panels on disk: what is written is read, in order, and only when it is whole."""

from unittest.mock import Mock

import pytest
import torch

from utils.results.panels import Cell, Panel, PanelRow, Panels
from utils.run.errors import CheckpointError, DataError
from utils.training.run import Run
from utils.training.runtime import Runtime


def panel_of(title="Guided", seed=0, channels=3):
    pixels = torch.randint(256, (channels, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    rows = [PanelRow("3 cat", [Cell(pixels, "3: 93 %  ·  4: 2 %"), None])]
    return Panel(title, "Same noise.", ["unguided", "guided"], rows, part="Task 1")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_panel_is_read_as_it_was_written_in_place_of_an_older_one(tmp_path, channels):
    panel = panel_of(channels=channels)
    for each in (panel_of(seed=1), panel):
        Panels(tmp_path).write("guided_1", each)
    (found,) = Panels(tmp_path).read()
    words = [(each.title, each.note, each.columns, each.part, each.rows[0].name) for each in (found, panel)]
    cell, absent = found.rows[0].cells
    assert words[0] == words[1] and absent is None and cell.caption == "3: 93 %  ·  4: 2 %"
    torch.testing.assert_close(cell.image, panel.rows[0].cells[0].image, rtol=0, atol=0)


def test_numbers_in_names_order_panels_as_numbers(tmp_path):
    names = ["10_late", "guided", "guided_2", "guided_9_b", "guided_10_a", "guided_10_b"]
    for name in sorted(names):
        Panels(tmp_path).write(name, panel_of(title=name))
    # A name that begins with its number comes before those that begin with a word.
    assert [panel.title for panel in Panels(tmp_path).read()] == names


def test_a_panel_that_was_cut_off_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.results.panels.write_json", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Panels(tmp_path).write("guided_1", panel_of())
    assert (tmp_path / "guided_1" / "0-0.png").exists() and Panels(tmp_path).read() == []


def test_a_damaged_panel_is_named_with_what_to_do(tmp_path):
    Panels(tmp_path).write("guided_1", panel_of())
    (tmp_path / "guided_1" / "0-0.png").write_text("no image")
    with pytest.raises(DataError, match=r"guided_1/0-0\.png"):
        Panels(tmp_path).read()
    (tmp_path / "guided_1" / "panel.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"guided_1/panel\.json .* delete its folder"):
        Panels(tmp_path).read()


def test_a_row_has_a_cell_for_every_column():
    with pytest.raises(AssertionError, match=r"1 columns, cells per row \[2\]"):
        Panel("t", "n", ["only"], [PanelRow("r", [None, None])])


def test_a_run_keeps_panels_in_its_folder_and_only_the_main_process_writes(tmp_path):
    run = Run(tmp_path / "seed_1", 1, Runtime(["cpu"]), progress=False)
    Panels(run.folder / "panels", enabled=False).write("guided_1", panel_of())
    assert list(tmp_path.iterdir()) == [] and run.panels.read() == []
    run.panels.write("guided_1", panel_of())
    assert (tmp_path / "seed_1" / "panels" / "guided_1" / "panel.json").exists()
    assert len(run.panels.read()) == 1
