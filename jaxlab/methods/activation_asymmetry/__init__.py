"""Asymmetry, saturation and sparsity of activations, and where batch normalisation stands beside them."""
