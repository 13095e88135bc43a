"""Supervised fine-tuning of language models that a person can trust.

The code reads in the order in which a row travels: data/formats, data/template, data/encode, data/labels,
data/store, data/pack, model/attention, model/loss, train/loop, model/save, use/chat.
"""

from tunesmith.errors import TunesmithError

__version__ = "0.1.0"
__all__ = ["TunesmithError", "__version__"]
