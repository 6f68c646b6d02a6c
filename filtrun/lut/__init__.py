"""Colour look-up tables and local Laplacian filtering: lookup, .cube files, regularisers, pyramids, remapping."""
