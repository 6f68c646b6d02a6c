"""Hyper-parameter search: a space of overrides, a stored study, and trials whose cells are ordinary runs."""
