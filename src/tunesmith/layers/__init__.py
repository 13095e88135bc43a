"""Layers of transformers models in fewer passes over memory, with less kept for the backward."""
