"""Import the large libraries quickly."""

from __future__ import annotations

import gc
import sys


def import_libraries() -> None:
    """Import torch and transformers' model code, if they are not there yet.

    The garbage collector rests meanwhile and leaves alone afterwards what they made, which lives as long as the
    process: it would look through all of it again and again, for a sixth of the time that the imports take. Only for a
    process of our own: what lies in cycles until now is never freed.
    """
    if "torch" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        import torch  # noqa: F401
        import transformers.modeling_utils  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
