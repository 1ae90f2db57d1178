"""`python -m synth.evaluate` and `evaluate_replay`: what is measured of which images, and what is refused."""

import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

import main
from learners.run.quality import drawn_images
from synth import evaluate, sample
from synth.accuracy_score import score_images
from synth.extractors import Extractor, load_extractor
from tests.support.sources import write_folders
from tests.support.toy import tiny_source, toy_dataset, toy_experiment, toy_images, without_cost
from utils.data.images import ImageSet, encode_image
from utils.run.files import read_json as read
from utils.training.runtime import Runtime

NAMES = ["apple", "beaver", "cloud", "dolphin"]
BANK, RUN = "outputs/syn_image_run_seed3", "outputs/run"
SOURCE = f"{RUN}/seed_3/checkpoints/task_1/source"
read_json = partial(read, remedy="")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A place with a data set of four classes and a run of two tasks that was told to measure its replay."""
    folder = tmp_path_factory.mktemp("made")
    write_folders(folder / "data" / "stripes", toy_images(24, len(NAMES), "evaluate"), NAMES)
    keys = {
        "model_name": "finetune", "dataset": "stripes", "shuffle": True, "init_cls": 2, "increment": 2, "seed": 3,
        "device": "cpu", "precision": "fp32", "convnet_type": "resnet20", "init_epoch": 1, "epochs": 1,
        "synth": {**tiny_source("ddpm"), "fit_after_last_task": True, "syn_per_class": 12, "sample_batch": 24},
        "evaluate_replay": True,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("exp.json").write_text(json.dumps(keys))
        assert main.main(["--config", "exp.json", "--name", "run"]) == 0
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> None:
    """Work in a copy of it."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "copy"))


def measure(*arguments: str) -> int:
    return evaluate.main([*arguments, "--device", "cpu"])


def message(capsys, *words: str) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words), error
    return error


def write_images(images: ImageSet, folder: str, of: str = "{label}/{i}.png") -> None:
    """Images as another program leaves them."""
    for i, label in enumerate(images.labels.tolist()):
        path = Path(folder, of.format(label=NAMES[label], i=i))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(images.image(i), ".png"))


def test_a_runs_replay_is_measured_by_its_own_classifier_and_stays_whole(place, capsys):
    assert measure(BANK) == 0
    found, shown = read_json(f"{BANK}/measures.json"), capsys.readouterr().out
    assert found["num_images"] == 48 and "all 96 train images" in found["against"]
    assert found["extractor"].startswith("resnet20@") and f"recall[{found['extractor']}]" in shown
    precision, distance = found["overall"]["precision"], found["overall"]["FD"]
    assert (precision["n_fake"], precision["n_real"], precision["repeats"]) == (48, 48, 5) and precision["real"] > 0.9
    assert distance["value"] is None and "needs 65 images" in distance["reason"]  # of resnet20's 64 features
    assert found["per_class"]["0"]["recall"]["n_real"] == 12 and "apple" in shown
    assert main.main(["--config", "exp.json", "--name", "run", "--set", "log_with=null"]) == 0  # it knows its images
    assert sample.main(["--ckpt", SOURCE, "--output_dir", "look", "--num_samples", "2"]) == 0


def test_a_run_that_is_told_to_measures_its_replay_beside_its_forgetting(made):
    results = read_json(made / RUN / "seed_3" / "results.json")
    quality, order = results["replay_quality"], results["class_order"]
    assert [row["name"] for row in quality["per_class"]] == [NAMES[original] for original in order]
    lost = [row["forgetting"] for row in quality["per_class"]]
    assert lost[2:] == [None, None] and sum(lost[:2]) / 2 == pytest.approx(results["class_forgetting"])
    report = (made / RUN / "seed_3" / "report.html").read_text()
    assert "Replay quality" in report and f"recall[{quality['extractor']}]" in report


def test_the_run_and_the_command_see_the_same_network(place):
    assert measure(BANK) == 0
    in_run = read_json(f"{RUN}/seed_3/results.json")["replay_quality"]
    assert in_run["extractor"] == read_json(f"{BANK}/measures.json")["extractor"]
    near = [each["overall"]["nearest"]["value"] for each in (in_run, read_json(f"{BANK}/measures.json"))]
    assert near[0] == pytest.approx(near[1], rel=1e-4)  # the one that no draw changes


def test_results_of_other_runs_are_the_same_and_a_resumed_one_keeps_its_measures(tmp_path):
    keys = {"init_cls": 3, "increment": 3, "init_epoch": 1, "epochs": 1}
    plain = toy_experiment("finetune", tmp_path / "plain", "ddpm", **keys).learn_all()
    told = toy_experiment("finetune", tmp_path / "told", "ddpm", evaluate_replay=True, **keys).learn_all()
    assert plain["replay_quality"] is None and told["replay_quality"]["overall"]
    assert "Replay quality" not in Path(tmp_path, "plain/outputs/toy/seed_7/report.html").read_text()
    assert without_cost({**told, "replay_quality": None}) == without_cost(plain)
    again = toy_experiment("finetune", tmp_path / "told", "ddpm", evaluate_replay=True, **keys)
    again.dataset = None  # nothing is looked at again
    assert again.learn_all()["replay_quality"] == told["replay_quality"]


def test_a_source_that_keeps_no_images_is_asked_for_as_many_as_a_task_would_be():
    source = SimpleNamespace(samples="images", fitted_classes={1}, config=SimpleNamespace(name="x", syn_per_class=None))
    source.generate = lambda requests: toy_images(6, 2, "asked").select(requests.labels.tolist()[:1])
    run = SimpleNamespace(seed=7, timed=lambda what: nullcontext())
    replay, data = SimpleNamespace(newest=lambda label: [], source=source), SimpleNamespace(class_counts=[6, 6])
    learner = SimpleNamespace(replay=replay, run=run, data=data)
    assert len(drawn_images(learner, 1)) == 6 and len(drawn_images(learner, 0)) == 0  # which it has not learned
    source.samples = "features"
    assert len(drawn_images(learner, 1)) == 0


def test_a_source_draws_equally_many_of_each_class(place):
    arguments = ["--ckpt", SOURCE, "--output_dir", "look", "--num_samples", "5", "--json", "out/found.json"]
    assert measure(*arguments) == 0
    found = read_json("out/found.json")
    assert {own["KD"]["n_fake"] for own in found["per_class"].values()} == {5} and not Path("look/.measures").exists()
    assert found["per_class"]["0"]["recall"]["reason"].startswith("needs 7 images")


def test_a_drawn_folder_of_no_run_needs_an_extractor(place, capsys):
    assert sample.main(["--ckpt", SOURCE, "--output_dir", "look", "--num_samples", "8"]) == 0
    capsys.readouterr()
    assert measure("look") == 2 and message(capsys, "IMAGES look", "--extractor")
    assert measure("look", "--extractor", RUN) == 0 and read_json("look/measures.json")["num_images"] == 32


def test_real_images_of_another_program_are_no_further_than_real_ones(place):
    write_images(toy_images(12, 4, "others"), "mine")
    assert measure(BANK) == measure("mine", "--dataset", "stripes", "--extractor", f"{RUN}/seed_3") == 0
    noise, real = (read_json(f"{folder}/measures.json")["overall"] for folder in (BANK, "mine"))
    assert real["precision"]["value"] > 0.7 > noise["precision"]["value"]
    assert 0 < real["nearest"]["value"] < noise["nearest"]["value"] and real["KD"]["value"] < noise["KD"]["value"]


def test_a_classifier_learns_from_the_images_alone():
    dataset = toy_dataset(num_classes=3, per_class=64)
    learned, told_wrong = (
        score_images(images, dataset, 6, 0, Runtime(["cpu"], "fp32"))
        for images in (dataset.train, dataset.train.relabelled((dataset.train.labels + 1) % 3))
    )
    assert len(learned) == len(dataset.test) and learned.mean() > 90 and told_wrong.mean() < 10


def test_a_flat_folder_is_compared_as_a_whole(place):
    write_images(toy_images(12, 4, "others"), "flat", "{i}.png")
    assert measure("flat", "--dataset", "stripes", "--extractor", RUN, "--cas_epochs", "1") == 0
    found = read_json("flat/measures.json")
    assert found["per_class"] == {} and found["overall"]["precision"]["n_fake"] == 48
    assert "not known" in found["overall"]["CAS"]["reason"]


def test_a_long_tail_is_judged_by_groups_against_balanced_images(place):
    description = f"{RUN}/seed_3/data.json"
    stored = read_json(description)
    Path(description).write_text(json.dumps({**stored, "counts": [150, 150, 19, 5]}))
    assert measure(BANK) == 0
    groups = read_json(f"{BANK}/measures.json")["groups"]
    assert groups.keys() == {"many", "few"} and groups["few"]["precision"]["n_real"] == 24


def test_real_features_are_computed_once_and_again_if_the_file_is_damaged(place, monkeypatch):
    seen, look = [], Extractor.__call__
    monkeypatch.setattr(Extractor, "__call__", lambda self, images: seen.append(len(images)) or look(self, images))
    assert measure(BANK) == measure(BANK) == 0
    assert seen == [96, 48, 48]  # real ones, of which both splits are the same here; generated ones; those alone
    first = read_json(f"{BANK}/measures.json")
    spoilt = next(Path(BANK, ".measures").glob("*.safetensors"))
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"\x07")
    assert measure(BANK) == 0 and sorted(seen[3:]) == [48, 96] and read_json(f"{BANK}/measures.json") == first


def test_any_network_may_look_and_gives_its_name(place, tmp_path):
    network = timm.create_model("test_resnet", pretrained=False)
    torch.save(network.state_dict(), "mine.pth")
    extractor = load_extractor("test_resnet=mine.pth", toy_dataset(), Runtime(["cpu"], "fp32"))
    seen = extractor(toy_dataset().test)
    assert extractor.name.startswith("test_resnet@") and len(extractor.name) == len("test_resnet@") + 6
    assert len(seen.values) == len(toy_dataset().test) and seen.logits is None
    with torch.no_grad():
        network.conv1[0].weight.zero_()
    torch.save(network.state_dict(), "mine.pth")
    assert load_extractor("test_resnet=mine.pth", toy_dataset(), Runtime(["cpu"], "fp32")).name != extractor.name


def test_only_inception_with_its_file_gives_what_is_called_fid(place, monkeypatch):
    from torch_fidelity import FeatureExtractorInceptionV3

    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        torch.save({}, "empty.pth")
        layers = ["2048", "logits_unbiased"]
        network = FeatureExtractorInceptionV3("inception", layers, feature_extractor_weights_path="empty.pth")
    torch.save(network.state_dict(), "inception.pth")
    images = toy_images(1, 2, "inception")
    found = load_extractor("inception=inception.pth", toy_dataset(), Runtime(["cpu"], "fp32"))(images)
    expected = network(torch.stack([images.image(i) for i in range(2)]).expand(-1, 3, -1, -1).contiguous())
    torch.testing.assert_close([found.values, found.logits], list(expected))


def test_a_network_of_the_learners_own_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    toy_experiment("der", tmp_path, init_cls=3, increment=3, init_epoch=1, epochs=1).learn_all()
    write_images(toy_images(2, 2, "der"), "mine")
    write_folders(Path("data/stripes"), toy_images(4, 2, "der"), NAMES[:2])
    capsys.readouterr()
    assert measure("mine", "--dataset", "stripes", "--extractor", "outputs/toy") == 2
    assert message(capsys, "does not fit a resnet20 with a head", "network of its own", "--extractor")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["give either IMAGES or --ckpt"]),
        (["nothing"], ["IMAGES nothing: there is no such folder"]),
        (["empty", "--dataset", "stripes", "--extractor", RUN], ["IMAGES empty holds no image", ".png"]),
        (["mine", "--extractor", RUN], ["IMAGES mine", "give --dataset"]),
        (["mine", "--dataset", "stripes"], ["--extractor"]),
        (["wrong", "--dataset", "stripes", "--extractor", RUN], ["class folder 'aple'", "did you mean 'apple'"]),
        ([BANK, "--repeats", "2"], ["--repeats 2", "at least 5"]),
        ([BANK, "--k", "0"], ["--k 0"]),
        ([BANK, "--extractor", "nothing"], ["--extractor nothing", "unknown backbone"]),
        ([BANK, "--extractor", "resnet20"], ["--extractor resnet20", "resnet20=FILE"]),
        ([BANK, "--extractor", "inception"], ["--extractor inception", "use a file that ends in"]),
        ([BANK, "--extractor", "inception=other.pth"], ["other.pth does not fit Inception-v3"]),
        ([BANK, "--extractor", "vgg16=other.pth"], ["other.pth does not fit torchvision's vgg16"]),
        ([BANK, "--extractor", "resnet20=other.pth"], ["other.pth does not fit"]),
        ([BANK, "--extractor", "vgg16=pickle.pth"], ["pickle.pth"]),
        ([BANK, "--extractor", "empty"], ["--extractor empty", "config.json is missing"]),
        ([BANK, "--dataset", "few"], ["a class 3", "few has 2 classes", "--dataset"]),
    ],
)  # fmt: skip
def test_mistakes_get_one_message_and_write_nothing(arguments, words, place, capsys):
    write_images(toy_images(2, 2, "others"), "mine")
    write_images(toy_images(2, 1, "others"), "wrong", "aple/{i}.png")
    write_folders(Path("data/few"), toy_images(2, 2, "few"), NAMES[:2])
    Path("empty").mkdir()
    torch.save({"weight": torch.zeros(2)}, "other.pth")
    torch.save(toy_images(1, 1, "pickle"), "pickle.pth")
    assert measure(*arguments) == 2
    assert message(capsys, *words) and not list(Path().glob("**/measures.json"))


@pytest.mark.parametrize("spoil", ["cut", "foreign", "order", "image"])
def test_a_damaged_list_of_images_is_named(spoil, place, capsys):
    manifest = Path(BANK, "task_0", "manifest.json")
    content = read_json(manifest)
    if spoil == "image":
        Path(BANK, "task_0", next(iter(content["files"]))).unlink()
    elif spoil == "cut":
        manifest.write_text(manifest.read_text()[:50])
    else:
        manifest.write_text(json.dumps({**content, **({"kind": "x"} if spoil == "foreign" else {"class_order": [0]})}))
    assert measure(BANK) == 2 and message(capsys, "task_0", "draw the images again")


def test_replay_is_measured_only_where_there_is_some(tmp_path, capsys):
    Path(tmp_path, "exp.json").write_text(json.dumps({"model_name": "finetune", "dataset": "digits", "init_cls": 2,
                                                      "increment": 2, "evaluate_replay": True}))  # fmt: skip
    assert main.main(["--config", str(tmp_path / "exp.json")]) == 2
    assert message(capsys, "evaluate_replay=true", "add synth")
