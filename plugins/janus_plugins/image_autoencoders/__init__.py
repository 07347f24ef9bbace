"""Image autoencoders: images to continuous latents, and latents to images."""
