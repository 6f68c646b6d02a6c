"""Measures: of class predictions (classify), of sets of images through features (distribution), and feature nets."""
