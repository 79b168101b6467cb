"""Pretraining of native multimodal models, and the scaling laws their runs obey."""
