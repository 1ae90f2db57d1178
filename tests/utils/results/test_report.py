"""The page of a run: what it tells, what it leaves out, and that it needs nothing else."""

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from PIL import Image

from utils.results.figures import Chart, human_bytes, human_seconds
from utils.results.gallery import GalleryRow
from utils.results.panels import Cell, Panel, PanelRow
from utils.results.report import write_report
from utils.run.errors import DataError

VOID = {"meta", "img", "link", "br"}


class Balance(HTMLParser):
    """Keeps the tags that are open, and fails where another one closes."""

    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for key, value in attributes if key in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def results_of(num_tasks, per_task=2, **changes):
    matrix = [[90.0 - 5 * (i - j) for j in range(i + 1)] for i in range(num_tasks)]
    curve = [sum(row) / len(row) for row in matrix]
    num_classes = num_tasks * per_task
    return {
        "name": "digits_wa",
        "model_name": "wa",
        "source": "ddpm",
        "dataset": "digits",
        "seed": 1993,
        "task_sizes": [per_task] * num_tasks,
        "class_names": [f"class {i}" for i in range(num_classes)],
        "accuracy_matrix": matrix,
        "top1_curve": curve,
        "top5_curve": [100.0] * num_tasks,
        "nme_top1_curve": None,
        "average_incremental_accuracy": 87.25,
        "final_accuracy": curve[-1],
        "forgetting": 12.5,
        "per_class_accuracy": [77.0] * num_classes,
        "train_counts": [144] * num_classes,
        "memory_bytes": {"exemplars": 1536, "bank": 0, "source": 2 << 20, "network": 4096, "all_real_data": 4 << 20},
        "seconds": {"train": 60.0, "generate": 10.0, "total": 100.0},
        "command": "python main.py --set a=<b>",
    } | changes


def page_of(tmp_path, results, config=None, gallery=(), **more):
    write_report(tmp_path / "report.html", results, config or {}, gallery, **more)
    page = (tmp_path / "report.html").read_text()
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    return page, parser.sources


def test_the_page_tells_who_ran_what(tmp_path):
    page, _ = page_of(tmp_path, results_of(3))
    for words in ("digits_wa", "learner wa", "replay source ddpm", "dataset digits", "seed 1993", "3 tasks, 6 classes"):
        assert words in page


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    gallery = [GalleryRow(0, "zero", 0, [torch.zeros(1, 8, 8, dtype=torch.uint8)], [])]
    page, sources = page_of(tmp_path, results_of(3), gallery=gallery)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")


@pytest.mark.parametrize("num_tasks", [1, 2, 20, 60])
def test_every_number_of_tasks_has_a_page(tmp_path, num_tasks):
    page, _ = page_of(tmp_path, results_of(num_tasks))
    assert page.count('<td class="v"') == num_tasks * (num_tasks + 1) // 2
    assert ("classes seen</text>" in page) == (num_tasks > 1)


def test_results_with_nothing_in_them_still_make_a_page(tmp_path):
    page, _ = page_of(tmp_path, {})
    assert "no replay source" in page


@pytest.mark.parametrize("key", sorted(results_of(2)))
def test_any_missing_or_null_result_is_left_out(tmp_path, key):
    results = results_of(2)
    without = {name: value for name, value in results.items() if name != key} | {"unknown": {"nested": [1]}}
    for changed in (results | {key: None}, without):
        page, _ = page_of(tmp_path, changed)
        assert page.rstrip().endswith("</html>")


def test_text_of_users_cannot_become_html(tmp_path):
    gallery = [GalleryRow(0, "<i>g", 0, [torch.zeros(3, 4, 4, dtype=torch.uint8)], [])]
    page, _ = page_of(tmp_path, results_of(1, name="<i>n", class_names=["<i>c", "d"]), {"prefix": "<i>p"}, gallery)
    assert not re.search("<i>[ncpg]", page)
    assert "python main.py --set a=&lt;b&gt;" in page


def test_settings_are_exact_and_nested_keys_have_dots(tmp_path):
    page, _ = page_of(tmp_path, {}, {"weight_decay": 2e-4, "seed": [1, 2], "synth": {"name": "ddpm", "steps": 1000}})
    for words in ("0.0002", "[1, 2]", "synth.name", ">1000<"):
        assert words in page


@pytest.mark.parametrize("given", ["argument", "results"])
def test_the_environment_comes_from_the_argument_or_the_results(tmp_path, given):
    environment = {"torch": "2.9.1"}
    more, argument = ({}, environment) if given == "argument" else ({"environment": environment}, None)
    assert "2.9.1" in page_of(tmp_path, results_of(1, **more), environment=argument)[0]


def test_memory_stands_beside_all_real_data(tmp_path):
    page, _ = page_of(tmp_path, results_of(2))
    for words in ("1.5 KiB", "2.0 MiB", "50.0 %", "all real training data", "4.0 MiB"):
        assert words in page


FEW_SHOT = {
    "base": [90.0, 80.5],
    "novel": [None, 33.3],
    "harmonic_mean": [None, 47.1],
    "performance_drop": [0.0, 21.2],
    "group_old": [90.0, 80.4],
}


def test_few_shot_sessions_have_a_table_a_curve_and_a_headline(tmp_path):
    page, _ = page_of(tmp_path, results_of(2, fscil=FEW_SHOT))
    assert all(f">{value}</td>" in page for value in ("80.5", "33.3", "47.1", "21.2"))
    assert 'aria-label="base, novel, harmonic mean over session"' in page
    assert "<b>47.1 %</b><small>base 80.5 %, novel 33.3 %</small>" in page


def test_a_first_session_alone_has_no_curve_and_no_harmonic_mean(tmp_path):
    page, _ = page_of(tmp_path, results_of(1, fscil={name: values[:1] for name, values in FEW_SHOT.items()}))
    assert "Few-shot sessions" in page and "over session" not in page and "<span>Harmonic mean" not in page


def test_runs_without_few_shots_have_no_such_section(tmp_path):
    assert "Few-shot sessions" not in page_of(tmp_path, results_of(2, fscil=None))[0]


def test_long_tailed_figures_are_shown(tmp_path):
    page, _ = page_of(tmp_path, results_of(2, long_tail={"many": 71.5, "medium": 2.0, "few": None}))
    assert "71.5" in page and "many training images" in page


def test_frozen_weights_stand_in_the_memory_table_but_not_in_the_memory_of_the_past(tmp_path):
    memory = results_of(2)["memory_bytes"]
    page, _ = page_of(tmp_path, results_of(2, memory_bytes={**memory, "frozen": 327 << 20}))
    assert "frozen weights, not counted as memory of the past" in page and "327.0 MiB" in page
    assert "2.0 MiB with bank and source" in page
    assert 'style="width:50.00%"' in page  # the source's bar is still measured by the real data


def test_the_memory_table_splits_the_source_and_adds_up_leaving_out_what_the_run_has_not(tmp_path):
    memory = {"exemplars": 1536, "source": 2048, "edge_maps": 2048, "class_embeddings": 0, "old_branches": 0}
    page, _ = page_of(tmp_path, results_of(2, memory_bytes={**memory, "total": 3584}))
    assert "of it: edge maps" in page and "total, from exemplars to prototypes" in page and "3.5 KiB" in page
    assert "class embeddings" not in page and "branches" not in page


def test_exemplars_are_also_shown_in_raw_images(tmp_path):
    units = {"unit_bytes": 3072.0, "real": 180, "compressed": 480, "compressed_units": 20.0, "nominal": 200.0}
    page, _ = page_of(tmp_path, results_of(2, memory_units={**units, "true": 191.25}))
    assert "in raw images of 3.0 KiB" in page
    for name, value in (("real exemplars", "180"), ("compressed exemplars", "480"), ("units, nominally", "200")):
        assert f'>{name}</td><td class="n">{value}</td>' in page
    assert "191.25" in page


def test_a_run_without_exemplars_shows_no_units(tmp_path):
    units = dict.fromkeys(("real", "compressed", "compressed_units", "nominal", "true"), 0)
    assert "in raw images" not in page_of(tmp_path, results_of(2, memory_units={"unit_bytes": 64.0, **units}))[0]


def test_upper_bounds_and_unfinished_runs_say_so(tmp_path):
    page, _ = page_of(tmp_path, results_of(2, upper_bound=True, task_sizes=[2, 2, 2]))
    assert "upper bound" in page and "unfinished: 2 of 3 tasks" in page


def test_small_images_are_exact_and_crisp_and_large_ones_reduced(tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "large.png")
    small = torch.zeros(1, 8, 8, dtype=torch.uint8)
    gallery = [GalleryRow(3, "cat", 1, [small, small], [tmp_path / "large.png", str(tmp_path / "large.png")])]
    page, sources = page_of(tmp_path, results_of(2), gallery=gallery)
    assert [source[:15] for source in sources] == ["data:image/png;"] * 2 + ["data:image/jpeg"] * 2
    assert page.count('class="pixels"') == 2 and "3 cat" in page


def test_without_images_there_is_no_gallery(tmp_path):
    page, _ = page_of(tmp_path, results_of(2), gallery=[GalleryRow(0, "zero", 0, [], [])])
    assert "Real and generated images" not in page


PIXELS = torch.zeros(3, 8, 8, dtype=torch.uint8)


def panel_of(title="Guided", **changes):
    values = {"note": "Same noise.", "columns": ["unguided", "guided"]}
    rows = [PanelRow("3 cat", [Cell(PIXELS, "3: 93 %"), Cell(PIXELS)])]
    return Panel(**{"title": title, "rows": rows, **values, **changes})


def test_panels_show_their_words_and_crisp_images(tmp_path):
    page, sources = page_of(tmp_path, results_of(2), panels=[panel_of(part="Task 1")])
    for words in ("<h2>Guided</h2><p>Same noise.</p>", "<h3>Task 1</h3>", "3 cat", "unguided", "3: 93 %"):
        assert words in page
    assert page.count('class="pixels"') == len(sources) == 2


def test_panels_of_one_title_and_note_share_a_section(tmp_path):
    panels = [panel_of(part="Task 1"), panel_of(part="Task 2"), panel_of("Copies"), panel_of("Copies", note="Others.")]
    page, _ = page_of(tmp_path, results_of(2), panels=panels)
    assert [page.count(f"<h2>{title}</h2>") for title in ("Guided", "Copies")] == [1, 2]
    assert page.index("<h2>Guided</h2>") < page.index("Task 1") < page.index("Task 2") < page.index("<h2>Copies</h2>")


def test_a_cell_without_an_image_keeps_its_place(tmp_path):
    page, sources = page_of(tmp_path, {}, panels=[panel_of(rows=[PanelRow("3 cat", [None, Cell(PIXELS)])])])
    assert page.count("<figure>") == 2 and len(sources) == 1
    assert page.index("unguided</span><i></i>") < page.index("<span>guided</span><img")


def test_words_of_panels_cannot_become_html(tmp_path):
    row = PanelRow("<i>r", [Cell(PIXELS, "<i>c")])
    page, _ = page_of(tmp_path, {}, panels=[Panel("<i>t", "<i>n", ["<i>k"], [row], part="<i>p")])
    assert not re.search("<i>[rctnkp]", page) and "&lt;i&gt;t" in page


def test_the_forgetting_of_classes_stands_beside_that_of_tasks(tmp_path):
    page, _ = page_of(tmp_path, results_of(2, class_forgetting=13.14))
    assert "<b>12.5 pts</b><small>mean over tasks, 13.1 over classes</small>" in page
    assert "<small>mean over earlier tasks</small>" in page_of(tmp_path, results_of(2, class_forgetting=None))[0]


def test_a_broken_image_is_named_and_leaves_no_file(tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(DataError, match=r"broken\.png"):
        page_of(tmp_path, results_of(1), gallery=[GalleryRow(0, "zero", 0, [tmp_path / "broken.png"], [])])
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("num_tasks", "has_numbers"), [(20, True), (100, False)])
def test_the_heat_map_has_numbers_for_twenty_tasks_and_none_for_a_hundred(tmp_path, num_tasks, has_numbers):
    page, _ = page_of(tmp_path, {"accuracy_matrix": [[50.0] * (i + 1) for i in range(num_tasks)]})
    assert ('after task 1: 50.00 %">50.0</td>' in page) == has_numbers


def test_lines_fall_where_accuracy_falls_and_skip_unknown_values():
    (points,) = Chart({"top-1": [100.0, None, 60.0]}, [2, 4, 6], "classes seen").lines()
    (left, high, _), (right, low, _) = points
    assert left < right and high < low


def test_names_at_the_ends_of_lines_never_overlap():
    chart = Chart({"a": [50.0, 50.0], "b": [50.0, 50.1], "c": [50.0, 49.9]}, [1, 2], "classes seen")
    ys = [y for *_, y in chart.end_labels()]
    assert len(ys) == 3 and min(b - a for a, b in pairwise(ys)) >= 17


def test_validation_has_a_line_of_its_own_without_points_where_it_is_unknown(tmp_path):
    page, _ = page_of(tmp_path, results_of(3, val_top1_curve=[None, 71.5, 66.25]))
    assert 'aria-label="top-1, top-5, val top-1 over classes seen"' in page and "held-out training images" in page
    assert '<td class="n">–</td></tr>' in page and "<title>71.50 %</title>" in page


@pytest.mark.parametrize(("num_classes", "tables"), [(12, 1), (13, 2)])
def test_long_tables_stand_in_two_columns(tmp_path, num_classes, tables):
    assert page_of(tmp_path, {"per_class_accuracy": [50.0] * num_classes})[0].count("<table>") == tables


def test_memory_of_an_unknown_kind_is_shown_by_its_name(tmp_path):
    page, _ = page_of(tmp_path, {"memory_bytes": {"soft_labels": 2048, "unused_kind": 0}})
    assert '<td class="text">soft labels</td><td class="n">2.0 KiB</td>' in page and "unused" not in page


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (1 << 50, "1024.0 TiB")]
)
def test_bytes_are_written_for_people(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (4.21, "4.2 s"), (102, "102 s"), (660, "11 min"), (11100, "3 h 05 min")]
)
def test_times_are_written_for_people(seconds, text):
    assert human_seconds(seconds) == text
