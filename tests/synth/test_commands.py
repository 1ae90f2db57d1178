"""`python -m synth.train` and `python -m synth.sample`: what they write, and what they refuse in one message."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close

import main
from learners import LEARNERS
from synth import sample, train
from synth.command import FitConfig, pick_classes
from synth.train import Fitting
from tests.support.tiny_ldm import tiny_ldm_folder
from tests.support.toy import TINY_SOURCES, tiny_source, toy_images
from utils.data.images import encode_image
from utils.run.config import RunConfig
from utils.run.errors import ConfigError
from utils.run.folder import locked

NAMES = ["apple", "beaver", "cloud", "dolphin"]


def fill(folder: Path) -> None:
    """A data set of four classes of grey stripes and an experiment file."""
    images = toy_images(4, len(NAMES), "commands")
    for position, label in enumerate(images.labels.tolist()):
        for split in ("train", "test"):
            path = folder / "data" / "stripes" / split / NAMES[label] / f"{position}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_image(images.image(position), ".png"))
    write(folder / "exp.json", **tiny_source("ddpm"), fit_after_last_task=True)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to work in."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def half_fitted(tmp_path_factory) -> Path:
    """A folder whose source has learned two of the four classes."""
    folder = tmp_path_factory.mktemp("half_fitted")
    fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert fit("--task", "0") == 0
    return folder


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


def files(folder, pattern="*/*.png") -> dict[str, bytes]:
    found = sorted(path for path in Path(folder).glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def message(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


# ---------------------------------------------------------------------- train


@pytest.mark.parametrize("name", TINY_SOURCES)
def test_train_then_sample_gives_named_files(name, place):
    write("exp.json", **tiny_source(name))
    assert fit() == 0 and draw("--cond_class", "0,3") == 0
    assert [*files("drawn")] == [f"{label}/{label}-{i}.png" for label in (0, 3) for i in range(3)]
    manifest = json.loads(Path("drawn/manifest.json").read_text())
    order = json.loads(Path("fitted/data.json").read_text())["class_order"]
    assert manifest["classes"]["3"] == {"name": NAMES[order[3]], "original_id": order[3]}
    assert [*manifest["files"]] == [*files("drawn")] and Path("drawn/preview.png").exists()


def test_previews_bear_epoch_and_class(place):
    assert fit("--preview_every", "1") == 0
    # Three steps of 8 images: three epochs of 8 real ones, then two of 8 real and 6 replayed ones.
    epochs = {0: (1, 2, 3), 1: (1, 2, 3), 2: (1, 2), 3: (1, 2)}
    names = {f"sample_epoch{epoch:02d}_class{label:02d}.png" for label, done in epochs.items() for epoch in done}
    assert files("fitted/previews", "*").keys() == names


def test_fitted_source_is_that_of_the_run(place):
    assert main.main(["--config", "exp.json", "--name", "run", "--set", "seed=3"]) == 0 and fit() == 0
    for name in ("network", "generator"):
        of_run = load_file(f"outputs/run/seed_3/checkpoints/task_1/source/{name}.safetensors")
        assert_close(load_file(f"fitted/{name}.safetensors"), of_run, rtol=0, atol=0)


def test_a_training_that_was_cut_off_ends_with_the_same_bits(place, monkeypatch):
    def cut_off(self, task):
        if task.index == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Fitting, "_preview", cut_off)
        fit(folder="cut")
    assert not Path("cut/fitted.json").exists()
    assert fit(folder="cut") == 0 and fit() == 0
    assert files("cut", "*.safetensors") == files("fitted", "*.safetensors")


def test_a_fitted_folder_is_left_alone_and_other_settings_are_refused(place, capsys):
    assert fit() == 0
    before = files("fitted", "*")
    assert fit() == 0 and files("fitted", "*") == before
    assert fit("--set", "synth.lr=0.5") == 2
    assert "synth.lr is 0.0002 there, 0.5 here. Give another --ckpt_save_dir" in message(capsys)


def test_a_run_is_never_overwritten(place, capsys):
    Path("outputs/run/seed_3").mkdir(parents=True)
    assert fit("--overwrite", folder="outputs/run") == 2
    assert "run of main.py" in message(capsys) and Path("outputs/run/seed_3").exists()


@pytest.mark.parametrize("config", ['{"_class_name": "UNet2DModel"}', '{"written_by": "reprise"}', "{", None])
def test_a_folder_that_is_no_training_of_ours_is_never_overwritten(config, place, capsys):
    Path("model").mkdir()
    Path("model/weights.safetensors").write_bytes(b"precious")
    if config is not None:
        Path("model/config.json").write_text(config)
    before = files("model", "*")
    for flags in ([], ["--overwrite"]):
        assert fit(*flags, folder="model") == 2
        assert "model" in message(capsys) and files("model", "*") == before


def test_a_folder_that_another_process_fills_is_refused(place, capsys):
    with locked(Path("fitted")):
        assert fit() == 2 and fit("--overwrite") == 2
    assert "fitted belongs to a process that is running now" in capsys.readouterr().err
    assert not Path("fitted").exists() and fit() == 0


def test_one_task_alone_finds_the_vectors_of_the_whole_schedule(place):
    write("exp.json", **tiny_source("ldm"))
    assert fit() == 0 and fit("--task", "1", folder="second") == 0
    whole, second = (load_file(f"{folder}/class_embeddings.safetensors") for folder in ("fitted", "second"))
    assert second["labels"].tolist() == [2, 3]
    assert_close(second["vectors"], whole["vectors"][2:], rtol=0, atol=0)


def test_chosen_classes_keep_their_labels(place):
    assert fit("--classes", "0,3") == 0
    order = json.loads(Path("fitted/data.json").read_text())["class_order"]
    assert json.loads(Path("fitted/fitted.json").read_text())["classes"] == {str(i): NAMES[order[i]] for i in (0, 3)}


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
    error = message(capsys)
    assert all(word in error for word in words), error
    assert not Path("fitted").exists()


def test_learners_change_no_default_of_the_data_but_those_that_a_file_must_say():
    keys = FitConfig.parse({"dataset": "digits", "synth": {"name": "x"}}).identity().keys() & RunConfig.model_fields
    changed = {
        key
        for name in LEARNERS.names()
        for key in keys
        if LEARNERS[name].Config.model_fields[key].default != RunConfig.model_fields[key].default
    }
    assert changed <= {"shuffle", "few_shot_draw"}


# ---------------------------------------------------------------------- YAML


def test_yaml_with_a_section_names_data_and_source(place):
    section = {"dataset": "stripes", "device": "cpu", "synth": tiny_source("ddpm")}
    Path("exp.yaml").write_text(yaml.safe_dump({"model": {}, "reprise": section}))
    assert fit(config="exp.yaml") == 0
    stored = json.loads(Path("fitted/config.json").read_text())["config"]
    assert (stored["init_cls"], stored["shuffle"]) == (4, False)  # one task, the data set's own order
    assert [*json.loads(Path("fitted/fitted.json").read_text())["classes"].values()] == NAMES


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


# ---------------------------------------------------------------------- sample


@pytest.mark.parametrize(
    ("replay", "task", "drawn_by_the_run"),
    [("keep", 1, "task_1"), ("redraw", 0, "task_0/redraw_1")],  # redraw: old classes, in the name of the next task
)
def test_a_runs_checkpoint_draws_the_runs_own_images(replay, task, drawn_by_the_run, place):
    keys = ["--set", "seed=4", "--set", f"synth.replay={replay}"]
    assert main.main(["--config", "exp.json", "--name", "run", *keys]) == 0
    source, classes = f"outputs/run/seed_4/checkpoints/task_{task}/source", f"{2 * task},{2 * task + 1}"
    assert draw("--cond_class", classes, ckpt=source) == 0
    assert files("drawn") == files(f"outputs/syn_image_run_seed4/{drawn_by_the_run}")


def test_the_same_command_draws_only_what_is_missing(place):
    assert fit() == 0 and draw() == 0
    before, times = files("drawn"), {path: path.stat().st_mtime_ns for path in Path("drawn").glob("*/*.png")}
    Path("drawn/1/1-1.png").unlink()
    assert draw() == 0
    assert files("drawn") == before
    redrawn = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert redrawn == {"1-1.png", "1-2.png"}  # its chunk: four requests a time, in the order of the task's classes


def test_further_classes_and_images_join_those_that_are_there(place):
    assert fit() == 0 and draw("--cond_class", "0") == 0 and draw("--cond_class", "2", "--num_samples", "5") == 0
    manifest = json.loads(Path("drawn/manifest.json").read_text())
    assert [*manifest["classes"]] == ["0", "2"] and len(manifest["files"]) == 8


def test_images_of_other_settings_are_not_mixed(place, capsys):
    assert fit() == 0 and draw() == 0
    assert draw("--set", "synth.sampler=ddpm") == 2
    assert 'settings.sampler is "ddim" there, "ddpm" here. Give another --output_dir' in message(capsys)


def test_a_file_changes_the_drawing_of_a_fitted_source(place):
    assert fit() == 0 and draw() == 0
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
def test_mistakes_in_drawing_get_one_message_and_draw_nothing(arguments, words, half_fitted, monkeypatch, capsys):
    monkeypatch.chdir(half_fitted)
    assert draw(*arguments) == 2
    error = message(capsys)
    assert all(word in error for word in words), error
    assert not Path("drawn").exists()


def test_a_damaged_source_is_named(place, capsys):
    assert fit() == 0
    Path("fitted/network.safetensors").write_bytes(b"")
    assert draw() == 2 and "network.safetensors is missing or damaged" in message(capsys)


def test_a_source_without_any_class_is_named(place, capsys):
    write("exp.json", **{**tiny_source("small_controlnet"), "syn_per_class": 0})
    assert fit() == 0
    capsys.readouterr()
    assert draw() == 2 and "this source keeps no class" in message(capsys)
    assert not Path("drawn").exists()


@pytest.mark.parametrize("ckpt", ["task_1", "task_1/source"])
def test_a_checkpoint_of_which_a_byte_has_changed_draws_nothing(ckpt, place, capsys):
    assert main.main(["--config", "exp.json", "--name", "run", "--set", "seed=3"]) == 0
    spoilt = Path("outputs/run/seed_3/checkpoints/task_1/source/generator.safetensors")
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"\x07")
    capsys.readouterr()
    assert draw(ckpt=f"outputs/run/seed_3/checkpoints/{ckpt}") == 2
    assert "source/generator.safetensors is missing or damaged" in message(capsys) and not Path("drawn").exists()


def test_images_that_lie_beside_the_drawn_ones_are_not_taken_for_them(place):
    assert fit() == 0 and draw("--cond_class", "0") == 0
    before = Path("drawn/manifest.json").read_text(), Path("drawn/preview.png").read_bytes()
    for name in ("0-3.png", "0-1 - Copy.png"):
        Path("drawn/0", name).write_bytes(encode_image(toy_images(1, 1, "foreign").image(0), ".png"))
    assert draw("--cond_class", "0") == 0
    assert (Path("drawn/manifest.json").read_text(), Path("drawn/preview.png").read_bytes()) == before


# ---------------------------------------------------------------------- published models


def test_a_published_model_draws_from_embeddings_or_from_names(place):
    write("exp.json", **tiny_source("ldm"))
    assert fit() == 0 and draw(folder="own") == 0
    foreign = ["--config", "exp.json", "--num_samples", "3"]
    embeddings = ["--embeddings", "fitted/class_embeddings.safetensors"]
    assert draw(*foreign, *embeddings, ckpt=tiny_ldm_folder(), folder="found") == 0
    assert files("own") == files("found")
    assert draw(*foreign, ckpt=tiny_ldm_folder(), folder="named") == 0
    assert files("named").keys() == files("own").keys() and files("named") != files("own")
    assert json.loads(Path("named/manifest.json").read_text())["settings"]["inversion"] is False


# ---------------------------------------------------------------------- classes by id and by name


@pytest.mark.parametrize(
    ("wanted", "labels"),
    [
        ([], [0, 1, 3]),  # all that are known
        (["3", "0"], [0, 3]),
        (["dolphin", "Apple", 1], [0, 1, 3]),  # names in any case
        (["0", "apple"], [0]),
    ],
)
def test_classes_are_picked_by_id_or_name(wanted, labels):
    assert pick_classes(wanted, NAMES, {0, 1, 3}, "--classes") == labels


def test_a_class_that_is_not_known_is_not_picked():
    with pytest.raises(ConfigError, match=r"'cloud': no such class.* Known: 0 \(apple\), 1 \(beaver\), 3 \(dolphin\)"):
        pick_classes(["cloud"], NAMES, {0, 1, 3}, "--classes")
