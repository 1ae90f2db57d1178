"""Keys of FSCIL-ASP's files with DDDR's replay: flat there, inside `synth` here."""

from utils.run.words import WORDS, Words

KEYS = {key: key for key in ("need_syn_imgs", "syn_image_path", "ldm_ckpt")}
WORDS.append(Words("ldm", {**KEYS, "config": "yaml"}))
