"""Compare what llama.cpp makes of a GGUF file with the model that it was written from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tunesmith.encode.encoder import Encoder
from tunesmith.errors import RunError
from tunesmith.gguf.chats import ProbeChat, probe_chats
from tunesmith.gguf.fuzz import draw_texts
from tunesmith.gguf.reader import Answers, Job, ask
from tunesmith.gguf.vocabulary import Vocabulary

# Difference of log-probabilities, as a share of the largest logit, that 99% must keep to. llama.cpp rounds the
# activations too where weights are not fp32, and rounding may choose another expert at a few positions.
TOLERANCE = {"f32": 1e-4, "f16": 5e-3, "bf16": 4e-2, "q8_0": 1.2e-1}
_GELU_TOLERANCE = 1e-3  # llama.cpp looks the GELU of GPT-2 and Gemma up in a table of half precision
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
_NUM_FUZZ, _NUM_ADDED, _MOST_CONTEXT = 500, 100, 4096
_LEAST_LOG_PROB = -80.0  # fp32 has no probabilities much smaller; llama.cpp then reports the smallest fp32 number
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
    kind: str,
    context: int,
) -> Finding:
    """Open the file with llama.cpp and compare ids, template, stop tokens and logits.

    Args:
        model: in fp32; None if it does not fit into memory, then logits are not compared.
        texts: of the run's rows, or usual ones.
        kind: type of the file's matrices.

    Raises:
        RunError: llama.cpp cannot read the file, or its logits or stop tokens differ.
    """
    renderer = encoder.renderer()
    chats = list(probe_chats(renderer)) if renderer is not None else []
    fuzz = draw_texts(_NUM_FUZZ)
    prompts = [encoder.encode_texts([chat.text])[0].ids for chat in chats if "tools" not in chat.request]
    prompts += [[*encoder.bos_ids, *ids] for ids in encoder.encode_ids(list(texts[:8]))]
    prompts = [list(ids)[: min(_MOST_PROMPT, context - 1)] for ids in prompts if len(ids)]
    lengths = [_spread(len(ids)) for ids in prompts]
    if model is not None:
        prompts.append(_long_prompt(encoder, texts, model.config, min(context, _MOST_CONTEXT)))
        lengths.append(list(range(len(prompts[-1]), 0, -_PAST_WINDOW // _NUM_LONG_LENGTHS))[:_NUM_LONG_LENGTHS])
    else:
        lengths = [[] for _ in prompts]
    texts = [*texts, *_around_added(encoder), *(chat.text for chat in chats)]
    job = Job(
        file, [*texts, *fuzz], [chat.request for chat in chats], prompts, lengths, _NUM_PROBS, encoder.stop_ids,
        min(context, _MOST_CONTEXT),
    )  # fmt: skip
    answers = ask(job)
    finding = Finding([], has_logits=model is not None)
    _compare_ids(finding, encoder, vocabulary, answers, texts, fuzz)
    _compare_template(finding, encoder, chats, answers, job.context)
    if missing := [token for token in encoder.stop_ids if token not in answers.stopping]:
        raise RunError(
            f"llama.cpp does not stop at {encoder.tokenizer.convert_ids_to_tokens(missing[0])!r}, which ends this "
            "model's replies. No files were kept.",
            code="stop-token-ignored",
        )
    if model is not None:
        finding.lines.append(_compare_logits(model, prompts, lengths, answers, kind))
    else:
        finding.lines.append("logits not compared: the file and the model do not fit into memory together")
    return finding


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
    largest, places, agreeing = 0.0, 0, 0
    apart = [torch.zeros(0)]
    for prompt, ends, found in zip(prompts, lengths, answers.next_tokens, strict=True):
        kept = torch.tensor(ends) - 1
        logits = model(input_ids=torch.tensor([list(prompt)]), logits_to_keep=kept).logits[0].float()
        largest = max(largest, logits.abs().max().item())
        for ours, theirs in zip(logits.log_softmax(-1), found, strict=True):
            if theirs:
                pair = ours[torch.tensor(list(theirs))], torch.tensor(list(theirs.values()))
                wanted, given = (part.clamp(min=_LEAST_LOG_PROB) for part in pair)
                apart.append((wanted - given).abs())
                places, agreeing = places + 1, agreeing + int(ours.argmax().item() == next(iter(theirs)))
    differences = torch.cat(apart) / (largest or 1.0)
    most = differences.quantile(0.99).item() if len(differences) else math.nan
    allowed = TOLERANCE[kind]
    if any("gelu" in str(getattr(model.config, name, "")) for name in _ACTIVATIONS):
        allowed = max(allowed, _GELU_TOLERANCE)
    if not most <= allowed:
        raise RunError(
            f"llama.cpp's log-probabilities differ by {most:.1e} of the largest logit (99% of them at {places} "
            f"positions differ less), more than the {allowed:.0e} that {kind} explains. No files were kept.",
            code="exported-logits-differ",
        )
    return (
        f"99% of the log-probabilities at {places} positions are within {most:.1e} of the largest logit (allowed for "
        f"{kind}: {allowed:.0e}), all within {differences.max():.1e}; the likeliest token agrees at "
        f"{agreeing / places:.1%}"
    )
