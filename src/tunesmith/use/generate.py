"""A model folder opened for use, and replies streamed from it piece by piece."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.adapters.open_adapter import open_adapter
from tunesmith.config.runfile import read_yaml
from tunesmith.config.schema import DataSection, ModelSection
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.device import pick_device
from tunesmith.model.load import load_config, load_model, require_own_base
from tunesmith.model.source import ModelSource, find_model, telling_text
from tunesmith.model.tokenizer import build_encoder, load_tokenizer
from tunesmith.rows.conversation import Message


@dataclass(frozen=True)
class Speaker:
    """A loaded model that answers; it encodes with the same code as training.

    Attributes:
        context: tokens that a prompt and its reply may have together; None: no limit is known.
        adapter: peft's PeftModel around the model, where adapters were opened.
        adapters: name of an opened adapter, as it is shown -> its name in peft.
    """

    model: nn.Module
    encoder: Encoder
    context: int | None = None
    adapter: Any = None
    adapters: Mapping[str, str] = field(default_factory=dict)

    @property
    def adapter_names(self) -> list[str]:
        return list(self.adapters)

    def switch(self, name: str) -> None:
        """Answer with another of the opened adapters; "base": with none."""
        if name == "base":
            self.adapter.base_model.disable_adapter_layers()
        else:
            self.adapter.base_model.enable_adapter_layers()
            self.adapter.set_adapter(self.adapters[name])

    def room_for_reply(self, prompt_tokens: int, wanted: int) -> int:
        """New tokens that still fit behind a prompt, at most `wanted`.

        Raises:
            ModelError: none does.
        """
        if self.context is None:
            return wanted
        if prompt_tokens >= self.context:
            raise ModelError(
                f"the conversation has {prompt_tokens:,} tokens and the model's context {self.context:,}, so no reply "
                "fits. Forget the conversation (/reset in the chat), or write less."
            )
        return min(wanted, self.context - prompt_tokens)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a reply is drawn. temperature None: as the model's generation_config says; 0: greedy."""

    max_new_tokens: int = 512
    temperature: float | None = None
    seed: int = 0


def load_speaker(
    section: ModelSection,
    chat_template: str | None = None,
    more: Sequence[str] = (),
    allow_changed_base: bool = False,
) -> Speaker:
    """Open a model for talking; a run is talked to with the template and its variables that it was trained with.

    Args:
        more: further adapters of the same base, to switch to.
        allow_changed_base: open adapters on a base that is not the one they were trained on any more.
    """
    if section.path.startswith("new:"):
        raise ModelError(
            f"{section.path}: has random weights, so nothing to say. Chat needs trained ones: a run, a model folder or "
            f"a hub id. To make some: tunesmith train --model {section.path} --tokenizer T --data D --output RUN"
        )
    tokenizer = load_tokenizer(section)
    trained = _trained_data_section(Path(section.path).expanduser())
    if chat_template is None and trained.get("chat_template") == "none":
        chat_template = "none"  # any other template was saved beside the weights
    encoder = build_encoder(tokenizer, chat_template, trained.get("template_kwargs") or {}, datetime.datetime.now())
    config = load_config(section, tokenizer)
    device = pick_device()
    dtype = getattr(config, "dtype", None) or torch.float32
    if device.type == "cpu":
        dtype = torch.float32  # half precision is slow or missing on CPUs
    source = find_model(section.path)
    plain = section.model_copy(update={"path": source.name, "revision": source.revision}) if source.adapter else section
    model = load_model(plain, config, dtype, seed=0)
    adapter, names = None, {}
    if source.adapter or more:
        adapter, names = open_all(model, source, [section.path, *more], allow_changed_base)
    model.to(device).eval()
    learnt = getattr(config.get_text_config(), "max_position_embeddings", None)
    context = max(learnt, trained.get("max_seq_len") or 0) if learnt else None  # a run may have gone beyond
    return Speaker(model, encoder, context, adapter, names)


def open_all(
    model: nn.Module, first: ModelSource, paths: Sequence[str], allow_changed_base: bool = False
) -> tuple[Any, dict[str, str]]:
    """(peft's PeftModel with adapters of one base, the first active; name of its run or folder -> peft's name of it).

    Raises:
        ModelError: one of them is not an adapter, or has another base.
    """
    wrapped, names = None, {}
    for path in paths:
        source = find_model(path)
        if source.adapter is None:
            raise ModelError(f"{path}: is no adapter, so it cannot be switched to beside others.")
        if source.name != first.name:
            raise ModelError(f"{path}: its base is {source.name}, not {first.name} as that of {paths[0]}.")
        if remark := require_own_base(source, allow_changed_base, _ON_CHANGED):
            print(f"note: {remark}", file=sys.stderr)
        folder = source.adapter.resolve()
        name = folder.parent.name if folder.name == "adapter" else folder.name
        name = name if name not in (*names, "base") else f"{name}-{len(names) + 1}"
        # a name of ours inside: peft looks for it in names of parameters, where "bias" or "lora" stand already
        names[name] = f"adapter_{len(names) + 1}_of_chat"
        wrapped = open_adapter(model, source.adapter, names[name], onto=wrapped)
    assert wrapped is not None
    wrapped.set_adapter(next(iter(names.values())))
    return wrapped, names


_ON_CHANGED = "To talk to the adapter on this one all the same: --allow-changed-base."


def _trained_data_section(path: Path) -> dict[str, Any]:
    """data: of a run's own config; empty for a model that is no run."""
    path = path.resolve()
    for folder in (path, *path.parents[:2]):  # RUN, RUN/model, RUN/checkpoints/step-N
        if (folder / "config.yaml").is_file() and (folder / "data_ledger.json").is_file():
            return _data_section(folder / "config.yaml")
    return {}


def _data_section(file: Path) -> dict[str, Any]:
    try:
        return DataSection.model_validate({"train": ["?"]} | dict(read_yaml(file).get("data") or {})).model_dump()
    except (ValueError, TypeError) as error:  # pydantic's is a ValueError
        raise ConfigError(str(file), [f"data: is not what a run writes there: {telling_text(error)}"]) from None


@torch.no_grad()
def generate_ids(
    speaker: Speaker, prompt: list[int], sampling: Sampling, on_token: Callable[[int], None] | None = None
) -> list[int]:
    """Ids of the reply, its stop token included where it stopped by itself."""
    torch.manual_seed(sampling.seed)
    config = speaker.model.generation_config
    options: dict[str, Any] = {"max_new_tokens": speaker.room_for_reply(len(prompt), sampling.max_new_tokens)}
    if sampling.temperature == 0:
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    elif sampling.temperature is not None:
        options |= {"do_sample": True, "temperature": sampling.temperature}
    stops = config.eos_token_id if config.eos_token_id is not None else speaker.encoder.stop.id
    stops = [*speaker.encoder.stop_ids, *(stops if isinstance(stops, list) else [stops])]
    pad = config.pad_token_id if config.pad_token_id is not None else speaker.encoder.stop.id
    ids = torch.tensor([prompt], device=next(speaker.model.parameters()).device)
    try:
        output = speaker.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            eos_token_id=sorted(set(stops)),
            pad_token_id=pad,
            streamer=_TokenStreamer(on_token) if on_token else None,
            **options,
        )
    except (ValueError, TypeError, AttributeError) as error:  # settings of generation_config.json that make no sense
        raise ModelError(
            f"the model's generation_config.json cannot be used: {telling_text(error)}. Correct or remove it."
        ) from None
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise ModelError("the model computes no probabilities (inf or nan): its weights are damaged.") from None
    return output[0, len(prompt) :].tolist()


class _TokenStreamer:
    """What `generate` calls with each new token; the first call carries the prompt."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self._on_token(int(value.reshape(-1)[0]))
        self._has_prompt = True

    def end(self) -> None:
        pass


class PieceDecoder:
    """Tokens to printable pieces: holds back bytes of an unfinished character, drops the stop token."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token_id: int) -> str:
        if token_id in self._encoder.stop_ids:
            return ""
        self._ids.append(token_id)
        text = self._encoder.tokenizer.decode(self._ids, skip_special_tokens=False)
        if text.endswith("\ufffd"):
            return ""
        piece = text[len(self._shown) :]
        self._shown = text
        return piece


def decode_reply(encoder: Encoder, ids: Sequence[int]) -> str:
    """Text of a reply without its stop token."""
    kept = [i for i in ids if i not in encoder.stop_ids and i != encoder.eos_id]
    return str(encoder.tokenizer.decode(kept, skip_special_tokens=False))


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply's text without its stop token, and whether it stopped by itself."""

    text: str
    has_stopped: bool


@torch.no_grad()
def answer_all(speaker: Speaker, questions: Sequence[str], sampling: Sampling, batch_size: int = 32) -> list[Reply]:
    """Greedy replies to many questions, each a conversation of its own, in batches padded on the left."""
    prompts = [speaker.encoder.encode_prompt([Message("user", question)]) for question in questions]
    stops, device = speaker.encoder.stop_ids, next(speaker.model.parameters()).device
    replies: dict[int, Reply] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # equal lengths pad least
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), width), stops[0])
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        output = speaker.model.generate(
            ids.to(device), attention_mask=mask.to(device), do_sample=False,
            max_new_tokens=speaker.room_for_reply(width, sampling.max_new_tokens),
            eos_token_id=stops, pad_token_id=stops[0],
        )  # fmt: skip
        for row, index in enumerate(chosen):
            reply = output[row, width:].tolist()
            end = next((at for at, token in enumerate(reply) if token in stops), None)
            replies[index] = Reply(decode_reply(speaker.encoder, reply[:end]), end is not None)
    return [replies[index] for index in range(len(prompts))]
