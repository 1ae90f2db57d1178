"""The page of a run: what it tells, what it leaves out, and that it needs nothing else."""

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from PIL import Image

from utils.results.figures import Chart, human_bytes, human_count, human_seconds
from utils.results.gallery import GalleryRow
from utils.results.panels import Cell, Panel, PanelRow
from utils.results.report import write_report
from utils.run.errors import DataError

MEMORY = {"exemplars": 1536, "bank": 0, "source": 2 << 20, "network": 4096, "all_real_data": 4 << 20}
FEW_SHOT = {"base": [90.0, 80.5], "novel": [None, 33.3], "harmonic_mean": [None, 47.1], "performance_drop": [0.0, 21.2]}
PIXELS = torch.zeros(3, 8, 8, dtype=torch.uint8)
UNITS = {"unit_bytes": 3072.0, "real": 180, "compressed": 480, "compressed_units": 20.0, "nominal": 200.0}


class Balance(HTMLParser):
    """Keeps the tags that are open, and fails where another one closes."""

    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for key, value in attributes if key in ("src", "href")]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def results_of(num_tasks, per_task=2, **changes):
    matrix = [[90.0 - 5 * (i - j) for j in range(i + 1)] for i in range(num_tasks)]
    curve = [sum(row) / len(row) for row in matrix]
    num_classes = num_tasks * per_task
    return {
        "name": "digits_wa", "model_name": "wa", "source": "ddpm", "dataset": "digits", "seed": 1993,
        "task_sizes": [per_task] * num_tasks, "class_names": [f"class {i}" for i in range(num_classes)],
        "accuracy_matrix": matrix, "top1_curve": curve, "top5_curve": [100.0] * num_tasks, "nme_top1_curve": None,
        "average_incremental_accuracy": 87.25, "final_accuracy": curve[-1], "forgetting": 12.5,
        "per_class_accuracy": [77.0] * num_classes, "train_counts": [144] * num_classes, "memory_bytes": MEMORY,
        "seconds": {"train": 60.0, "generate": 10.0, "total": 100.0}, "command": "python main.py --set a=<b>",
    } | changes  # fmt: skip


def page_of(tmp_path, results, config=None, gallery=(), **more):
    write_report(tmp_path / "report.html", results, config or {}, gallery, **more)
    page = (tmp_path / "report.html").read_text()
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    return page, parser.sources


@pytest.mark.parametrize(
    ("results", "shown", "absent"),
    [
        (  # who ran what; a run without few shots has no such section
            results_of(3),
            ["digits_wa", "learner wa", "replay source ddpm", "dataset digits", "seed 1993", "3 tasks, 6 classes"],
            ["Few-shot sessions"],
        ),
        ({}, ["no replay source"], []),  # results with nothing in them still make a page
        (results_of(2), ["1.5 KiB", "2.0 MiB", "50.0 %", "all real training data", "4.0 MiB"], []),
        (  # frozen weights are no memory of the past, and the source's bar is still measured by the real data
            results_of(2, memory_bytes={**MEMORY, "frozen": 327 << 20}),
            ["frozen weights, not counted as memory of the past", "327.0 MiB", "2.0 MiB with bank and source",
             'style="width:50.00%"'],
            [],
        ),
        (  # the source is split; what the run has not is left out
            {"memory_bytes": {"source": 9, "edge_maps": 9, "class_embeddings": 0, "old_branches": 0, "total": 3584}},
            ["of it: edge maps", "total, from exemplars to prototypes", "3.5 KiB"],
            ["class embeddings", "branches"],
        ),
        (  # an unknown kind is shown by its name
            {"memory_bytes": {"soft_labels": 2048, "unused_kind": 0}},
            ['<td class="text">soft labels</td><td class="n">2.0 KiB</td>'],
            ["unused"],
        ),
        (  # exemplars are also counted in raw images
            results_of(2, memory_units={**UNITS, "true": 191.25}),
            ["in raw images of 3.0 KiB", '>real exemplars</td><td class="n">180</td>', "191.25",
             '>compressed exemplars</td><td class="n">480</td>', '>units, nominally</td><td class="n">200</td>'],
            [],
        ),
        (results_of(2, memory_units={**dict.fromkeys(UNITS, 0), "unit_bytes": 64.0}), [], ["in raw images"]),
        (  # few-shot sessions have a table, a curve and a headline
            results_of(2, fscil=FEW_SHOT | {"group_old": [90.0, 80.4]}),
            [">80.5</td>", ">33.3</td>", ">47.1</td>", ">21.2</td>",
             'aria-label="base, novel, harmonic mean over session"',
             "<b>47.1 %</b><small>base 80.5 %, novel 33.3 %</small>"],
            [],
        ),
        (  # a first session alone has no curve and no harmonic mean
            results_of(1, fscil={name: values[:1] for name, values in FEW_SHOT.items()}),
            ["Few-shot sessions"],
            ["over session", "<span>Harmonic mean"],
        ),
        (results_of(2, long_tail={"many": 71.5, "medium": 2.0, "few": None}), ["71.5", "many training images"], []),
        (results_of(2, upper_bound=True, task_sizes=[2, 2, 2]), ["upper bound", "unfinished: 2 of 3 tasks"], []),
        (  # the forgetting of classes stands beside that of tasks
            results_of(2, class_forgetting=13.14),
            ["<b>12.5 pts</b><small>mean over tasks, 13.1 over classes</small>"],
            ["<small>mean over earlier tasks</small>"],
        ),
        (results_of(2, class_forgetting=None), ["<small>mean over earlier tasks</small>"], []),
        (  # validation has a line of its own, without points where it is unknown
            results_of(3, val_top1_curve=[None, 71.5, 66.25]),
            ['aria-label="top-1, top-5, val top-1 over classes seen"', "held-out training images",
             '<td class="n">–</td></tr>', "<title>71.50 %</title>"],
            [],
        ),
        # the heat map has numbers for twenty tasks and none for a hundred
        ({"accuracy_matrix": [[50.0] * (i + 1) for i in range(20)]}, ['after task 1: 50.00 %">50.0</td>'], []),
        ({"accuracy_matrix": [[50.0] * (i + 1) for i in range(100)]}, [], ['after task 1: 50.00 %">50.0</td>']),
        (results_of(1, environment={"torch": "2.9.1"}), ["2.9.1"], []),
    ],
)  # fmt: skip
def test_the_page_shows_what_the_results_say_and_nothing_else(tmp_path, results, shown, absent):
    page, _ = page_of(tmp_path, results)
    assert [words for words in shown if words not in page] == []
    assert [words for words in absent if words in page] == []


def test_beside_results_the_page_shows_exact_settings_with_dots_the_environment_and_no_empty_gallery(tmp_path):
    config = {"weight_decay": 2e-4, "seed": [1, 2], "synth": {"name": "ddpm", "steps": 1000}}
    gallery = [GalleryRow(0, "zero", 0, [], [])]
    page, _ = page_of(tmp_path, results_of(1), config, gallery, environment={"torch": "2.9.1"})
    assert all(words in page for words in ("0.0002", "[1, 2]", "synth.name", ">1000<", "2.9.1"))
    assert "Real and generated images" not in page


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    gallery = [GalleryRow(0, "zero", 0, [PIXELS[:1]], [])]
    page, sources = page_of(tmp_path, results_of(3), gallery=gallery)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")


@pytest.mark.parametrize("num_tasks", [1, 2, 20, 60])
def test_every_number_of_tasks_has_a_page(tmp_path, num_tasks):
    page, _ = page_of(tmp_path, results_of(num_tasks))
    assert page.count('<td class="v"') == num_tasks * (num_tasks + 1) // 2
    assert ("classes seen</text>" in page) == (num_tasks > 1)


def test_any_missing_or_null_result_is_left_out(tmp_path):
    results = results_of(2)
    for key in results:
        without = {name: value for name, value in results.items() if name != key} | {"unknown": {"nested": [1]}}
        for changed in (results | {key: None}, without):
            assert page_of(tmp_path, changed)[0].rstrip().endswith("</html>"), key


def test_text_of_users_and_words_of_panels_cannot_become_html(tmp_path):
    gallery = [GalleryRow(0, "<i>g", 0, [PIXELS], [])]
    panel = Panel("<i>t", "<i>n", ["<i>k"], [PanelRow("<i>r", [Cell(PIXELS, "<i>w")])], part="<i>s")
    results = results_of(1, name="<i>n", class_names=["<i>c", "d"])
    page, _ = page_of(tmp_path, results, {"prefix": "<i>p"}, gallery, panels=[panel])
    assert not re.search("<i>[a-z]", page)
    assert "python main.py --set a=&lt;b&gt;" in page and "&lt;i&gt;t" in page


def test_small_images_are_exact_and_crisp_and_large_ones_reduced(tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "large.png")
    gallery = [GalleryRow(3, "cat", 1, [PIXELS, PIXELS[:1]], [tmp_path / "large.png", str(tmp_path / "large.png")])]
    page, sources = page_of(tmp_path, results_of(2), gallery=gallery)
    assert [source[:15] for source in sources] == ["data:image/png;"] * 2 + ["data:image/jpeg"] * 2
    assert page.count('class="pixels"') == 2 and "3 cat" in page


ROW = PanelRow("3 cat", [Cell(PIXELS, "3: 93 %"), Cell(PIXELS)])


def panel_of(title="Guided", note="Same noise.", rows=(ROW,), part=""):
    return Panel(title, note, ["unguided", "guided"], rows, part)


def test_panels_show_their_words_and_crisp_images(tmp_path):
    page, sources = page_of(tmp_path, results_of(2), panels=[panel_of(part="Task 1")])
    shown = ("<h2>Guided</h2><p>Same noise.</p>", "<h3>Task 1</h3>", "3 cat", "unguided", "3: 93 %")
    assert all(words in page for words in shown)
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


def test_a_broken_image_is_named_and_leaves_no_file(tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(DataError, match=r"broken\.png"):
        page_of(tmp_path, results_of(1), gallery=[GalleryRow(0, "zero", 0, [tmp_path / "broken.png"], [])])
    assert not (tmp_path / "report.html").exists()


def test_long_tables_stand_in_two_columns(tmp_path):
    for num_classes, tables in ((12, 1), (13, 2)):
        assert page_of(tmp_path, {"per_class_accuracy": [50.0] * num_classes})[0].count("<table>") == tables


def test_lines_fall_where_accuracy_falls_and_skip_unknown_values():
    (points,) = Chart({"top-1": [100.0, None, 60.0]}, [2, 4, 6], "classes seen").lines()
    (left, high, _), (right, low, _) = points
    assert left < right and high < low


def test_names_at_the_ends_of_lines_never_overlap():
    chart = Chart({"a": [50.0, 50.0], "b": [50.0, 50.1], "c": [50.0, 49.9]}, [1, 2], "classes seen")
    ys = [y for *_, y in chart.end_labels()]
    assert len(ys) == 3 and min(b - a for a, b in pairwise(ys)) >= 17


@pytest.mark.parametrize(
    ("write", "number", "text"),
    [
        (human_bytes, 0, "0 B"),
        (human_bytes, 1023, "1023 B"),
        (human_bytes, 1536, "1.5 KiB"),
        (human_bytes, 3 << 20, "3.0 MiB"),
        (human_bytes, 1 << 50, "1024.0 TiB"),
        (human_count, 0, "0"),
        (human_count, 999, "999"),
        (human_count, 999.6, "1 k"),
        (human_count, 20_349_000, "20.3 M"),
        (human_count, 4.1e12, "4.1 T"),
        (human_count, 2e18, "2 E"),
        (human_seconds, 0.04, "0.0 s"),
        (human_seconds, 4.21, "4.2 s"),
        (human_seconds, 102, "102 s"),
        (human_seconds, 660, "11 min"),
        (human_seconds, 11100, "3 h 05 min"),
    ],
)
def test_bytes_counts_and_times_are_written_for_people(write, number, text):
    assert write(number) == text


@pytest.mark.parametrize(
    ("whose", "words"), [("GPU", "allocated on the GPU."), ("process", "the resident set of the process")]
)
def test_costs_are_shown_by_part_as_a_whole_and_task_by_task(tmp_path, whose, words):
    one = {"evaluations": 20_349_000, "flops": 41 * 10**11, "seconds": 102.0, "peak_memory": 3 << 20}
    tasks = [{"train": one, "rehearse": one}, {"evaluate": one}]
    cost = {"total": {**tasks[0], **tasks[1]}, "tasks": tasks, "peak_memory_of": whose}
    page, _ = page_of(tmp_path, results_of(2, cost=cost))
    section = page[page.index("<h2>Cost</h2>") :]
    assert words in section and "draw for the source&#39;s own training" in section
    assert [section.count(text) for text in ("20.3 M", "4.1 T", "102 s", "3.0 MiB")] == [6, 6, 6, 6]
    assert "<h2>Cost</h2>" not in page_of(tmp_path, results_of(2))[0]
