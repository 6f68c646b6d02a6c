"""Networks: own classifiers and denoiser, timm and diffusers by name, and the loading of weights."""
