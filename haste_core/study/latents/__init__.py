"""Between images and latents by a VAE: `haste latents` encodes whole folders, `decoding` makes images of what is drawn.

Reading a prepared folder for training is `haste_core.study.data.latents`.
"""
