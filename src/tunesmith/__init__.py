"""Supervised fine-tuning (SFT) of language models: every label proven, every run resumable, every merge checked.

    >>> import tunesmith
    >>> run = tunesmith.train(model="Qwen/Qwen2.5-0.5B", data="chats.jsonl", output="runs/mine")  # doctest: +SKIP
    >>> tunesmith.load(run).reply("Hello!")  # doctest: +SKIP

The names below load what they need when they are first used; importing the package alone imports no torch.
"""

from typing import TYPE_CHECKING, Any

from tunesmith.errors import (
    ConfigError,
    DataError,
    InterruptedRun,
    ModelError,
    RunError,
    TunesmithError,
    UsageError,
)

if TYPE_CHECKING:
    from tunesmith.api import Run, check, find_lr, preview, resume, train
    from tunesmith.arguments import Source
    from tunesmith.distillation.answers import Answers
    from tunesmith.evaluation.records import Evaluation
    from tunesmith.lr_find import FoundLr
    from tunesmith.models import evaluate, export, generate, load, merge, push
    from tunesmith.publish.plan import Push
    from tunesmith.use.check import CheckResult
    from tunesmith.use.model import Model
    from tunesmith.use.preview import Preview

__version__ = "0.1.0"
__all__ = [
    "Answers",
    "CheckResult",
    "ConfigError",
    "DataError",
    "Evaluation",
    "FoundLr",
    "InterruptedRun",
    "Model",
    "ModelError",
    "Preview",
    "Push",
    "Run",
    "RunError",
    "Source",
    "TunesmithError",
    "UsageError",
    "__version__",
    "check",
    "evaluate",
    "export",
    "find_lr",
    "generate",
    "load",
    "merge",
    "preview",
    "push",
    "resume",
    "train",
]
_PLACES = {
    "Answers": "tunesmith.distillation.answers",
    "CheckResult": "tunesmith.use.check",
    "Evaluation": "tunesmith.evaluation.records",
    "FoundLr": "tunesmith.lr_find",
    "Model": "tunesmith.use.model",
    "Preview": "tunesmith.use.preview",
    "Push": "tunesmith.publish.plan",
    "Source": "tunesmith.arguments",
    **dict.fromkeys(("Run", "check", "find_lr", "preview", "resume", "train"), "tunesmith.api"),
    **dict.fromkeys(("evaluate", "export", "generate", "load", "merge", "push"), "tunesmith.models"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
