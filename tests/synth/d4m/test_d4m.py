"""Distilling by Stable Diffusion and by our own model: prompts, prototypes, streams, soft labels."""

import json
from types import SimpleNamespace

import pytest
import torch
from timm.data import ImageNetInfo
from torch.utils.data import BatchSampler, RandomSampler

from learners.er import ER
from models.frozen import weight_bytes
from synth.d4m.files import read_prompts, read_prototypes, write_prototypes
from synth.d4m.matching import SoftBatches, SoftLabels, shown_batch
from synth.drawing import ImageFolder
from synth.prompts import class_words
from synth.requests import Requests
from synth.samplers import sample_scheduler
from tests.support.sources import fitted, make_source
from tests.support.tiny_ldm import tiny_stable_diffusion
from tests.support.toy import tiny_source, toy_dataset, toy_experiment, toy_images
from utils.data.batches import ImageBatches, Loading
from utils.data.images import ImageSet
from utils.data.manager import DataManager, Split
from utils.data.transforms import classifier_transform
from utils.run.errors import BankError, ConfigError
from utils.run.files import load_tensors, save_tensors
from utils.training.run import Run
from utils.training.runtime import Runtime

NAMES = ["apple", "sea lion", "computer keyboard"]


# ---------------------------------------------------------------------- prompts and prototypes of D4M's own files


def label_file(folder, text):
    path = folder / "labels.txt"
    path.write_bytes(text.encode())
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        "apple\nsea lion, mammal\ncomputer keyboard\n",
        "apple\t0\r\nsea lion, mammal\t1\r\ncomputer keyboard\t2\r\n",  # what follows a tab is not read
        "apple\nsea lion, mammal\ncomputer keyboard\n\n\n",
    ],
)
def test_a_line_is_the_prompt_of_the_class_of_its_number(text, tmp_path):
    prompts = read_prompts(label_file(tmp_path, text), NAMES)
    assert prompts == {"apple": "apple", "sea lion": "sea lion, mammal", "computer keyboard": "computer keyboard"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("apple\nsea lion\n", "has 2 lines, but there are 3 classes"),
        ("apple\nsea lion\nkeyboard\nlamp\n", "has 4 lines"),
        ("apple\nseal\nseal\n", r"lines \[2, 3\] are all 'seal'"),
        ("apple\n\nkeyboard\n", "line 2 is empty"),
        # The order of super-classes, or of a sorted file: two of three prompts would go to the wrong images.
        (
            "apple\ncomputer_keyboard\nSea Lion\n",
            r"2 lines name another class: line 2 'computer_keyboard' \| class 'sea lion'",
        ),
    ],
)
def test_a_label_file_that_does_not_fit_the_classes_is_refused(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_prompts(label_file(tmp_path, text), NAMES)


CIFAR100_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm"""


def test_every_class_of_cifar100_gets_the_prompt_of_its_own_line(tmp_path):
    classes = CIFAR100_NAMES.split()
    lines = [f"a photo of a {name.replace('_', ' ')}" for name in classes]
    assert list(read_prompts(label_file(tmp_path, "\n".join(lines)), classes).items()) == list(zip(classes, lines))
    names = [name.replace("_", " ") for name in classes]
    assert list(read_prompts(label_file(tmp_path, "\n".join(names)), classes).values()) == names
    with pytest.raises(ConfigError, match=r"99 lines name another class: line 1 'beaver' \| class 'apple'"):
        # D4M's own begins with the aquatic mammals; here the last class alone stays where it belongs.
        read_prompts(label_file(tmp_path, "\n".join([*names[4:99], *names[:4], names[99]])), classes)


def test_the_135th_line_of_imagenets_is_a_bird_and_not_a_machine(tmp_path):
    wnids = ImageNetInfo().label_names()
    prompts = read_prompts(label_file(tmp_path, "\n".join(class_words(wnids, None))), wnids)
    assert "bird" in prompts["n02012849"] and wnids[134] == "n02012849" and "bird" not in prompts["n03126707"]


def test_absent_label_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"label_file_path=.*absent\.txt"):
        read_prompts(str(tmp_path / "absent.txt"), NAMES)


def test_prototypes_come_back_from_d4ms_json(tmp_path):
    centres = {name: torch.randn(2, 4, 8, 8).half().float() for name in NAMES}
    write_prototypes(tmp_path / "p.json", centres)
    assert list(json.loads((tmp_path / "p.json").read_text())) == NAMES
    for name, found in zip(reversed(NAMES), read_prototypes(str(tmp_path / "p.json"), NAMES[::-1], (4, 8, 8))):
        torch.testing.assert_close(found, centres[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pear": [[[[0.0]]]]}, "no prototypes of 'apple'"),
        ({"apple": [[[[0.0, 1.0]]]]}, r"shape \(1, 1, 2\), latents of this model \(1, 1, 1\)"),  # another autoencoder
        ({"apple": [[[[9.0]]], [[[-9.0]]]]}, "multiply them by the autoencoder's scaling factor"),  # not scaled
        ({"apple": "cherry"}, "holds no numbers"),
        ({"apple": [[[[float("nan")]]], [[[0.5]]]]}, "spread by nan"),
    ],
)
def test_prototypes_of_another_model_are_refused(content, message, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_prototypes(str(tmp_path / "p.json"), ["apple"], (1, 1, 1))


# ---------------------------------------------------------------------- drawing


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """diffusers' img2img pipeline of a tiny Stable Diffusion with D4M's scheduler, and our source that reads it."""
    from diffusers import PNDMScheduler, StableDiffusionImg2ImgPipeline

    folder = tmp_path_factory.mktemp("sd")
    made = tiny_stable_diffusion("epsilon")
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    made.scheduler = PNDMScheduler(**noise, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    made.save_pretrained(folder)
    parts = {**made.components, "requires_safety_checker": False}
    parts.pop("image_encoder", None)
    pipeline = StableDiffusionImg2ImgPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    dataset = toy_dataset()
    dataset = type(dataset)(**{**vars(dataset), "channels": 3})
    source = make_source(
        "d4m", folder / "run", dataset=dataset, ldm_ckpt=str(folder), scheduler="pndm", sample_steps=50, guidance=8.0,
        ipc=2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for label in range(2):
        centres = torch.randn(2, *source.model.latent_shape, generator=generator) * 0.5
        source.prototypes[label] = {"centres": centres, "counts": torch.ones(2), "spread": torch.ones(2)}
        source.fitted_classes.add(label)
    return pipeline, source


def test_images_are_those_of_diffusers_pipeline_on_the_same_prototypes(stable):
    pipeline, source = stable
    requests = Requests.of_classes([0, 1], 2, ("pipeline",))
    prototypes = torch.cat([source.prototypes[label]["centres"] for label in (0, 1)])
    expected = pipeline(
        prompt=[source.words[label] for label in requests.labels.tolist()], image=prototypes, strength=0.7,
        negative_prompt=["cartoon, anime, painting"] * 4, guidance_scale=8.0, num_inference_steps=50,
        generator=requests.generators(), output_type="pt",
    ).images  # fmt: skip
    drawn = source.generate(requests).parts[0].images
    assert (drawn.float() / 255 - expected).abs().max() < 1.5 / 255
    doubled = {label: {"centres": 0.18215 * own["centres"]} for label, own in source.prototypes.items()}
    kept, source.prototypes = source.prototypes, doubled  # prototypes are scaled already
    assert not torch.equal(source.generate(requests).parts[0].images, drawn)
    source.prototypes = kept


def test_below_one_step_the_prototypes_themselves_are_decoded(stable, monkeypatch):
    source = stable[1]
    monkeypatch.setattr(source, "config", source.config.model_copy(update={"strength": 0.019}))
    monkeypatch.setattr(type(source.model), "predict", lambda *call: pytest.fail("no step, no call"))
    drawn = source.generate(Requests.of_classes([1], 2, ("decoded",))).parts[0].images
    expected = ((source.model.decode(source.prototypes[1]["centres"]).clamp(-1, 1) + 1) * 127.5).round()
    torch.testing.assert_close(drawn.float(), expected, rtol=0, atol=1)


@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 1), (8.0, 2)])
def test_an_image_passes_the_unet_once_a_step_where_nothing_guides_it(guidance, passes, stable, monkeypatch):
    source, rows = stable[1], []
    monkeypatch.setattr(source, "config", source.config.model_copy(update={"guidance": guidance}))
    predict = type(source.model).predict
    monkeypatch.setattr(
        type(source.model),
        "predict",
        lambda self, zt, *rest, **words: rows.append(len(zt)) or predict(self, zt, *rest, **words),
    )
    source.generate(Requests.of_classes([0, 1], 2, ("passes",)))
    assert sum(rows) == 36 * 4 * passes  # PNDM takes 36 of 50 steps at strength 0.7


def test_copies_take_the_prototypes_in_turn_under_noise_of_their_own(stable):
    source = stable[1]
    scheduler = sample_scheduler("pndm", source.model.schedule, 50)
    zt, first = source.start(Requests.of_classes([0], 4, ("turn",)), scheduler)
    assert first == 15 and int(scheduler.timesteps[first]) == 701
    signal = source.prototypes[0]["centres"].repeat(2, 1, 1, 1) * 0.28621
    noise = (zt - signal) / 0.95817
    assert 0.8 < noise.std() < 1.2 and not torch.equal(zt[0], zt[2])


# ---------------------------------------------------------------------- learning


def test_every_image_counts_in_one_prototype(tmp_path):
    source = fitted("small_d4m", tmp_path, ipc=3)
    for own in source.prototypes.values():
        assert own["counts"].sum() == 10 and len(own["centres"]) == 3 and (own["spread"] >= 0).all()


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_latents_of_a_second_run_are_equal(posterior, tmp_path):
    first, second = (fitted("d4m", tmp_path / name, posterior=posterior, ipc=10) for name in "ab")
    for label, own in first.prototypes.items():  # as many prototypes as images: they are the latents
        assert torch.equal(own["centres"], second.prototypes[label]["centres"])


def test_sampled_latents_are_not_the_means(tmp_path):
    mean, sample = (fitted("d4m", tmp_path / kind, posterior=kind) for kind in ("mean", "sample"))
    assert mean.fingerprint() != sample.fingerprint()


def test_a_class_with_fewer_images_than_prototypes_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"class .row 0. has 10 images, but 11 are needed for 11 prototypes: lower synth\.ipc"
    ):
        fitted("small_d4m", tmp_path, ipc=11)


def test_learning_goes_on_after_the_last_class_that_was_clustered(tmp_path, monkeypatch):
    whole = fitted("d4m", tmp_path / "whole")
    broken = make_source("d4m", tmp_path / "broken")
    data = DataManager(toy_dataset(), Split(init_cls=2, increment=2))
    data.advance(task := data.task(0))
    learn, learned = type(broken).learn, []

    def once(self, label, images):
        if learned:
            raise KeyboardInterrupt
        learned.append(label)
        return learn(self, label, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(broken), "learn", once)
        broken.fit_before(task, data.train_images(task))
    again = make_source("d4m", tmp_path / "broken")
    monkeypatch.setattr(
        type(again), "learn", lambda self, label, images: learned.append(label) or learn(self, label, images)
    )
    again.fit_before(task, data.train_images(task))
    assert learned == [0, 1] and again.fingerprint() == whole.fingerprint()


def test_prototypes_are_also_written_and_read_as_d4m_does(tmp_path):
    source = fitted("d4m", tmp_path, export_json=True)
    (tmp_path / "saved").mkdir()
    source.save(tmp_path / "saved")
    path = tmp_path / "saved" / "toy-ipc2-kmexpand10.json"
    again = make_source("d4m", tmp_path / "again", prototypes=str(path))
    again.require_images("row 0", 1)  # nothing is clustered, so few images will do
    again.fit_before(DataManager(toy_dataset(), Split(2, 2)).task(0), toy_images(1, 2, "none"))
    requests = Requests.of_classes([0, 1], 2, ("json",))
    assert torch.equal(again.generate(requests).parts[0].images, source.generate(requests).parts[0].images)


def test_decoding_alone_needs_no_unet(tmp_path):
    whole = fitted("small_d4m", tmp_path / "whole", 2, strength=0)
    source = fitted("small_d4m", tmp_path / "plain", 2, strength=0, block_out_channels=[])
    requests = Requests.of_classes([0, 1, 2], 2, ("decoded",))
    drawn = source.generate(requests).parts[0].images
    assert torch.equal(drawn, whole.generate(requests).parts[0].images)
    assert weight_bytes(source.model) < weight_bytes(whole.model) and "no UNet" in source.describe()
    (tmp_path / "saved").mkdir()
    source.save(tmp_path / "saved")
    again = make_source("small_d4m", tmp_path / "again", strength=0, block_out_channels=[])
    again.load(tmp_path / "saved")
    assert again.fingerprint() == source.fingerprint() and torch.equal(again.generate(requests).parts[0].images, drawn)
    with pytest.raises(ConfigError, match=r"synth\.strength=0\.7 needs a UNet: give synth\.block_out_channels"):
        make_source("small_d4m", tmp_path / "strong", strength=0.7, block_out_channels=[])
    strong = make_source("small_d4m", tmp_path / "taken", strength=0.7, weights=str(tmp_path / "saved"))
    strong.prototypes, strong.vectors, strong.fitted_classes = source.prototypes, source.vectors, {0, 1, 2}
    with pytest.raises(ConfigError, match=r"this model has no UNet.*draw at strength=0"):
        strong.generate(requests)


# ---------------------------------------------------------------------- streams and memories


@pytest.mark.parametrize(
    ("stream", "memory", "new", "old"),
    [
        ("real", "distilled", 20, 6),
        ("distilled", "stream", 6, 0),
        ("both", "distilled", 26, 12),
        ("subset", "stream", 4, 0),
    ],
)
def test_distilled_images_stand_for_the_present_the_past_or_both(stream, memory, new, old, tmp_path):
    experiment = toy_experiment("finetune", tmp_path, "small_d4m", epochs=1, limit_tasks=2)
    synth = experiment.config.synth.model_copy(update={"stream": stream, "memory": memory})
    config = experiment.config.model_copy(update={"synth": synth})
    experiment = type(experiment)(config, "toy", 7, toy_dataset(), experiment.runtime)
    results = experiment.learn_all()
    learner = experiment.learner
    assert len(learner.present) == new and len(learner.past) == (6 if memory == "distilled" else 0)
    assert (results["memory_bytes"]["bank"] > 0) is (memory == "distilled")
    assert bool(experiment.learner.replay.source.fitted_classes) is (stream != "subset")


def test_images_of_a_task_bear_the_numbers_of_its_own_classes(tmp_path):
    """Class 2t and 2t + 1 in task t; the position within the task would be 0 and 1 in every task."""
    synth = {**tiny_source("small_d4m"), "stream": "distilled", "ipc": 2, "syn_per_class": 2}
    experiment = toy_experiment("er", tmp_path, synth=synth, init_epoch=1, epochs=1)
    experiment.learn_all()
    replay, data = experiment.learner.replay, experiment.data
    for index in range(data.num_tasks):
        assert replay.present(data.task(index), ImageSet()).labels.tolist() == [2 * index] * 2 + [2 * index + 1] * 2


@pytest.mark.parametrize(
    ("tasks", "shares"), [(1, [200]), (2, [100, 100]), (3, [67, 67, 66]), (4, [50] * 4), (5, [40] * 5)]
)
def test_balanced_memory_gives_every_task_the_same_room(tasks, shares):
    assert ER.shares(200, tasks) == shares


# ---------------------------------------------------------------------- soft labels


def with_keys(experiment, **keys):
    """The same experiment with other keys of the learner."""
    config = experiment.config.model_copy(update=keys)
    return type(experiment)(config, "toy", 7, toy_dataset(), experiment.runtime)


def student(folder, soft_labels, **keys):
    synth = {"stream": "distilled", "soft_labels": soft_labels, "teacher": "resnet20", "teacher_epochs": 1,
             "teacher_batch_size": 16, "ipc": 2, **keys}  # fmt: skip
    synth = {**tiny_source("small_d4m"), **synth}
    return toy_experiment("distilled", folder, None, synth=synth, init_cls=6, increment=6, epochs=2, batch_size=8)


def test_stored_soft_labels_are_those_that_a_teacher_gives_on_the_way(tmp_path):
    online, stored = (student(tmp_path / kind, kind) for kind in ("online", "stored"))
    first, second = online.learn_all(), stored.learn_all()
    assert first["accuracy_matrix"] == second["accuracy_matrix"]
    for a, b in zip(online.learner.network.state_dict().values(), stored.learner.network.state_dict().values()):
        assert torch.equal(a, b)
    folder = tmp_path / "stored" / "outputs" / "syn_image_toy_seed7" / "soft_labels" / "seed_7_task_0"
    assert len(list(folder.glob("epoch_*/batch_*.safetensors"))) == 2 * 3  # 18 images in eights


def test_soft_labels_of_other_images_are_refused(tmp_path):
    kept = {"soft_labels_dir": str(tmp_path / "labels")}
    student(tmp_path / "one", "stored", **kept).learn_all()
    with pytest.raises(BankError, match=r"images.*soft_labels_dir"):
        student(tmp_path / "two", "stored", strength=0.3, **kept).learn_all()
    other = student(tmp_path / "three", "stored", **kept)
    with pytest.raises(BankError, match=r"views.*soft_labels_dir"):  # crops of another size
        with_keys(other, augmentation="resized_crop").learn_all()


def test_soft_labels_of_another_order_of_the_same_images_are_refused(tmp_path):
    kept = {"soft_labels_dir": str(tmp_path / "labels")}
    student(tmp_path / "one", "stored", **kept).learn_all()
    path = tmp_path / "labels" / "seed_7_task_0" / "epoch_1" / "batch_1.safetensors"
    stored = load_tensors(path)
    save_tensors(path, {**stored, "rows": stored["rows"].flip(0)})  # as if another torch had shuffled them
    with pytest.raises(BankError, match=r"epoch_1/batch_1.*other images or another mix.*soft_labels_dir"):
        student(tmp_path / "two", "stored", **kept).learn_all()


def test_every_process_stores_the_labels_of_its_own_share(tmp_path):
    stored, transform = SoftLabels(tmp_path, {}), classifier_transform(toy_dataset())

    def soft_targets(rank, teacher):
        loading = Loading(transform, 4, (0, 0, "student"), torch.device("cpu"), shard=(rank, 2))
        images = ImageBatches(toy_images(2, 2, "train"), None, loading)
        config = SimpleNamespace(mix="cutmix", mix_alpha=1.0, keep_topk=None)
        (batch,) = SoftBatches(images, teacher, 4.0, config, stored, Runtime(["cpu"])).epoch(0)
        return batch.soft_targets

    first = [soft_targets(rank, lambda images: images.flatten(1)) for rank in (0, 1)]
    assert {path.name for path in tmp_path.glob("epoch_0/*")} == {"batch_0.safetensors", "batch_0_rank_1.safetensors"}
    assert not torch.equal(*first)
    for rank in (0, 1):
        assert torch.equal(soft_targets(rank, lambda images: pytest.fail("they are stored")), first[rank])


def test_soft_labels_come_back_in_the_order_of_the_references_sampler_and_in_no_other(tmp_path):
    """Ten images in fours, seed 42, one generator for all epochs (FKD)."""
    stored = SoftLabels(tmp_path, {})
    sampler = RandomSampler(range(10), generator=torch.Generator().manual_seed(42))
    epochs = [[shown_batch(torch.tensor(rows), None) for rows in BatchSampler(sampler, 4, False)] for _ in range(2)]
    assert [int(shown["rows"][0]) for shown in epochs[0]] == [2, 4, 3]
    places = [(epoch, step, 0) for epoch in range(2) for step in range(3)]
    for epoch, step, rank in places:
        shown = epochs[epoch][step]
        stored.write((epoch, step, rank), shown, shown["rows"][:, None].half())
    for epoch, step, rank in places:
        shown = epochs[epoch][step]
        assert stored.read((epoch, step, rank), shown).flatten().tolist() == shown["rows"].tolist()
        with pytest.raises(BankError, match="other images or another mix"):
            stored.read((epoch, step, rank), epochs[1 - epoch][step])


def test_soft_labels_are_for_the_learner_that_softens_its_own_outputs(tmp_path):
    with pytest.raises(ConfigError, match=r"soft_labels=.online.*model_name=distilled"):
        toy_experiment("finetune", tmp_path, synth={"name": "small_d4m", "soft_labels": "online"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18.tv_in1k", r"classes, mean and std \(1000, 0.485, .*, the data set \(6, 0.2"),
        ("resnet18", "no timm model with a weight tag"),
    ],
)
def test_a_published_teacher_of_other_classes_is_refused_before_anything_is_learned(name, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        student(tmp_path, "online", teacher=name, teacher_epochs=0).check()
    with pytest.raises(ConfigError, match=r"synth\.teacher='resnet999'.*unknown backbone"):
        student(tmp_path / "absent", "online", teacher="resnet999").check()


def test_a_null_number_of_images_means_one_of_every_prototype(tmp_path):
    assert student(tmp_path, "none", ipc=7, syn_per_class=None).config.synth.syn_per_class == 7


def test_a_plan_counts_what_stands_for_the_present(tmp_path):
    assert student(tmp_path, "none").check().replay.expected() == 6 * 3


def test_whoever_watches_the_model_learn_sees_no_images_without_prototypes(tmp_path):
    source = make_source("small_d4m", tmp_path)
    source.watcher = lambda epoch: source.generate(Requests.of_classes([0], 1, ("look",)))
    data = DataManager(toy_dataset(), Split(init_cls=2, increment=2))
    data.advance(task := data.task(0))
    source.fit_before(task, data.train_images(task))
    assert source.fitted_classes == {0, 1}


def test_too_few_images_for_the_prototypes_are_said_before_anything_is_learned(tmp_path):
    with pytest.raises(ConfigError, match=r"class 'row \d' has 10 images, but 20 are needed for 2 .* set kmeans=full"):
        student(tmp_path, "none", kmeans="one_pass", ipc=2, km_expand=10).check()


def test_files_of_a_class_are_those_of_its_own_folder_and_not_of_one_whose_number_begins_alike(tmp_path):
    folder = ImageFolder(tmp_path, Run(tmp_path, 0, Runtime(["cpu"], "fp32"), progress=False), {}, "")
    folder.files = {name: "" for name in ("1/1-0.png", "10/10-0.png", "1/1-10.png", "1/1-2.png")}
    assert [path.name for path in folder.of_class(1)] == ["1-0.png", "1-2.png", "1-10.png"]
    assert folder.images(10).labels.tolist() == [10]
