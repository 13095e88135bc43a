"""Values of flags that belong to heavy modules; imports nothing, so that --help stays fast."""

MERGE_METHODS = (
    "sequential", "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties",
    "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
"""Ways to combine several adapters (merge --method)."""

RESUME_PARTS = (
    "data", "template", "tokenizer", "model", "optimizer", "lora", "schedule", "batch", "seed", "precision", "versions",
)  # fmt: skip
"""Parts of a run's fingerprint that may change on resume (resume --allow)."""
