"""Replies of a model in training to a few held-out rows; afterwards the model is as it was before, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.data.feed import Batches
from tunesmith.encode.encoder import Encoder
from tunesmith.generation.decode import decode_reply
from tunesmith.generation.matching import matches_exactly, rouge_l
from tunesmith.generation.replies import reply_to
from tunesmith.generation.reply_parts import reply_format
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import Speaker
from tunesmith.model.loss import SupervisedLM

REPLY_TOKENS = 128
_LOOKED_AT = 50  # samples for each row that is asked for


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out row up to its first reply, and that reply.

    Attributes:
        row: FILE:ROW.
        ids: the prompt.
    """

    row: str
    ids: Sequence[int]
    prompt: str
    reference: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy reply and its scores."""

    row: str
    prompt: str
    reply: str
    reference: str
    stopped: bool
    exact_match: bool
    rougeL: float  # noqa: N815 (the name in evaluate.json)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def mean_scores(answers: Sequence[Answer]) -> dict[str, float]:
    """Means under the names of metrics.jsonl."""
    names = ("exact_match", "rougeL", "stopped")
    return {f"eval_{name}": sum(float(getattr(a, name)) for a in answers) / len(answers) for name in names}


def find_first_reply(ids: Sequence[int], mask: Sequence[int]) -> tuple[int, int]:
    """Where the first supervised span of a sample starts and ends; both its length if it has none."""
    start = next((i for i, is_trained in enumerate(mask) if is_trained), len(ids))
    end = next((i for i in range(start, len(mask)) if not mask[i]), len(mask))
    return start, end


def pick_questions(held_out: Batches, encoder: Encoder, count: int) -> list[Question]:
    """Rows spread evenly over the held-out data; raw text and replies without their stop token are passed over."""
    store = held_out.store
    samples = sorted(int(index) for pack in held_out.packs for index in pack)
    step = max(1, len(samples) // max(1, count))
    spread = samples[::step]
    order = dict.fromkeys([*spread, *samples])  # the others take the place of those passed over
    found: dict[str, Question] = {}
    for index in list(order)[: count * _LOOKED_AT]:
        if len(found) == count:
            break
        sample, row = store[index], store.where(index)
        ids = sample.input_ids.tolist()
        start, end = find_first_reply(ids, sample.loss_mask.tolist())
        if row in found or start <= 1 or ids[end - 1] not in encoder.stop_ids:  # of raw text, BOS alone comes first
            continue
        prompt = encoder.tokenizer.decode(ids[:start])
        found[row] = Question(row, ids[:start], prompt, decode_reply(encoder, ids[start:end]))
    return list(found.values())


class HeldOutQuestions:
    """A few held-out rows that are answered again and again while a model is trained.

    Args:
        context: largest number of tokens of a prompt and its reply together.
        batch_tokens: answered together, prompts and replies; no more than one forward in training has.
    """

    def __init__(self, held_out: Batches, encoder: Encoder, count: int, context: int | None, batch_tokens: int) -> None:
        self.questions = pick_questions(held_out, encoder, count)
        self._encoder, self._context, self._batch_tokens = encoder, context, batch_tokens
        self._form = reply_format(encoder)

    def ask(self, lm: SupervisedLM) -> list[Answer]:
        """Greedy replies of at most REPLY_TOKENS tokens; the model is left unchanged.

        Raises:
            ModelError: the logits are not finite, or the model's generation_config cannot be used.
        """
        speaker = Speaker(lm.model, self._encoder, self._context)
        answers: dict[str, Answer] = {}
        with able_to_generate(lm):
            for group in self._groups():
                replies = reply_to(speaker, [question.ids for question in group], Sampling(REPLY_TOKENS, temperature=0))
                for question, reply in zip(group, replies, strict=True):
                    answers[question.row] = self._mark(question, reply.text, reply.has_stopped)
        return [answers[question.row] for question in self.questions]

    def _groups(self) -> Iterator[list[Question]]:
        group: list[Question] = []
        for question in sorted(self.questions, key=lambda one: len(one.ids)):
            if group and (len(group) + 1) * (len(question.ids) + REPLY_TOKENS) > self._batch_tokens:
                yield group
                group = []
            group.append(question)
        if group:
            yield group

    def _mark(self, question: Question, reply: str, has_stopped: bool) -> Answer:
        """The scores leave out reasoning, as those of `tunesmith evaluate`; tool calls are compared as text."""
        said, wanted = (self._form.parse(text, has_tools=False) for text in (reply, question.reference))
        exact = matches_exactly(said.content, wanted.content)
        overlap = round(rouge_l(said.content, wanted.content), 4)
        return Answer(question.row, question.prompt, reply, question.reference, has_stopped, exact, overlap)


@contextmanager
def able_to_generate(lm: SupervisedLM) -> Iterator[None]:
    """Without dropout and compiled forwards, with the model's own attention, which knows a key-value cache.

    All of it is put back, also what rotary embeddings note about the longest position that they have seen.
    """
    model: Any = lm.model
    modes = [(module, module.training) for module in lm.modules()]
    compiled = [(module, module._compiled_call_impl) for module in lm.modules()]
    noted = [
        (module, dict(vars(module)), dict(module._buffers))
        for module in lm.modules()
        if hasattr(module, "max_seq_len_cached")
    ]
    packed = model.config._attn_implementation
    try:
        lm.eval()
        for module, _ in compiled:
            module._compiled_call_impl = None
        if lm.own_attention is not None:
            model.set_attn_implementation(lm.own_attention)
        yield
    finally:
        if lm.own_attention is not None:
            model.set_attn_implementation(packed)
        for module, call in compiled:
            module._compiled_call_impl = call
        for module, fields, buffers in noted:
            vars(module).update(fields)
            module._buffers.clear()
            module._buffers.update(buffers)
        for module, mode in modes:
            module.training = mode
