"""Guidance of class-conditional diffusion models: how predictions are combined while samples are drawn."""
