"""Adapting a pretrained network: what fine-tuning does to its features, and how to keep it from it."""
