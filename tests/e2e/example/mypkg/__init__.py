"""A package of one's own: a method, a model and a data set for filtrun."""
