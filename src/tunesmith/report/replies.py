"""Sample replies of a finished run's model, for its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.config.schema import ModelSection, RunConfig
from tunesmith.data.labels import Sample
from tunesmith.data.split import split_eval
from tunesmith.data.store import open_store
from tunesmith.errors import ModelError
from tunesmith.model.load import count_parameters
from tunesmith.runfolder import RunFolder
from tunesmith.use.batch import Sampling
from tunesmith.use.generate import Speaker, decode_reply, load_speaker, reply_to

NUM_SAMPLES = 5
_REPLY_TOKENS = 96
_TEXT_PROMPT_TOKENS = 24  # of raw text there is no question; its beginning is continued
_LARGEST_ON_CPU = 300_000_000  # parameters; beyond that, sample replies would take longer than people wait


@dataclass(frozen=True, slots=True)
class SampleReply:
    prompt: str
    reply: str
    wanted: str


def sample_replies(run: Path, config: RunConfig) -> tuple[list[SampleReply], str]:
    """Replies to prompts of held-out rows where there are any, else of training rows; and where they come from."""
    folder = RunFolder(run)
    if not folder.has_complete_model:
        return [], "none: the run left no finished model"
    speaker = load_speaker(ModelSection(path=str(run), trust_remote_code=config.model.trust_remote_code))
    device = next(speaker.model.parameters()).device
    if device.type == "cpu" and count_parameters(speaker.model)[0] > _LARGEST_ON_CPU:
        return [], "none: the model is too large to answer quickly on this CPU"
    has_eval = folder.eval_tokens.is_dir()
    store = open_store(folder.eval_tokens if has_eval else folder.tokens)
    _, held_out = split_eval(store, 0.0 if has_eval else config.data.eval_split, config.train.seed)
    ids = list(range(len(store))) if has_eval or not len(held_out) else held_out.tolist()
    step = max(1, len(ids) // NUM_SAMPLES)
    remark = "greedy replies to held-out rows" if has_eval or len(held_out) else "greedy replies to training rows"
    samples = [store[index] for index in ids[::step][:NUM_SAMPLES]]
    try:
        return _reply_to_all(speaker, samples), remark
    except ModelError as error:
        return [], f"none: {error}"


def _reply_to_all(speaker: Speaker, samples: Sequence[Sample]) -> list[SampleReply]:
    """Replies to the prompt of each sample's first reply, or to the beginning of a raw text."""
    asked, wanted = [], []
    for sample in samples:
        ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
        start = mask.index(1) if 1 in mask else len(ids)
        end = next((i for i in range(start, len(mask)) if not mask[i]), len(mask))
        if start == 0:  # raw text
            start = min(_TEXT_PROMPT_TOKENS, len(ids) // 2)
            end = min(end, start + _REPLY_TOKENS)
        asked.append(ids[:start] or ids[:1])
        wanted.append(decode_reply(speaker.encoder, ids[start:end]))
    replies = reply_to(speaker, asked, Sampling(_REPLY_TOKENS, temperature=0))
    prompts = [speaker.encoder.tokenizer.decode(ids) for ids in asked]
    return [SampleReply(*row) for row in zip(prompts, [reply.text for reply in replies], wanted, strict=True)]
