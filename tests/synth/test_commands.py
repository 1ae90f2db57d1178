"""`python -m synth.train` and `python -m synth.sample`: what they write, and what they refuse in one message."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close

import main
from learners import LEARNERS
from synth import SOURCES, sample, train
from synth.command import FitConfig, pick_classes
from synth.train import Fitting
from tests.support.disk import contents
from tests.support.sources import write_folders
from tests.support.tiny_ldm import tiny_ldm_folder
from tests.support.toy import TINY_SOURCES, tiny_source, toy_images
from utils.data.images import encode_image
from utils.run.config import RunConfig
from utils.run.errors import ConfigError
from utils.run.files import read_json
from utils.run.lock import locked

NAMES = ["apple", "beaver", "cloud", "dolphin"]


def fill(folder: Path) -> None:
    """A data set of four classes of grey stripes and an experiment file."""
    write_folders(folder / "data" / "stripes", toy_images(4, len(NAMES), "commands"), NAMES)
    write(folder / "exp.json", **tiny_source("ddpm"), fit_after_last_task=True)


@pytest.fixture
def place(tmp_path, monkeypatch) -> None:
    """Work in a folder with nothing else."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A place with a finished source, one that has learned two of the four classes, and a run of the same seed."""
    folder = tmp_path_factory.mktemp("made")
    fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert fit("--preview_every", "1") == fit("--task", "0", folder="half") == start_run() == 0
    return folder


@pytest.fixture
def finished(made, tmp_path, monkeypatch) -> None:
    """Work in a copy of it."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "copy"))


def write(path: str | Path, /, **synth) -> None:
    """An experiment with two tasks of two classes."""
    keys = {
        "model_name": "finetune", "dataset": "stripes", "shuffle": True, "init_cls": 2, "increment": 2, "seed": [3, 4],
        "device": "cpu", "precision": "fp32", "convnet_type": "resnet20", "init_epoch": 1, "epochs": 1,
    }  # fmt: skip
    Path(path).write_text(json.dumps({**keys, "synth": synth}))


def fit(*arguments, config="exp.json", folder="fitted") -> int:
    return train.main(["--config", config, "--ckpt_save_dir", folder, *arguments])


def draw(*arguments, ckpt="fitted", folder="drawn") -> int:
    return sample.main(["--ckpt", ckpt, "--output_dir", folder, "--num_samples", "3", *arguments])


def start_run(*overrides) -> int:
    return main.main(["--config", "exp.json", "--name", "run", "--set", "seed=3", *overrides])


files, read = partial(contents, pattern="*/*.png"), partial(read_json, remedy="")


def message(capsys, *words: str) -> str:
    """The one line of an error, which holds these words."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words), error
    return error


@pytest.mark.parametrize("name", [name for name in TINY_SOURCES if SOURCES[name].samples == "images"])
def test_train_then_sample_gives_named_files(name, place):
    write("exp.json", **tiny_source(name))
    assert fit() == 0 and draw("--cond_class", "0,3") == 0
    assert [*files("drawn")] == [f"{label}/{label}-{i}.png" for label in (0, 3) for i in range(3)]
    manifest, order = read("drawn/manifest.json"), read("fitted/data.json")["class_order"]
    assert manifest["classes"]["3"] == {"name": NAMES[order[3]], "original_id": order[3]}
    assert [*manifest["files"]] == [*files("drawn")] and Path("drawn/preview.png").exists()


def test_previews_bear_epoch_and_class(made):
    # Three steps of 8 images: three epochs of 8 real ones, then two of 8 real and 6 replayed ones.
    epochs = {0: (1, 2, 3), 1: (1, 2, 3), 2: (1, 2), 3: (1, 2)}
    names = {f"sample_epoch{epoch:02d}_class{label:02d}.png" for label, done in epochs.items() for epoch in done}
    assert files(made / "fitted" / "previews", pattern="*").keys() == names


def test_fitted_source_is_that_of_the_run(finished):
    for name in ("network", "generator"):
        of_run = load_file(f"outputs/run/seed_3/checkpoints/task_1/source/{name}.safetensors")
        assert_close(load_file(f"fitted/{name}.safetensors"), of_run, rtol=0, atol=0)


def test_a_training_that_was_cut_off_ends_with_the_same_bits(finished, monkeypatch):
    def cut_off(self, task):
        if task.index == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Fitting, "_preview", cut_off)
        assert fit(folder="cut") == 130  # as at Ctrl-C
    assert not Path("cut/fitted.json").exists() and fit(folder="cut") == 0
    assert files("cut", pattern="*.safetensors") == files("fitted", pattern="*.safetensors")


def test_a_fitted_folder_is_left_alone_and_other_settings_or_another_process_are_refused(finished, capsys):
    before = files("fitted", pattern="*")
    assert fit() == 0 and not Path("fitted/sources").exists()  # without keep_sources
    assert fit("--set", "synth.lr=0.5") == 2
    assert "synth.lr is 0.0002 there, 0.5 here. Give another --ckpt_save_dir" in message(capsys)
    with locked(Path("fitted")):
        assert fit() == 2 and fit("--overwrite") == 2
    assert "fitted belongs to a process that is running now" in capsys.readouterr().err
    assert fit() == 0 and files("fitted", pattern="*") == before


@pytest.mark.parametrize("config", ['{"_class_name": "UNet2DModel"}', '{"written_by": "reprise"}', "{", None])
def test_a_folder_that_is_no_training_of_ours_is_never_overwritten(config, finished, capsys):
    Path("model").mkdir()
    Path("model/weights.safetensors").write_bytes(b"precious")
    if config is not None:
        Path("model/config.json").write_text(config)
    before = files("model", pattern="**/*"), files("outputs/run", pattern="**/*")
    for flags in ([], ["--overwrite"]):
        assert fit(*flags, folder="model") == 2 and "model" in message(capsys)
        assert fit(*flags, folder="outputs/run") == 2 and "run of main.py" in message(capsys)
    assert (files("model", pattern="**/*"), files("outputs/run", pattern="**/*")) == before


def test_one_task_alone_finds_the_vectors_of_the_whole_schedule(place):
    write("exp.json", **tiny_source("ldm"))
    assert fit() == 0 and fit("--task", "1", folder="second") == 0
    whole, second = (load_file(f"{folder}/class_embeddings.safetensors") for folder in ("fitted", "second"))
    assert second["labels"].tolist() == [2, 3]
    assert_close(second["vectors"], whole["vectors"][2:], rtol=0, atol=0)


def test_chosen_classes_keep_their_labels(place):
    assert fit("--classes", "0,3") == 0
    order = read("fitted/data.json")["class_order"]
    assert read("fitted/fitted.json")["classes"] == {str(i): NAMES[order[i]] for i in (0, 3)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--classes", "beavr"], ["--classes 'beavr'", "did you mean 'beaver'"]),
        (["--classes", "4"], ["'4'", "Known: 0 ("]),
        (["--task", "2"], ["--task 2", "0 to 1"]),
        (["--task", "1", "--classes", "0"], ["--task", "--classes"]),
        (["--set", "kshto=5"], ["kshto", "did you mean 'kshot'"]),
        (["--set", "synth.lrr=1"], ["synth.lrr", "did you mean 'lr'"]),
        (["--set", "synth=null"], ["--set synth.name=ddpm"]),
        (["--set", "shuffle=null"], ["'shuffle'", "finetune", "--set shuffle="]),  # the learner would decide
        (["--dataset", "stripe"], ["unknown data set 'stripe'"]),
        (["--config", "nothing.json"], ["nothing.json"]),
        (["--config", "nothing.yaml"], ["nothing.yaml"]),
    ],
)
def test_mistakes_get_one_message_and_write_nothing(arguments, words, place, capsys):
    assert fit(*arguments) == 2
    assert message(capsys, *words) and not Path("fitted").exists()


def test_learners_change_no_default_of_the_data_but_those_that_a_file_must_say():
    keys = FitConfig.parse({"dataset": "digits", "synth": {"name": "x"}}).identity().keys() & RunConfig.model_fields
    for fields in (LEARNERS[name].Config.model_fields for name in LEARNERS.names()):
        changed = {key for key in keys if fields[key].default != RunConfig.model_fields[key].default}
        assert changed <= {"shuffle", "few_shot_draw"}


def test_yaml_with_a_section_names_data_and_source(place):
    section = {"dataset": "stripes", "device": "cpu", "synth": tiny_source("ddpm")}
    Path("exp.yaml").write_text(yaml.safe_dump({"model": {}, "reprise": section}))
    assert fit(config="exp.yaml") == 0
    stored = read("fitted/config.json")["config"]
    assert (stored["init_cls"], stored["shuffle"]) == (4, False)  # one task, the data set's own order
    assert [*read("fitted/fitted.json")["classes"].values()] == NAMES


def test_yaml_without_a_section_is_of_the_source_ldm_and_needs_a_data_set(place, capsys):
    Path("exp.yaml").write_text(yaml.safe_dump({"model": {}}))
    assert fit(config="exp.yaml") == 2 and "--dataset" in message(capsys)
    tiny = {**tiny_source("ldm"), "yaml": None}
    overrides = [word for key, value in tiny.items() for word in ("--set", f"synth.{key}={json.dumps(value)}")]
    assert fit("--dataset", "stripes", "--device", "cpu", *overrides, config="exp.yaml") == 0
    assert load_file("fitted/class_embeddings.safetensors")["vectors"].shape == (4, 32)


@pytest.mark.parametrize("text", ["model: [", "- a\n- b", "reprise: 3"])
def test_a_broken_yaml_is_named(text, place, capsys):
    Path("exp.yaml").write_text(text)
    assert fit(config="exp.yaml") == 2 and "exp.yaml" in message(capsys)


@pytest.mark.parametrize(
    ("replay", "task", "drawn_by_the_run"),
    [("keep", 1, "task_1"), ("redraw", 0, "task_0/redraw_1")],  # redraw: old classes, in the name of the next task
)
def test_a_runs_checkpoint_draws_the_runs_own_images(replay, task, drawn_by_the_run, finished):
    assert replay == "keep" or start_run("--set", "synth.replay=redraw", "--overwrite") == 0
    source, classes = f"outputs/run/seed_3/checkpoints/task_{task}/source", f"{2 * task},{2 * task + 1}"
    assert draw("--cond_class", classes, ckpt=source) == 0
    assert files("drawn") == files(f"outputs/syn_image_run_seed3/{drawn_by_the_run}")


def test_the_same_command_draws_only_what_is_missing(finished):
    assert draw() == 0
    before, times = files("drawn"), {path: path.stat().st_mtime_ns for path in Path("drawn").glob("*/*.png")}
    Path("drawn/1/1-1.png").unlink()
    assert draw() == 0 and files("drawn") == before
    redrawn = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert redrawn == {"1-1.png", "1-2.png"}  # its chunk: four requests a time, in the order of the task's classes


def test_other_settings_draw_otherwise_and_into_another_folder(finished, capsys):
    assert draw() == 0 and draw("--set", "synth.sampler=ddpm") == 2
    assert 'settings.sampler is "ddim" there, "ddpm" here. Give another --output_dir' in message(capsys)
    Path("other.json").write_text(json.dumps({"synth": {"name": "ddpm", "sampler": "ddpm"}}))
    assert draw("--config", "other.json", folder="other") == 0
    assert files("other").keys() == files("drawn").keys() and files("other") != files("drawn")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cond_class", "beavr"], ["--cond_class 'beavr'"]),
        (["--cond_class", "3"], ["'3'", "Known: 0 ("]),  # there, but not learned
        (["--dataset", "digits"], ["fitted with dataset='stripes'", "'digits'"]),
        (["--set", "synth.name=ldm"], ["'ldm'"]),
        (["--embeddings", "x.safetensors"], ["--embeddings"]),
        (["--ckpt", "nothing"], ["--ckpt nothing holds no fitted source", "--config or --dataset"]),
        (["--ckpt", "nothing", "--config", "exp.json"], ["--ckpt nothing holds no fitted source"]),
    ],
)
def test_mistakes_in_drawing_get_one_message_and_draw_nothing(arguments, words, made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    assert draw(*arguments, ckpt="half") == 2
    assert message(capsys, *words) and not Path("drawn").exists()


@pytest.mark.parametrize(
    ("ckpt", "spoilt"),
    [
        ("fitted", "fitted/network.safetensors"),
        ("outputs/run/seed_3/checkpoints/task_1", "outputs/run/seed_3/checkpoints/task_1/source/generator.safetensors"),
        ("outputs/run/seed_3/checkpoints/task_1/source", "outputs/run/seed_3/checkpoints/task_1/source/source.json"),
    ],
)
def test_a_source_of_which_a_byte_has_changed_draws_nothing_and_is_named(ckpt, spoilt, finished, capsys):
    Path(spoilt).write_bytes(Path(spoilt).read_bytes()[:-1] + b"\x07")
    assert draw(ckpt=ckpt) == 2
    assert f"{spoilt} is missing or damaged" in message(capsys) and not Path("drawn").exists()


def test_a_source_without_any_class_is_named(place, capsys):
    write("exp.json", **{**tiny_source("small_controlnet"), "syn_per_class": 0})
    assert fit() == 0
    capsys.readouterr()
    assert draw() == 2 and message(capsys, "this source keeps no class") and not Path("drawn").exists()


def test_further_images_join_those_that_are_there_and_others_are_not_taken_for_them(finished):
    assert draw("--cond_class", "0") == 0
    before = files("drawn", pattern="*.*")
    for name in ("0-3.png", "0-1 - Copy.png"):
        Path("drawn/0", name).write_bytes(encode_image(toy_images(1, 1, "foreign").image(0), ".png"))
    assert draw("--cond_class", "0") == 0
    assert files("drawn", pattern="*.*") == before and before.keys() == {"manifest.json", "preview.png"}
    assert draw("--cond_class", "2", "--num_samples", "5") == 0
    assert [*read("drawn/manifest.json")["classes"]] == ["0", "2"] and len(read("drawn/manifest.json")["files"]) == 8


def test_a_published_model_draws_from_embeddings_or_from_names(place):
    write("exp.json", **tiny_source("ldm"))
    assert fit() == 0 and draw(folder="own") == 0
    foreign = ["--config", "exp.json", "--num_samples", "3"]
    embeddings = ["--embeddings", "fitted/class_embeddings.safetensors"]
    assert draw(*foreign, *embeddings, ckpt=tiny_ldm_folder(), folder="found") == 0
    assert files("own") == files("found")
    assert draw(*foreign, ckpt=tiny_ldm_folder(), folder="named") == 0
    assert files("named").keys() == files("own").keys() and files("named") != files("own")
    assert read("named/manifest.json")["settings"]["inversion"] is False


def test_classes_are_picked_by_id_or_name_in_any_case_and_an_unknown_one_is_named():
    pick = partial(pick_classes, class_names=NAMES, known={0, 1, 3}, what="--classes")
    assert pick([]) == pick(["dolphin", "Apple", 1]) == [0, 1, 3]  # without any: all that are known
    assert pick(["3", "0"]) == [0, 3] and pick(["0", "apple"]) == [0]
    with pytest.raises(ConfigError, match=r"'cloud': no such class.* Known: 0 \(apple\), 1 \(beaver\), 3 \(dolphin\)"):
        pick(["cloud"])
