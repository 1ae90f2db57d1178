"""Latent diffusion models, ours and published ones, behind one contract."""
