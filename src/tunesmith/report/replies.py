"""Sample replies of a finished run's model, for its report and its verdict."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.config.schema import RunConfig
from tunesmith.errors import TunesmithError
from tunesmith.files import read_sealed, sealed, write_text_atomic
from tunesmith.runfolder import RunFolder

NUM_SAMPLES = 5
_REPLY_TOKENS = 96
_TEXT_PROMPT_TOKENS = 24  # of raw text there is no question; its beginning is continued
_LARGEST_ON_CPU = 300_000_000  # parameters; beyond that, sample replies would take longer than people wait


@dataclass(frozen=True, slots=True)
class SampleReply:
    """A prompt of the data, the model's greedy reply, and the reply in the data.

    Attributes:
        has_stopped: whether the reply ended with a stop token, within the tokens that it may have.
        wanted_share: length of the reply in the data, as a share of those tokens; None for raw text, which has no end.
    """

    prompt: str
    reply: str
    wanted: str
    has_stopped: bool = True
    wanted_share: float | None = None

    @property
    def is_text(self) -> bool:
        """Whether raw text was continued, which has no end."""
        return self.wanted_share is None

    @property
    def is_endless(self) -> bool:
        """Whether the reply did not stop although it repeats itself, or is twice as long as the one in the data."""
        if self.has_stopped or self.wanted_share is None:
            return False
        return self.wanted_share <= 0.5 or repeats_itself(self.reply)


def repeats_itself(text: str) -> bool:
    """Whether the second half of a text is one piece over and over."""
    tail = text[len(text) // 2 :]
    return any(tail[size:] == tail[:-size] for size in range(1, len(tail) // 3 + 1))


@dataclass(frozen=True, slots=True)
class SampleReplies:
    """Attributes:
    remark: what they are replies to, or why there are none.
    """

    remark: str
    replies: Sequence[SampleReply] = ()


def sample_replies(run: Path, config: RunConfig) -> SampleReplies:
    """Replies to prompts of held-out rows where there are any, else of training rows."""
    folder = RunFolder(run)
    if not folder.has_complete_model:
        return SampleReplies("none: the run left no finished model")
    try:
        return _ask(folder, config)
    except TunesmithError as error:
        return SampleReplies(f"none: {error}")


def _ask(folder: RunFolder, config: RunConfig) -> SampleReplies:
    from tunesmith.config.schema import ModelSection
    from tunesmith.data.split import split_eval
    from tunesmith.data.store import open_store
    from tunesmith.generation.speaker import load_speaker
    from tunesmith.model.load import count_parameters

    speaker = load_speaker(ModelSection(path=str(folder.path), trust_remote_code=config.model.trust_remote_code))
    device = next(speaker.model.parameters()).device
    if device.type == "cpu" and count_parameters(speaker.model)[0] > _LARGEST_ON_CPU:
        return SampleReplies("none: the model is too large to answer quickly on this CPU")
    has_eval = folder.eval_tokens.is_dir()
    store = open_store(folder.eval_tokens if has_eval else folder.tokens)
    _, held_out = split_eval(store, 0.0 if has_eval else config.data.eval_split, config.train.seed)
    ids = np.arange(len(store)) if has_eval or not len(held_out) else held_out
    step = max(1, len(ids) // NUM_SAMPLES)
    remark = "greedy replies to held-out rows" if has_eval or len(held_out) else "greedy replies to training rows"
    return SampleReplies(remark, _reply_to_all(speaker, [store[int(index)] for index in ids[::step][:NUM_SAMPLES]]))


def _reply_to_all(speaker: Any, samples: Sequence[Any]) -> list[SampleReply]:
    """Replies to the prompt of each sample's first reply, or to the beginning of a raw text."""
    from tunesmith.generation.decode import decode_reply
    from tunesmith.generation.held_out import find_first_reply
    from tunesmith.generation.replies import reply_to
    from tunesmith.generation.sampling import Sampling

    asked, wanted, shares = [], [], []
    for sample in samples:
        ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
        start, end = find_first_reply(ids, mask)
        is_text = start <= 1  # nothing, or BOS alone, is before what is trained
        shares.append(None if is_text else (end - start) / _REPLY_TOKENS)
        if is_text:
            start = min(_TEXT_PROMPT_TOKENS, len(ids) // 2)
            end = min(end, start + _REPLY_TOKENS)
        asked.append(ids[:start] or ids[:1])
        wanted.append(decode_reply(speaker.encoder, ids[start:end]))
    replies = reply_to(speaker, asked, Sampling(_REPLY_TOKENS, temperature=0))
    prompts = [speaker.encoder.tokenizer.decode(ids) for ids in asked]
    rows = zip(prompts, replies, wanted, shares, strict=True)
    return [SampleReply(prompt, reply.text, text, reply.has_stopped, share) for prompt, reply, text, share in rows]


def keep_replies(folder: RunFolder, step: int, samples: SampleReplies) -> None:
    """Keep the replies of the model after `step`, so that a verdict needs no model."""
    rows = [asdict(reply) for reply in samples.replies]
    write_text_atomic(folder.replies, sealed({"step": step, "remark": samples.remark, "replies": rows}))


def kept_replies(folder: RunFolder, step: int) -> SampleReplies:
    """The replies that were kept after `step`; none where the run has gone on since, or the file is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        saved = read_sealed(folder.replies)
        if saved["step"] == step:
            return SampleReplies(str(saved["remark"]), [SampleReply(**row) for row in saved["replies"]])
    return SampleReplies("none")
