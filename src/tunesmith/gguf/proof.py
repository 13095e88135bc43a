"""Compare what llama.cpp makes of a GGUF file with the model that it was written from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunesmith.encode.encoder import Encoder
from tunesmith.errors import RunError
from tunesmith.gguf.chats import ProbeChat, probe_chats
from tunesmith.gguf.fuzz import draw_texts
from tunesmith.gguf.reader import Answers, Job, ask
from tunesmith.gguf.vocabulary import Vocabulary
from tunesmith.model.load import NUM_EXPERTS

# Difference of log-probabilities, as a share of the logits' size (their largest distance from the mean of a position),
# that most must keep to. llama.cpp rounds the activations too where weights are not fp32.
TOLERANCE = {"f32": 1e-4, "f16": 5e-3, "bf16": 4e-2, "q8_0": 1.2e-1}
_GELU_TOLERANCE = 2e-3  # llama.cpp looks the GELU of GPT-2 and Gemma up in a table of half precision
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
_NUM_FUZZ, _NUM_ADDED, _MOST_CONTEXT = 500, 100, 4096
_LEAST_LOG_PROB = -80.0  # fp32 has no probabilities much smaller; llama.cpp then reports the smallest fp32 number
_MOST, _MOST_OF_EXPERTS = 0.99, 0.9  # rounding may choose other experts at some positions
_CLEARLY_OTHER = 0.03  # of the positions at most, where llama.cpp's likeliest token is clearly not the model's
_NUM_LENGTHS, _NUM_PROBS, _MOST_PROMPT = 12, 64, 200
# one prompt is longer: by _PAST_WINDOW tokens than a sliding window, and than what llama.cpp computes at once (512)
_LONG, _MOST_LONG, _PAST_WINDOW, _NUM_LONG_LENGTHS = 640, 2048, 128, 4


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of the comparison.

    Attributes:
        lines: what was compared, with figures.
        problems: part (tokens, template) -> what differs there, to be allowed by the user.
        has_logits: whether logits were compared.
    """

    lines: list[str]
    problems: dict[str, str] = field(default_factory=dict)
    has_logits: bool = True


def prove(
    file: str,
    model: Any,
    encoder: Encoder,
    vocabulary: Vocabulary,
    texts: Sequence[str],
    stops: Sequence[int],
    kind: str,
    context: int,
) -> Finding:
    """Open the file with llama.cpp and compare ids, template, stop tokens and logits.

    Args:
        model: in fp32; None if it does not fit into memory, then logits are not compared.
        texts: of the run's rows, or usual ones.
        stops: ids that end a reply.
        kind: type of the file's matrices.

    Raises:
        RunError: llama.cpp cannot read the file, or its logits or stop tokens differ.
    """
    chats = _probe_chats(encoder)
    fuzz = draw_texts(_NUM_FUZZ)
    context = min(context, _MOST_CONTEXT)
    prompts, lengths = _draw_prompts(encoder, chats, texts, None if model is None else model.config, context)
    texts = [*texts, *_around_added(encoder), *(chat.text for chat in chats)]
    job = Job(
        file, [*texts, *fuzz], [chat.request for chat in chats], prompts, lengths, _NUM_PROBS, list(stops), context
    )
    answers = ask(job)
    finding = Finding([], has_logits=model is not None)
    _compare_ids(finding, encoder, vocabulary, answers, texts, fuzz)
    _compare_template(finding, encoder, chats, answers, context)
    if missing := [token for token in stops if token not in answers.stopping]:
        raise RunError(
            f"llama.cpp does not stop at {encoder.tokenizer.convert_ids_to_tokens(missing[0])!r}, which ends this "
            "model's replies: a GGUF file has room for three such tokens. If replies do not need it, take it out of "
            "eos_token_id in generation_config.json. No files were kept.",
            code="stop-token-ignored",
        )
    if model is not None:
        finding.lines.append(_compare_logits(model, prompts, lengths, answers, kind))
    else:
        finding.lines.append("logits not compared: the file and the model do not fit into memory together")
    return finding


def prove_in_f32(file: str, model: Any, encoder: Encoder, texts: Sequence[str], context: int) -> str:
    """Compare the logits of a file in f32 with the metadata of another type's, whose rounding would hide a wrong value.

    Raises:
        RunError: they differ.
    """
    context = min(context, _MOST_CONTEXT)
    prompts, lengths = _draw_prompts(encoder, _probe_chats(encoder), texts, model.config, context)
    lengths = [ends[::3] for ends in lengths[:-1]] + lengths[-1:]
    answers = ask(Job(file, prompts=prompts, lengths=lengths, num_probs=_NUM_PROBS, context=context))
    return f"with weights in f32, {_compare_logits(model, prompts, lengths, answers, 'f32')}"


def _probe_chats(encoder: Encoder) -> list[ProbeChat]:
    renderer = encoder.renderer()
    return list(probe_chats(renderer)) if renderer is not None else []


def _draw_prompts(
    encoder: Encoder, chats: Sequence[ProbeChat], texts: Sequence[str], config: Any, context: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids, and the lengths of the beginnings at which logits are compared: none without a config of the model."""
    given = [encoder.encode_texts([chat.text])[0].ids for chat in chats if "tools" not in chat.request]
    given += [[*encoder.bos_ids, *ids] for ids in encoder.encode_ids(list(texts[:8]))]
    prompts = [list(ids)[: min(_MOST_PROMPT, context - 1)] for ids in given if len(ids)]
    if config is None:
        return prompts, [[] for _ in prompts]
    lengths = [_spread(len(ids)) for ids in prompts]
    long = _long_prompt(encoder, texts, config, context)
    ends = range(len(long), 0, -_PAST_WINDOW // _NUM_LONG_LENGTHS)
    return [*prompts, long], [*lengths, list(ends)[:_NUM_LONG_LENGTHS]]


def _around_added(encoder: Encoder) -> list[str]:
    """Texts with added tokens, which may take spaces around them (lstrip, rstrip) or need a border (single_word)."""
    added = [token.content for token in encoder.tokenizer.backend_tokenizer.get_added_tokens_decoder().values()]
    picked = added[:: max(1, len(added) // _NUM_ADDED)]
    return [f"a{token}b {token} c\n{token}\nd" for token in picked]


def _compare_ids(
    finding: Finding,
    encoder: Encoder,
    vocabulary: Vocabulary,
    answers: Answers,
    texts: Sequence[str],
    fuzz: Sequence[str],
) -> None:
    """The ids of llama.cpp and ours. Where the vocabulary is known not to be exact, random texts may differ."""
    wanted = encoder.encode_ids([*texts, *fuzz])
    differs = [list(ours) != theirs for ours, theirs in zip(wanted, answers.ids, strict=True)]
    own, others = sum(differs[: len(texts)]), sum(differs[len(texts) :])
    finding.lines.append(
        f"ids of {len(texts) - own} of {len(texts)} texts and {len(fuzz) - others} of {len(fuzz)} random ones are equal"
    )
    given = [*texts, *fuzz]
    example = min((text for text, other in zip(given, differs, strict=True) if other), key=len, default="")
    is_expected = not own and not vocabulary.twin.exact and others <= len(fuzz) * (vocabulary.twin.fuzz_differs + 0.05)
    if (own or others) and not is_expected:
        finding.problems["tokens"] = (
            f"llama.cpp gives other ids for {own} of {len(texts)} texts and {others} of {len(fuzz)} random ones, as "
            f"for {example[:60]!r}"
        )


def _compare_template(
    finding: Finding, encoder: Encoder, chats: Sequence[ProbeChat], answers: Answers, context: int
) -> None:
    """The text that llama.cpp's template engine writes, and how many tokens its chat API makes of it, where the
    context has room for the chat."""
    bos = encoder.tokenizer.bos_token or ""
    for chat, found in zip(chats, answers.rendered, strict=True):
        ids = encoder.encode_texts([chat.text])[0].ids
        if "text" not in found:
            problem = f"llama.cpp cannot run the chat template on a chat with {chat.shape}: {str(found['error'])[:200]}"
        elif found["text"] not in (chat.text, chat.text.removeprefix(bos)):
            problem = f"llama.cpp renders a chat with {chat.shape} as {_part(found['text'], chat.text)}"
        elif found.get("num_tokens") != len(ids) < context and "tokens" not in finding.problems:
            problem = (
                f"llama.cpp makes {found.get('num_tokens')} tokens of a chat with {chat.shape}, not {len(ids)}"
                f"{': ' + str(found['error'])[:200] if found.get('error') else ''}"
            )
        else:
            continue
        finding.problems["template"] = problem
        return
    if chats:
        finding.lines.append(f"template: {len(chats)} chats rendered alike, the last one with {chats[-1].shape}")


def _part(found: str, wanted: str) -> str:
    """Two texts from shortly before their first difference."""
    shorter = min(len(found), len(wanted))
    start = next((i for i in range(shorter) if found[i] != wanted[i]), shorter)
    start = max(0, start - 20)
    return f"{found[start : start + 60]!r}, not {wanted[start : start + 60]!r}"


def _spread(length: int) -> list[int]:
    """Lengths of beginnings, evenly spaced up to the whole."""
    number = min(_NUM_LENGTHS, length)
    return [length - length * place // number for place in reversed(range(number))]


def _long_prompt(encoder: Encoder, texts: Sequence[str], config: Any, context: int) -> list[int]:
    """Texts one after the other, for a prompt that a sliding window does not hold whole."""
    window = getattr(config, "sliding_window", None) or 0
    length = min(max(_LONG, window + _PAST_WINDOW), _MOST_LONG, context - 1)
    once = [*encoder.bos_ids, *itertools.chain.from_iterable(encoder.encode_ids(list(texts)))]
    return [once[place % len(once)] for place in range(length)]


@torch.no_grad()
def _compare_logits(
    model: Any, prompts: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]], answers: Answers, kind: str
) -> str:
    """Log-probabilities of the likeliest next tokens after the beginnings of the prompts.

    Raises:
        RunError: they differ by more than the type's rounding explains.
    """
    size = 0.0
    apart: list[Tensor] = []  # of each prompt
    behind: list[float] = []  # the model's likeliest token is so much likelier than llama.cpp's
    for prompt, ends, found in zip(prompts, lengths, answers.next_tokens, strict=True):
        kept = torch.tensor(ends) - 1
        logits = model(input_ids=torch.tensor([list(prompt)]), logits_to_keep=kept).logits[0].float()
        size = max(size, (logits - logits.mean(-1, keepdim=True)).abs().max().item())
        here = []
        for ours, theirs in zip(logits.log_softmax(-1), found, strict=True):
            if theirs:
                pair = ours[torch.tensor(list(theirs))], torch.tensor(list(theirs.values()))
                wanted, given = (part.clamp(min=_LEAST_LOG_PROB) for part in pair)
                here.append((wanted - given).abs())
                behind.append((ours.max() - ours[next(iter(theirs))]).item())
        if here:
            apart.append(torch.cat(here))
    apart = [part / (size or 1.0) for part in apart]
    share = _MOST_OF_EXPERTS if kind != "f32" and any(hasattr(model.config, name) for name in NUM_EXPERTS) else _MOST
    # in f32 the last prompt by itself: a window shows in the long one alone
    parts = [apart[:-1], apart[-1:]] if kind == "f32" else [apart]
    groups = [torch.cat(part) for part in parts if part]
    most = max((group.quantile(share).item() for group in groups), default=math.nan)
    most = math.nan if any(group.isnan().any() for group in groups) else most
    allowed = _allowed(model.config, kind)
    others = sum(gap > 2 * allowed * size for gap in behind) / max(1, len(behind))
    if not (most <= allowed and others <= _CLEARLY_OTHER):
        other = f", and the likeliest token is clearly another at {others:.0%} of them" if others else ""
        raise RunError(
            f"llama.cpp's log-probabilities differ by {most:.1e} of the logits' size ({share:.0%} of them at "
            f"{len(behind)} positions differ less){other}; {kind} explains {allowed:.0e}. No files were kept.",
            code="exported-logits-differ",
        )
    return (
        f"{share:.0%} of the log-probabilities at {len(behind)} positions are within {most:.1e} of the logits' size "
        f"(allowed for {kind}: {allowed:.0e}), all within {torch.cat(apart).max():.1e}; the likeliest token agrees at "
        f"{sum(gap == 0 for gap in behind) / len(behind):.1%}"
    )


def _allowed(config: Any, kind: str) -> float:
    has_gelu = any("gelu" in str(getattr(config, name, "")) for name in _ACTIVATIONS)
    return max(TOLERANCE[kind], _GELU_TOLERANCE if has_gelu else 0.0)
