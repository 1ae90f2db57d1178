"""Keys of FSCIL-ASP's files with DDDR's replay: flat there, inside `synth` here."""

from utils.run.words import WORDS, Words

WORDS.append(Words(source="ldm", keys={
    "need_syn_imgs": "need_syn_imgs", "syn_image_path": "syn_image_path", "ldm_ckpt": "ldm_ckpt", "config": "yaml",
}))  # fmt: skip
