"""Degradations: what turns a clean photograph into the input a restoration model gets."""
