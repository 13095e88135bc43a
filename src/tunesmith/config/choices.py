"""Values and keys that the flags share with heavy modules; imports nothing, so that --help stays fast."""

MERGE_METHODS = (
    "sequential", "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties",
    "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
"""Ways to combine several adapters (merge --method)."""

RESUME_PARTS = (
    "data", "template", "tokenizer", "model", "optimizer", "lora", "schedule", "batch", "seed", "precision", "versions",
)  # fmt: skip
"""Parts of a run's fingerprint that may change on resume (resume --allow)."""

FREE_KEYS = (
    "train.max_steps", "train.epochs", "train.log_steps", "train.eval_steps", "train.save_steps", "train.save_minutes",
    "train.keep_checkpoints", "train.early_stop_patience", "train.on_nonfinite", "train.trackers",
    "train.gradient_checkpointing", "train.eval_generate", "train.parallel", "train.deepspeed",
    "train.sharded_checkpoints", "train.resume", "train.profile_steps", "data.max_cut_replies", "data.workers",
    "data.max_refused",
    "data.cache",
)  # fmt: skip
"""Keys that resume takes without --allow: none of them alters a step. More steps may need --allow schedule."""

NAME_KEYS = (
    "model.path", "model.tokenizer", "model.revision", "data.train", "data.eval", "data.chat_template",
    "data.template_kwargs", "model.trust_remote_code",
)  # fmt: skip
"""Names of things that resume compares by content, so that they may have moved."""

FIXED_KEYS = (
    "model.config", "model.add_tokens", "data.stream", "optim.name", "lora.kind", "lora.rank", "lora.target_modules",
    "lora.target_parameters", "lora.modules_to_save", "lora.bias", "lora.quantize", "lora.double_quant",
)  # fmt: skip
"""Keys that decide which weights are trained, what the optimizer keeps of them and how places in the data are kept:
a run keeps them to its end."""

_PART_OF_KEY = {
    "train.micro_batch_tokens": "batch",
    "train.grad_accum_steps": "batch",
    "train.seed": "seed",
    "train.precision": "precision",
    "train.compile": "precision",
    "train.deterministic": "precision",
    "train.router_loss": "optimizer",
    "data.share_prefix": "batch",
    "optim.schedule": "schedule",
    "optim.warmup_ratio": "schedule",
    "optim.warmup_steps": "schedule",
    "optim.min_lr_ratio": "schedule",
}
_PART_OF_SECTION = {"optim": "optimizer", "lora": "lora", "data": "data", "model": "model"}


def part_of(key: str) -> str:
    """The part of a run's fingerprint that a key belongs to, for resume --allow."""
    return _PART_OF_KEY.get(key) or _PART_OF_SECTION.get(key.partition(".")[0], "batch")


ROUTER_LOSSES = {
    "transformers": "mean over layers",
    "layers": "sum over layers",
    "sequences": "each document by itself, sum over layers",
}
"""Ways to compute the router loss of a mixture of experts (train.router_loss)."""

PREVIEW_KINDS = ("refused", "used", "truncated", "cut", "split", "noted", "unrolled", "composed")
"""Rows that preview --only shows. cut: a reply of it is cut before its stop token; noted: there are remarks on it."""

MINIMIND_GENERATIONS = ("minimind-3", "2026-01", "2025-10", "2025-04", "2025-02", "2024", "2026", "2025")
"""Generations of MiniMind's scripts, the newest first; then years, each for the newest of its generations that fits."""
PUSH_PARTS = ("config", "metrics", "report", "replies")
EXPORT_FORMATS = ("hf", "minimind", "minimind-lora", "gguf")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
"""Types of a GGUF file's matrices (export --type)."""
GGUF_DIFFERENCES = ("tokens", "template")
"""Differences between llama.cpp and the trained model that export --allow accepts."""
WEIGHT_GENERATIONS = ("minimind-3", "2025", "2024")
"""Forms of MiniMind's weight files."""

REPLY_CHOICES = ("all", "last", "none")
"""Which trained replies of a row evaluate generates."""
ANSWER_CHOICES = ("last", "all")
"""Which replies of a row generate answers."""
KEEP_CHOICES = ("all", "correct", "best")
"""Which samples of a row generate keeps."""
BLEU_TOKENIZERS = ("auto", "13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "none")
"""sacrebleu's tokenizers that evaluate takes."""
