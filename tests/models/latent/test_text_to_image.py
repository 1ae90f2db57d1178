"""Published text-to-image models behind one contract: read from folders and the hub, frozen, told by vectors."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.files.diffusers_folder import LDM_SCHEDULE
from models.frozen import weight_bytes
from models.latent.text_to_image import Placement, check_text_to_image, load_text_to_image
from tests.support.tiny_ldm import (
    BERT_WORDS,
    edit_json,
    edit_weights,
    put_into_cache,
    tiny_ldm,
    tiny_ldm_folder,
    tiny_stable_diffusion,
)
from utils.run.errors import ConfigError, WeightsError

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def ldm_files(tmp_path_factory):
    """An LDM of RGB images, 8x8 latents, 64x64 pixels."""
    folder = tmp_path_factory.mktemp("ldm")
    tiny_ldm().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sd_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    tiny_stable_diffusion("v_prediction").save_pretrained(folder)
    return folder


@pytest.fixture
def ldm_copy(ldm_files, tmp_path):
    """A folder that a test may damage."""
    return Path(shutil.copytree(ldm_files, tmp_path / "copy"))


@pytest.fixture
def sd_copy(sd_files, tmp_path):
    return Path(shutil.copytree(sd_files, tmp_path / "copy"))


@pytest.fixture(scope="module")
def ldm(ldm_files):
    return load_text_to_image(str(ldm_files))


@pytest.fixture(scope="module")
def sd(sd_files):
    return load_text_to_image(str(sd_files))


@pytest.fixture(params=["ldm", "sd"])
def model(request):
    return request.getfixturevalue(request.param)


def test_an_ldm_says_what_it_is(ldm):
    assert (ldm.image_size, ldm.image_channels, ldm.latent_shape) == (64, 3, (4, 8, 8))
    assert (ldm.vector_size, ldm.max_tokens, ldm.schedule) == (32, 77, LDM_SCHEDULE)


def test_a_stable_diffusion_has_the_schedule_of_its_own_file(sd):
    assert (sd.schedule["beta_start"], sd.schedule["beta_end"]) == (0.001, 0.02)
    assert sd.schedule["prediction_type"] == "v_prediction"


def test_an_ldms_scheduler_file_is_not_trusted(ldm_copy):
    (ldm_copy / "scheduler" / "scheduler_config.json").write_text('{"beta_start": 0.0001, "beta_end": 0.02}')
    assert load_text_to_image(str(ldm_copy)).schedule == LDM_SCHEDULE


def test_another_image_size_moves_the_latents_unless_it_lies_between_them(ldm_files):
    model = load_text_to_image(str(ldm_files), image_size=32)
    assert model.latent_shape == (4, 4, 4)
    assert model.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 32, 32)
    with pytest.raises(ConfigError, match=r"image_size=60: this model needs a multiple of 8 pixels"):
        load_text_to_image(str(ldm_files), image_size=60)


def test_shapes_keep_the_contract(model):
    c, h, w = model.latent_shape
    images = torch.rand(2, 3, model.image_size, model.image_size)
    context = model.context(["a photo of *", ""], torch.randn(2, 32))
    assert model.moments(images).shape == (2, 2 * c, h, w)
    assert model.decode(torch.randn(2, c, h, w)).shape == images.shape
    assert context.shape == (2, 77, 32)
    assert model.predict(torch.randn(2, c, h, w), torch.tensor([0, 999]), context).shape == (2, c, h, w)


@sdpa_kernel(SDPBackend.MATH)  # flash attention in bf16 asks for kernels that not every CPU runs
def test_bf16_weights_take_and_give_float32_and_halve_the_bytes(ldm, ldm_files):
    half = load_text_to_image(str(ldm_files), placement=Placement(dtype=torch.bfloat16))
    vectors, zt, t = torch.randn(1, 32, requires_grad=True), torch.ones(1, 4, 8, 8), torch.tensor([5])
    full, rough = (model.predict(zt, t, model.context(["a dog *"], vectors)) for model in (ldm, half))
    rough.square().mean().backward()
    assert rough.dtype == vectors.grad.dtype == torch.float32 and vectors.grad.abs().sum() > 0
    torch.testing.assert_close(full, rough, rtol=0, atol=0.05)
    assert weight_bytes(half) * 2 == weight_bytes(ldm)
    assert half.fingerprint() == ldm.fingerprint()  # the same model, also for vectors found in the other format


def test_frozen_bytes_are_those_of_the_files_but_for_the_unused_vocabulary_head(ldm, ldm_files):
    tensors = [load_file(path) for path in ldm_files.rglob("*.safetensors")]
    on_disk = sum(value.nbytes for file in tensors for key, value in file.items() if "to_logits" not in key)
    assert weight_bytes(ldm) == on_disk


def test_fingerprint_tells_weights_apart(ldm, ldm_copy):
    edit_weights(ldm_copy / UNET, lambda weights: weights["conv_out.bias"].add_(1e-6))
    assert load_text_to_image(str(ldm_copy)).fingerprint() != ldm.fingerprint()


# ---------------------------------------------------------------------- prompts and words


@pytest.mark.parametrize(("prompt", "count"), [("a photo of a dog", 0), ("a * of *", 2), ("a " * 80 + "*", 0)])
def test_a_prompt_needs_the_placeholder_once_within_the_models_length(model, prompt, count):
    with pytest.raises(ConfigError, match=f"has {count} placeholders: it needs '\\*' exactly once.*the first 75"):
        model.context([prompt], torch.zeros(1, 32))


def test_an_initial_word_of_several_tokens_or_outside_the_vocabulary_is_refused(model, ldm):
    with pytest.raises(ConfigError, match=r"the model reads the word 'a dog' as a\S*, dog\S*, but"):
        model.initial_vector("a dog")
    with pytest.raises(ConfigError, match=r"reads the word 'zebra' as \[UNK\], but"):
        ldm.initial_vector("zebra")


def test_a_vocabulary_without_the_placeholder_is_refused(ldm_copy):
    words = ["star" if word == "*" else word for word in BERT_WORDS]
    shutil.rmtree(ldm_copy / "tokenizer")
    (ldm_copy / "tokenizer").mkdir()
    (ldm_copy / "tokenizer" / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(WeightsError, match=r"reads '\*' as \['\[UNK\]'\]"):
        load_text_to_image(str(ldm_copy))


# ---------------------------------------------------------------------- folders as they were published


def to_pickle(path, rename=lambda key: key):
    """The same weights as a .bin, under older names."""
    target = {"diffusion_pytorch_model": "diffusion_pytorch_model.bin", "model": "pytorch_model.bin"}[path.stem]
    torch.save({rename(key): value for key, value in load_file(path).items()}, path.with_name(target))
    path.unlink()


def old_attention(key):
    for new, old in {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}.items():
        key = key.replace(new, old)
    return key


def test_a_folder_of_2022_is_the_same_model(ldm, ldm_copy):
    for part in ("unet", "vqvae", "bert"):
        to_pickle(next((ldm_copy / part).glob("*.safetensors")), old_attention if part == "vqvae" else str)
    edit_json(ldm_copy / "vqvae" / "config.json", scaling_factor=..., _diffusers_version="0.2.4")
    edit_json(ldm_copy / "scheduler" / "scheduler_config.json", set_alpha_to_one=..., steps_offset=..., clip_sample=...)
    for path in (ldm_copy / "tokenizer").iterdir():
        path.unlink()
    (ldm_copy / "tokenizer" / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
    old = load_text_to_image(str(ldm_copy))
    assert old.fingerprint() == ldm.fingerprint()
    images, vectors = torch.rand(1, 3, 64, 64), torch.randn(1, 32)
    torch.testing.assert_close(old.moments(images), ldm.moments(images), rtol=0, atol=0)
    torch.testing.assert_close(old.context(["a photo of *"], vectors), ldm.context(["a photo of *"], vectors))


def test_clip_weights_of_older_libraries_are_the_same_model(sd, sd_copy):
    path = sd_copy / "text_encoder" / "model.safetensors"
    old = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(path).items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(old, path, metadata={"format": "pt"})
    assert load_text_to_image(str(sd_copy)).fingerprint() == sd.fingerprint()


# ---------------------------------------------------------------------- what is absent or wrong


@pytest.mark.parametrize("path", [UNET, "bert/model.safetensors", "vqvae/config.json", "model_index.json"])
def test_a_file_that_is_absent_is_named_before_anything_is_read(ldm_copy, path):
    (ldm_copy / path).unlink()
    with pytest.raises(WeightsError, match=f"it lacks {path}:"):
        check_text_to_image(str(ldm_copy), None, "", offline=False)


def test_the_folder_of_a_checkpoint_is_told_from_the_checkpoint_and_no_folder_from_a_hub_id(tmp_path):
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(WeightsError, match=r"or name the file itself, source=.*model.ckpt"):
        check_text_to_image(str(tmp_path), None, "", offline=False)
    with pytest.raises(WeightsError, match="source='models/ldm/large': there is no such file or folder"):
        check_text_to_image("models/ldm/large", None, "", offline=False)


@pytest.mark.parametrize(("file", "change", "message"), [
    ("model_index", {"_class_name": "XLPipeline"}, "holds a XLPipeline; use .*LDMTextToImagePipeline"),
    ("model_index", {"vqvae": ["diffusers", "VQModel"]}, "vqvae holds a VQModel, where .* is read with a Autoenc"),
    ("model_index", {"vqvae": "VQModel"}, "vqvae holds a None, where"),
    ("unet/config", {"cross_attention_dim": 48}, r"8 misshapen: \S+k.weight \(32, 32\) instead of \(32, 48\)"),
    ("bert/config", {"d_model": 48}, r"misshapen: model.embed_positions.weight \(77, 32\) instead of \(77, 48\)"),
    ("bert/config", {"encoder_layers": 3}, r"13 missing: model.layers.2.fc1.bias"),
])  # fmt: skip
def test_a_model_of_another_kind_or_shape_is_named(ldm_copy, file, change, message):
    edit_json(ldm_copy / f"{file}.json", **change)
    with pytest.raises(WeightsError, match=message):
        load_text_to_image(str(ldm_copy))


@pytest.mark.parametrize(
    ("part", "name"), [("unet", "conv_out.bias"), ("bert", "model.layers.0.fc1.weight"), ("vqvae", "quant_conv.bias")]
)
def test_a_weight_that_is_absent_is_named(ldm_copy, part, name):
    edit_weights(next((ldm_copy / part).glob("*.safetensors")), lambda weights: weights.pop(name))
    with pytest.raises(WeightsError, match=rf"{part} are not those that its config.json asks for\. 1 missing: {name}"):
        load_text_to_image(str(ldm_copy))


def test_parts_of_two_models_are_refused(ldm_copy):
    def add_a_word(weights):
        for key in ("model.embed_tokens.weight", "to_logits.weight", "to_logits.bias"):
            weights[key] = torch.cat([weights[key], weights[key][:1]])

    edit_json(ldm_copy / "bert" / "config.json", vocab_size=36)
    edit_weights(ldm_copy / "bert" / "model.safetensors", add_a_word)
    with pytest.raises(WeightsError, match="the tokenizer's vocabulary is 35, the text encoder's 36"):
        load_text_to_image(str(ldm_copy))


@pytest.mark.parametrize(("file", "content", "message"), [
    (UNET, b"\x08", r"unet cannot be read as UNet2DConditionModel: .*; fetch it again"),
    (
        UNET.replace("safetensors", "bin"),
        {"x": torch.zeros(1), "callback": Path},
        "unet cannot .*again, or save the tensors",
    ),
    ("bert/model.safetensors", b"\x08\x00", r"bert cannot be read as LDMBertModel: SafetensorError"),
    ("bert/pytorch_model.bin", {"x": torch.zeros(1), "callback": Path}, r"LDMBertModel: its \.bin .* foreign code"),
    ("bert/pytorch_model.bin", [1], r"bert cannot be read as LDMBertModel: TypeError"),
    ("bert/pytorch_model.bin", b"version https://git-lfs", "pytorch_model.bin is a pointer of git-lfs: run"),
    ("vqvae/config.json", b"[]", "vqvae cannot be read as AutoencoderKL"),
    ("bert/config.json", b"[]", "bert cannot be read as LDMBertModel"),
])  # fmt: skip
def test_a_file_that_is_damaged_or_would_run_code_is_named(ldm_copy, file, content, message):
    path = ldm_copy / file
    if path.suffix == ".bin":
        next(path.parent.glob("*.safetensors")).unlink()
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(WeightsError, match=message):
        load_text_to_image(str(ldm_copy))


@pytest.mark.parametrize(("change", "message"), [
    ({"prediction_type": "sample"}, "'prediction_type': 'sample'.* use a model of epsilon or v_prediction"),
    ({"algorithm_type": "sde-dpmsolver++"}, "'algorithm_type': 'sde-dpm.* and no SDE"),
    (
        {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"},
        "'rescale_betas_zero_snr': True. is not supported; use a model of v_pred",
    ),
    ({"beta_end": None}, "makes no noise of diffusers .TypeError"),
    ({"beta_schedule": "cosine"}, "makes no noise of diffusers .NotImplementedError: cosine is not"),
    ({"beta_start": "a"}, "makes no noise of diffusers"),
    ({"trained_betas": "a"}, "makes no noise of diffusers"),
])  # fmt: skip
def test_noise_of_an_unknown_kind_is_refused(sd_copy, change, message):
    edit_json(sd_copy / "scheduler" / "scheduler_config.json", **change)
    with pytest.raises(WeightsError, match=f"scheduler_config.json.*{message}"):
        load_text_to_image(str(sd_copy))


# ---------------------------------------------------------------------- the hub


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("offline", [True, False])
def test_a_cached_model_is_read_and_asks_no_network(cache, monkeypatch, offline):
    monkeypatch.setattr("models.files.diffusers_folder.hub_answers", None)
    put_into_cache(cache, "tiny", tiny_ldm_folder())
    check_text_to_image("nobody/tiny", None, "", offline)
    model = load_text_to_image("nobody/tiny", offline=offline)
    assert model.fingerprint() == load_text_to_image(tiny_ldm_folder()).fingerprint()


@pytest.mark.parametrize("act", [check_text_to_image, load_text_to_image])
def test_weights_that_are_absent_offline_are_named_with_the_place_to_put_them(cache, act):
    (put_into_cache(cache, "tiny", tiny_ldm_folder()) / UNET).unlink()
    with pytest.raises(WeightsError) as caught:
        act("nobody/tiny", None, "", offline=True)
    for part in ("nobody/tiny", UNET, str(cache), "nothing is fetched offline"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("answers", "reason"), [
    (None, "nothing is fetched offline"),
    (False, "the hub does not answer"),
    (True, r"could not be fetched \(ConnectionError: no route\)"),
])  # fmt: skip
def test_a_model_that_was_never_fetched_is_missed_unless_it_may_be_fetched(cache, monkeypatch, answers, reason):
    def unreachable(*names, **options):
        raise OSError("not cached") from ConnectionError("no route")

    monkeypatch.setattr("models.files.diffusers_folder.hub_answers", lambda: answers)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", unreachable)
    if answers:
        check_text_to_image("nobody/none", None, "", offline=False)
    with pytest.raises(WeightsError, match=rf"lacks model_index.json of this model, and .*{reason}.*nobody--none"):
        load_text_to_image("nobody/none", offline=answers is None)
