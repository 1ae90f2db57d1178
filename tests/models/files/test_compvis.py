"""A checkpoint of CompVis' code becomes diffusers' networks with the same outputs, or is refused with the reason."""

import re
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from models.files.compvis import TEXT, UNET, VAE
from models.files.compvis_yaml import read_yaml
from models.latent.text_to_image import TextToImage, check_text_to_image, load_text_to_image
from tests.support.tiny_compvis import compvis_weights, compvis_yaml, write_compvis
from tests.support.tiny_ldm import tiny_ldm
from utils.run.errors import ConfigError, WeightsError

HEADS = 8  # of CompVis' text encoder, at any width


@pytest.fixture(scope="module")
def pipeline():
    """What the checkpoint is made of."""
    return tiny_ldm(text_heads=HEADS)


@pytest.fixture(scope="module")
def weights(pipeline):
    return compvis_weights(pipeline)


@pytest.fixture
def files(tmp_path, weights):
    """Arguments of `load_text_to_image` for a checkpoint, its YAML and its tokenizer."""
    return write_compvis(tmp_path, weights, compvis_yaml())


def load(files) -> TextToImage:
    return load_text_to_image(**files, image_size=64, offline=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory, weights):
    return load(write_compvis(tmp_path_factory.mktemp("whole"), weights, compvis_yaml()))


def test_converted_networks_hold_the_weights_that_the_checkpoint_was_made_of(model, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    assert model.fingerprint() == load_text_to_image(str(tmp_path)).fingerprint()


def test_converted_networks_give_the_outputs_of_the_original_ones(model, pipeline):
    images, zt = torch.rand(1, 3, 64, 64), torch.randn(1, 4, 8, 8)
    t, context = torch.tensor([500]), torch.randn(1, 77, 32)
    with torch.no_grad():
        posterior = pipeline.vqvae.encode(images).latent_dist
        decoded = pipeline.vqvae.decode(zt / 0.18215).sample
        noise = pipeline.unet(zt, t, context).sample
        torch.testing.assert_close(model.moments(images), 0.18215 * torch.cat([posterior.mean, posterior.std], 1))
        torch.testing.assert_close(model.decode(zt), decoded)
        torch.testing.assert_close(model.predict(zt, t, context), noise)


def compvis_encode(weights, ids):
    """The original text encoder, written down from its weights: pre-norm blocks, no bias in queries, keys, values."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[TEXT + name + ".weight"], weights[TEXT + name + ".bias"])

    def linear(x, name):
        return F.linear(x, weights[TEXT + name + ".weight"], weights.get(TEXT + name + ".bias"))

    x = weights[TEXT + "token_emb.weight"][ids] + weights[TEXT + "pos_emb.emb.weight"]
    for block in range(0, 4, 2):
        name = f"attn_layers.layers.{block}"
        parts = [linear(norm(x, f"{name}.0"), f"{name}.1.to_{part}") for part in "qkv"]
        q, k, v = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts]
        x = x + linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), f"{name}.1.to_out")
        name = f"attn_layers.layers.{block + 1}"
        x = x + linear(F.gelu(linear(norm(x, f"{name}.0"), f"{name}.1.net.0.0")), f"{name}.1.net.2")
    return norm(x, "norm")


def test_text_encoder_agrees_with_the_original_formula(model, weights, pipeline):
    ids = pipeline.tokenizer(["a photo of a dog"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    torch.testing.assert_close(model.context(["a photo of a dog"]), compvis_encode(weights, ids))


def test_schedule_is_the_yamls_and_images_have_256_pixels_whatever_it_says(files):
    model = load_text_to_image(**files, offline=True)
    assert model.image_size == 32 * 8
    assert model.schedule == {
        "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
    }  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), [
    ("linear_end", 0.02, r"linear_end: 0.02, the checkpoint 0.012 \(in betas\)"),
    ("timesteps", 500, r"timesteps: 500, the checkpoint 1000"),
])  # fmt: skip
def test_a_yaml_that_contradicts_the_checkpoint_is_told_so(files, key, value, message):
    rewrite_yaml(files, key, value)
    with pytest.raises(ConfigError, match=f"does not belong to this checkpoint: it says model.params.*{message}"):
        load(files)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_has_rounded_weights_and_the_yamls_own_noise(files, weights, model, dtype):
    rewrite_weights(files, {key: value.to(dtype) for key, value in weights.items()})
    half = load(files)
    assert half.schedule == model.schedule
    zt, t, context = torch.ones(1, 4, 8, 8), torch.tensor([500]), torch.ones(1, 77, 32)
    torch.testing.assert_close(half.predict(zt, t, context), model.predict(zt, t, context), rtol=0, atol=0.05)
    rewrite_yaml(files, "linear_start", 0.0009)  # further off than any rounding
    with pytest.raises(ConfigError, match=r"linear_start: 0\.0009, the checkpoint 0.00085"):
        load(files)


UNET_KEY, VAE_KEY, TEXT_KEY = "unet_config.params.", "first_stage_config.params.", "cond_stage_config."


@pytest.mark.parametrize(("key", "value", "message"), [
    (UNET_KEY + "num_head_channels", 8, "should be -1"),  # would count before num_heads
    (UNET_KEY + "num_heads", -1, "greater than 0"),
    (UNET_KEY + "num_heads", "8 heads", "valid integer"),
    (UNET_KEY + "use_spatial_transformer", False, "should be True"),
    (UNET_KEY + "num_classes", 10, "should be None"),
    (UNET_KEY + "use_scale_shift_norm", True, "should be False"),
    (UNET_KEY + "resblock_updown", True, "should be False"),
    (UNET_KEY + "dims", 3, "should be 2"),
    (UNET_KEY + "transformer_depth", [1], "valid integer"),
    (UNET_KEY + "channel_mult", [1, "a"], "valid integer"),
    (UNET_KEY + "context_dim", None, "valid integer"),
    (VAE_KEY + "embed_dim", 3, "should be 4"),
    (VAE_KEY + "ddconfig.double_z", False, "should be True"),
    (VAE_KEY + "ddconfig.attn_resolutions", [16], "at most 0 items"),
    (VAE_KEY + "ddconfig.ch_mult", 1, "valid list"),
    (TEXT_KEY + "params.max_seq_len", 64, "should be 77"),
    (TEXT_KEY + "target", "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "should be 'ldm.*BERTEmbedder'"),
    ("first_stage_config.target", "ldm.models.autoencoder.VQModelInterface", "should be 'ldm.*AutoencoderKL'"),
    ("parameterization", "x0", "should be 'eps'"),
    ("parameterization", "v", "should be 'eps'"),
    ("beta_schedule", "sqrt_linear", "should be 'linear'"),
    ("conditioning_key", "concat", "should be 'crossattn'"),
    ("original_elbo_weight", 0.1, "should be 0"),
    ("scale_by_std", True, "should be False"),
    ("use_ema", True, "should be False"),
    ("linear_start", "5e-3 ", "valid number"),
    ("scale_factor", 0, "greater than 0"),
    ("timesteps", "many", "valid integer"),
])  # fmt: skip
def test_a_yaml_of_a_model_that_is_not_ours_to_draw_with_is_refused_by_key_and_value(files, key, value, message):
    rewrite_yaml(files, key, value)
    shown = re.escape(f"model.params.{key}: {value!r}")
    with pytest.raises(ConfigError, match=f"model.yaml'?: {shown} is not ours: .*{message}"):
        check_text_to_image(**files, offline=True)


def test_a_key_that_the_unet_does_not_know_is_refused_with_the_nearest(files):
    rewrite_yaml(files, UNET_KEY + "num_haeds", 4)
    with pytest.raises(ConfigError, match=r"unknown key 'model.params.unet_config.params.num_haeds'.*num_heads"):
        check_text_to_image(**files, offline=True)


def test_what_compvis_says_beside_the_networks_does_no_harm(files, model):
    for key, value in {
        "original_elbo_weight": 0.0, "num_timesteps_cond": 1, "monitor": "val/loss", "use_ema": False, "channels": 4,
        "scheduler_config": {"target": "a", "params": {"f": [1.0]}}, "beta_schedule": "linear",
        UNET_KEY + "legacy": True, UNET_KEY + "num_head_channels": -1, UNET_KEY + "use_checkpoint": True,
        VAE_KEY + "lossconfig": {"target": "torch.nn.Identity"}, TEXT_KEY + "params.max_seq_len": 77,
    }.items():  # fmt: skip
        rewrite_yaml(files, key, value)
        check_text_to_image(**files, offline=True)


@pytest.mark.parametrize(("key", "value"), [
    (UNET_KEY + "context_dim", 768), (UNET_KEY + "model_channels", 320), (UNET_KEY + "out_channels", 8),
    (UNET_KEY + "channel_mult", [1, 2, 4]), (UNET_KEY + "num_res_blocks", 2), (UNET_KEY + "attention_resolutions", [2]),
    (TEXT_KEY + "params.n_embed", 1280), (TEXT_KEY + "params.n_layer", 32),
    (VAE_KEY + "ddconfig.ch", 128), (VAE_KEY + "ddconfig.ch_mult", [1, 1]),
])  # fmt: skip
def test_a_yaml_of_another_width_or_depth_is_refused_with_the_keys_that_do_not_fit(files, key, value):
    rewrite_yaml(files, key, value)
    message = r"does not fit the \w+ that the YAML describes \(\d+ of \d+ keys do\)\. \d+ \w+: "
    with pytest.raises(WeightsError, match=message):
        load(files)


def rewrite_yaml(files, key, value):
    """Set (or, with `...`, delete) one key below model.params."""
    content = compvis_yaml()
    *parents, last = key.split(".")
    section = reduce(getitem, parents, content["model"]["params"])
    section[last] = value
    if value is ...:
        del section[last]
    Path(files["yaml"]).write_text(yaml.safe_dump(content))


def rewrite_weights(files, weights):
    torch.save({"state_dict": weights}, files["source"])


@pytest.mark.parametrize(("key", "value", "message"), [
    (UNET + "input_blocks.1.0.in_layers.0.bias", None, "1 missing: down_blocks.0.resnets.0.norm1.bias"),
    (VAE + "decoder.mid.attn_1.q.weight", None, "1 missing: decoder.mid_block.attentions.0.to_q.weight"),
    (TEXT + "attn_layers.layers.3.1.net.2.bias", None, "1 missing: layers.1.fc2.bias"),
    (TEXT + "pos_emb.emb.weight", None, "BERT .* lacks cond_stage_model.transformer.pos_emb.emb.weight"),
    (UNET + "label_emb.weight", torch.zeros(3), r"1 unexpected: \S*weight"),
    (VAE + "encoder.extra", torch.zeros(3), r"1 unexpected: \S*extra"),
    (TEXT + "project_in.weight", torch.zeros(3), r"1 unexpected: \S*weight"),
])  # fmt: skip
def test_a_weight_that_is_missing_or_has_no_place_is_named(files, weights, key, value, message):
    changed = {name: tensor for name, tensor in (weights | {key: value}).items() if tensor is not None}
    rewrite_weights(files, changed)
    with pytest.raises(WeightsError, match=message):
        load(files)


@pytest.mark.parametrize(("key", "kind"), [
    ("cond_stage_model.transformer.text_model.embeddings.position_ids", r"Stable Diffusion 1\.x"),
    ("cond_stage_model.model.ln_final.weight", r"Stable Diffusion 2\.x"),
    ("conditioner.embedders.0.transformer.weight", "Stable Diffusion XL"),
    ("layer1.0.conv1.weight", "no latent diffusion model with a BERT text encoder"),
])  # fmt: skip
def test_another_architecture_is_named(files, weights, key, kind):
    kept = {name: value for name, value in weights.items() if not name.startswith(TEXT)}
    rewrite_weights(files, {**kept, key: torch.zeros(1)})
    with pytest.raises(WeightsError, match=rf"is {kind}: it has \d+ weights, but lacks cond_stage_model"):
        load(files)


@pytest.mark.parametrize(("change", "message"), [
    ({"yaml": None}, "yaml is missing: a checkpoint file needs its CompVis YAML"),
    ({"yaml": "nowhere.yaml"}, "yaml='nowhere.yaml' is unreadable .*No such file.*see exps/ldm"),
    ({"source": "no/model.ckpt"}, "no such file. Put text2img-large's model.ckpt there, or name CompVis"),
    ({"tokenizer": "tests"}, "tokenizer='tests' is no folder with a vocab.txt"),
    ({"tokenizer": "models/bert/none"}, "tokenizer='models/bert/none' is no folder with a vocab.txt"),
    ({"tokenizer": "nobody/none"}, "is no folder with a vocab.txt, nor is it in the hub's cache, and nothing"),
])  # fmt: skip
def test_what_is_absent_is_said_before_any_weights_are_read(files, change, message):
    with pytest.raises((ConfigError, WeightsError), match=message):
        check_text_to_image(**files | change, offline=True)


@pytest.mark.parametrize(("text", "message"), [
    ("model: [", "is unreadable"),
    ("model:\n\tparams: 1", "is unreadable .*cannot start any token"),
    ("[" * 3000 + "]" * 3000, "is unreadable .its sections lie too deep"),
    ("model: !!python/object/apply:os.system [exit 1]", "is unreadable .*constructor"),
    ("a: &a [x, x]\nb: [*a, *a]", r"is unreadable .what \*name stands for may be of any size: write it out"),
    ("model: 3\nmodel: 4", "is unreadable .the key 'model' stands twice"),
    ("just words", "holds a str, not sections"),
    ("- model", "holds a list, not sections"),
    ("model: 3", "model.params.unet_config.params.model_channels is missing"),
    ("model: {params: {}}", "model.params.unet_config.params.model_channels is missing"),
    (None, "model.params.unet_config.params.num_heads is missing"),
])  # fmt: skip
def test_a_yaml_of_another_form_or_without_a_key_is_refused(files, text, message):
    rewrite_yaml(files, "unet_config.params.num_heads", ...)
    if text is not None:
        Path(files["yaml"]).write_text(text)
    with pytest.raises(ConfigError, match=message):
        check_text_to_image(**files, offline=True)


def test_a_tokenizer_of_another_vocabulary_is_refused(files):
    vocabulary = Path(files["tokenizer"]) / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text() + "zebra\n")
    with pytest.raises(WeightsError, match=r"of one model: the tokenizer's vocabulary is \d+, the text encoder's \d+"):
        load(files)


def test_the_yaml_that_comes_with_us_describes_text2img_large():
    params = read_yaml(str(Path(__file__).parents[3] / "exps" / "ldm" / "ldm_dddr.yaml"))
    assert params["unet_config"]["params"]["model_channels"] == 320
    assert params["cond_stage_config"]["params"] == {"n_embed": 1280, "n_layer": 32}
