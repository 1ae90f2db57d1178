"""Tables and curves over runs, by their command."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from statistics import stdev

import pytest
from matplotlib.figure import Figure

from utils.results.compare import main
from utils.results.plot import Line, draw_line

ROOT = Path(__file__).parents[3]


def write_run(root, name, finals, **facts):
    """A run folder; a final accuracy of None stands for a seed that has only begun."""
    for seed, final in finals.items():
        (root / name / f"seed_{seed}").mkdir(parents=True)
        results = {
            "dataset": "digits", "task_sizes": [2, 2], "accuracy_matrix": [[90.0], [80.0, 70.0]],
            "final_accuracy": final, "average_incremental_accuracy": 88.5, "forgetting": 10.0,
            "seconds": {"total": 90.0},
            "memory_bytes": {"exemplars": 1024, "bank": 512, "source": None, "network": 10**9}, **facts,
        }  # fmt: skip
        if final is not None:
            (root / name / f"seed_{seed}" / "results.json").write_text(json.dumps(results))
    config = {"model_name": "wa", "dataset": "digits", "synth": {"name": "ddpm"}}
    (root / name / "config.json").write_text(json.dumps({"config": config}))
    return str(root / name)


@pytest.fixture
def run(tmp_path):
    """A finished run of one seed."""
    return write_run(tmp_path, "cifar_wa", {1: 50.0})


def test_training_time_is_compared_with_the_first_run_and_evaluation_does_not_count(tmp_path, capsys):
    real = write_run(tmp_path, "real", {1: 80.0, 2: 82.0}, seconds={"train": 40.0, "total": 90.0})
    short = write_run(tmp_path, "short", {1: 70.0}, seconds={"train": 10.0, "total": 80.0})
    old = write_run(tmp_path, "old", {1: 60.0})  # before trainings were timed
    rows = csv_of(capsys, real, short, old)
    assert [row["time_saved_mean"] for row in rows] == ["0.0", "75.0", ""]
    assert [row["training_mean"] for row in rows] == ["40.0", "10.0", ""]


def costs(evaluations, part="train"):
    """What a run says of its cost, all of it in one part."""
    return {"total": {part: {"evaluations": evaluations, "flops": 10**9, "seconds": 4.0, "peak_memory": 3 << 20}}}


def test_costs_are_compared_as_a_whole_or_part_by_part(tmp_path, capsys):
    cost = costs(1000)
    cost["total"] |= costs(500, "draw")["total"]
    run = write_run(tmp_path, "real", {1: 80.0, 2: 82.0}, cost=cost)
    old = write_run(tmp_path, "old", {1: 60.0})  # before costs were counted
    first, second = csv_of(capsys, run, old)
    assert (first["evaluations_mean"], first["flops_mean"]) == ("1500.0", "2000000000.0")
    assert first["peak_memory_mean"] == str(float(3 << 20)) and second["evaluations_mean"] == ""
    table = table_of(capsys, run, old, "--cost").splitlines()
    assert [line.split()[-8:] for line in table[2:]] == [
        [part, count, *unit, "1", "G", "4.0", "s", "3.0", "MiB"][-8:]
        for part, count, unit in (("train", "1", "k"), ("draw", "500", ""))
    ]
    train, draw = csv_of(capsys, run, old, "--cost")
    assert (train["part"], train["evaluations_mean"], draw["part"]) == ("train", "1000.0", "draw")
    assert main([old, "--cost"]) == 2 and "what its parts have cost" in capsys.readouterr().err


def table_of(capsys, *arguments):
    assert main(arguments) == 0
    return capsys.readouterr().out


def csv_of(capsys, *arguments):
    return list(csv.DictReader(table_of(capsys, *arguments, "--format", "csv").splitlines()))


def test_seeds_are_averaged_with_their_sample_deviation_which_one_seed_has_not(tmp_path, capsys, run):
    (one,) = csv_of(capsys, run)
    assert (one["final_accuracy_std"], float(one["replay_memory_bytes_mean"])) == ("", 1536)  # no classifier's bytes
    assert "1.5 KiB" in table_of(capsys, run) and "±" not in table_of(capsys, run)
    (three,) = csv_of(capsys, write_run(tmp_path, "cifar_three", {1: 50.0, 2: 53.0, 10: 55.0}))
    assert three["seeds"] == "1 2 10"
    assert float(three["final_accuracy_mean"]) == pytest.approx(158 / 3)
    assert float(three["final_accuracy_std"]) == pytest.approx(stdev([50, 53, 55]))


def test_few_shot_runs_have_columns_of_their_last_session_which_others_leave_empty(tmp_path, capsys):
    base, novel, harmonic = [90.0, 80.0], [None, 48.0], [None, 60.0]
    fscil = {"base": base, "novel": novel, "harmonic_mean": harmonic, "performance_drop": [0.0, 12.5]}
    run = write_run(tmp_path, "a_few", {1: 50.0}, fscil=fscil)
    head, _, row = table_of(capsys, run).splitlines()
    assert " ".join(head.split()).endswith("base (%) novel (%) harmonic mean (%) drop (pts)")
    assert row.split()[-4:] == ["80.00", "48.00", "60.00", "12.50"]
    write_run(tmp_path, "a_few", {2: 50.0}, fscil=fscil)
    write_run(tmp_path, "b_wa", {1: 50.0})
    few, wa = csv_of(capsys, str(tmp_path))
    assert (few["base_mean"], few["novel_std"], wa["base_mean"]) == ("80.0", "0.0", "")


@pytest.mark.parametrize("results", [None, {"accuracy_matrix": [[90.0]], "task_sizes": [2, 2], "final_accuracy": 1.0}])
def test_unfinished_seeds_are_marked_and_left_out_of_the_means(tmp_path, capsys, results):
    run = write_run(tmp_path, "cifar_wa", {1: 50.0, 2: None})
    if results:
        (tmp_path / "cifar_wa" / "seed_2" / "results.json").write_text(json.dumps(results))
    (row,) = csv_of(capsys, run)
    assert (row["seeds"], row["unfinished_seeds"], row["final_accuracy_mean"]) == ("1", "2", "50.0")
    assert "1, 2*" in table_of(capsys, run)


def test_runs_that_have_only_begun_are_listed_and_upper_bounds_say_so(tmp_path, capsys):
    text = table_of(capsys, write_run(tmp_path, "begun", {1: None}))
    assert "begun" in text and "wa" in text and "1*" in text
    assert "upper bound" in table_of(capsys, write_run(tmp_path, "joint", {1: 90.0}, upper_bound=True))


def test_text_columns_are_aligned(tmp_path, capsys):
    write_run(tmp_path, "a", {1: 5.0})
    write_run(tmp_path, "long_name", {1: 100.0, 2: 90.0})
    write_run(tmp_path, "other", {1: 10.0, 2: 30.0})
    head, rule, *rows = table_of(capsys, str(tmp_path)).splitlines()
    starts = [i for i in range(len(rule)) if rule[i] == "-" and rule[i - 1 : i] in ("", " ")]
    assert all(line[start - 1] == " " for line in (head, *rows) for start in starts[1:])
    assert rows[1].index("±") == rows[2].index("±")


def test_other_folders_and_files_are_skipped_quietly(tmp_path, capsys, run):
    (tmp_path / "syn_image_cifar_seed1" / "task_0").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("")
    rows = csv_of(capsys, *sorted(map(str, tmp_path.iterdir())))
    assert [row["run"] for row in rows] == ["cifar_wa"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_without_any_run_the_message_names_the_folder_and_the_code_is_2(tmp_path, capsys, folder):
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / folder)]) == 2
    assert folder in capsys.readouterr().err


DAMAGED = [b"", b'{"task_sizes": [2, 2], "accuracy', b"[]", b'"text"', b"null", b"\xff\xfe{}"]  # empty, cut, no object
FOREIGN_RESULTS = [  # objects, but none of ours
    b"{}",
    b'{"task_sizes": 4, "accuracy_matrix": [[90.0]]}',
    b'{"task_sizes": [2], "accuracy_matrix": [["good"]]}',
    b'{"task_sizes": [2], "accuracy_matrix": [[90.0]], "fscil": [1]}',
    b'{"task_sizes": [2], "accuracy_matrix": [[90.0]], "memory_bytes": {"bank": "much"}}',
]


@pytest.mark.parametrize(
    ("file", "contents"),
    [("config.json", [*DAMAGED, b'{"config": {"synth": 3}}']), ("seed_1/results.json", DAMAGED + FOREIGN_RESULTS)],
)
def test_a_damaged_or_foreign_file_is_named_in_one_line_with_what_to_do(tmp_path, capsys, run, file, contents):
    path = Path(run, file)
    for content in contents:
        path.write_bytes(content)
        assert main([str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {path} ") and line.endswith(f"delete {path.parent} and repeat the run")


def test_latex_has_booktabs_rules_and_escapes(tmp_path, capsys):
    write_run(tmp_path, "cifar_wa", {1: 50.0, 2: 52.0})
    text = table_of(capsys, str(tmp_path), "--format", "latex")
    plain = " ".join(text.split())
    assert r"cifar\_wa & wa & ddpm" in plain and r"51.00 $\pm$ 1.41" in plain and r"(\%)" in plain
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in rows} == {15}


def test_the_command_line_writes_the_table_to_a_file_without_loading_matplotlib(tmp_path, run):
    command = ["-X", "importtime", "-m", "utils.results.compare", run, "--output", str(tmp_path / "out" / "table.txt")]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout == b"" and b"utils.results.plot" in done.stderr and b"matplotlib" not in done.stderr
    assert "cifar_wa" in (tmp_path / "out" / "table.txt").read_text()


@pytest.mark.parametrize(("suffix", "start"), [(".pdf", b"%PDF"), (".png", b"\x89PNG"), (".SVG", b"<?xml")])
def test_curves_are_drawn_beside_the_table(tmp_path, capsys, suffix, start):
    run = write_run(tmp_path, "cifar_wa", {1: 70.0, 2: 70.0}, top1_curve=[90.0, 70.0])
    assert "cifar_wa" in table_of(capsys, run, "--plot", str(tmp_path / f"curves{suffix}"))
    content = (tmp_path / f"curves{suffix}").read_bytes()
    assert content.startswith(start)
    if suffix == ".pdf":  # venues refuse fonts of type 3
        assert b"/TrueType" in content or b"/Type0" in content or b"/CIDFontType2" in content
        assert b"/Type3" not in content


def test_lines_are_means_in_a_band_of_the_sample_deviation_which_one_seed_has_not():
    axes = Figure().add_subplot()
    draw_line(axes, Line("wa", [4, 2], [[90.0, 70.0]]))
    assert len(axes.lines) == 1 and not axes.collections
    draw_line(axes, Line("wa", [4, 2], [[90.0, 70.0], [92.0, 76.0]]))
    (_, line), (band,) = axes.lines, axes.collections
    assert line.get_xydata().tolist() == [[4, 91], [6, 73]]
    low, high = band.get_paths()[0].get_extents().intervaly
    assert (low, high) == pytest.approx((73 - stdev([70, 76]), 91 + stdev([90, 92])))


@pytest.mark.parametrize("name", ["curves.jpg", "curves"])
def test_another_kind_of_figure_is_refused_before_anything_is_read(tmp_path, capsys, name):
    assert main([str(tmp_path / "absent"), "--plot", name]) == 2
    output = capsys.readouterr()
    assert output.err == f"error: cannot draw {name}: its name must end in .pdf, .png or .svg\n" and output.out == ""


def test_runs_without_a_finished_seed_are_named_and_not_drawn(tmp_path, capsys):
    write_run(tmp_path, "begun", {1: None})
    assert main([str(tmp_path), "--plot", str(tmp_path / "curves.pdf")]) == 2
    assert "no seed of begun has finished" in capsys.readouterr().err
    write_run(tmp_path, "done", {1: 70.0}, top1_curve=[90.0, 70.0])
    assert main([str(tmp_path), "--plot", str(tmp_path / "curves.pdf")]) == 0
    assert "no seed has finished: begun" in capsys.readouterr().err
