"""Open a model folder for generation."""

from __future__ import annotations

import copy
import datetime
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.adapters.open_adapter import open_adapter
from tunesmith.caches.selfcheck import CacheCheck, check_cache
from tunesmith.config.data_keys import DataSection
from tunesmith.config.runfile import read_yaml
from tunesmith.config.schema import ModelSection
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import ConfigError, ModelError
from tunesmith.generation.batcher import Batcher, Token
from tunesmith.generation.request import Request
from tunesmith.generation.sampling import Sampling, unapplied_settings
from tunesmith.model.device import pick_device
from tunesmith.model.load import load_config, load_model, require_own_base
from tunesmith.model.source import ModelSource, find_model, telling_text
from tunesmith.model.tokenizer import build_encoder, load_tokenizer
from tunesmith.runfolder import RunFolder, latest_stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Speaker:
    """A loaded model with its encoder, which is the one used in training.

    Attributes:
        context: largest number of tokens of a prompt and its reply together; None if unknown.
        adapter: peft's PeftModel around the model, if adapters were opened.
        adapters: displayed name of an opened adapter -> its name in peft.
    """

    model: nn.Module
    encoder: Encoder
    context: int | None = None
    adapter: Any = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    _chosen: list[str] = field(default_factory=list)
    _unread: dict[int, list[Token]] = field(default_factory=dict)

    @property
    def adapter_names(self) -> list[str]:
        return list(self.adapters)

    @property
    def active(self) -> str:
        """Name of the adapter in use; "base" where there is none."""
        return self._chosen[-1] if self._chosen else next(iter(self.adapters), "base")

    def switch(self, name: str) -> None:
        """Use another of the opened adapters; "base" uses none."""
        if name == self.active:
            return
        if name == "base":
            self.adapter.base_model.disable_adapter_layers()
        else:
            self.adapter.base_model.enable_adapter_layers()
            self.adapter.set_adapter(self.adapters[name])
        self._chosen[:] = [name]

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Another adapter for one forward or some.

        peft's own switching also walks over all weights (to say which are trained), which would take longer than the
        forward of a small model. Here its layers are told which adapter they apply, and nothing else.
        """
        if name == self.active:
            yield
            return
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self._tuned_layers]
        try:
            for layer in self._tuned_layers:
                layer._disable_adapters = name == "base"
                if name != "base":
                    layer._active_adapter = [self.adapters[name]]
            yield
        finally:
            for layer, (active, is_disabled) in zip(self._tuned_layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, is_disabled

    @cached_property
    def _tuned_layers(self) -> list[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    def resolve_adapter(self, name: str | None) -> str:
        """The name of an opened adapter, or "base".

        Args:
            name: None means the one in use.

        Raises:
            ModelError: no such adapter is open.
        """
        if name is None:
            return self.active
        if name not in (*self.adapters, "base"):
            known = ", ".join([*self.adapters, "base"])
            raise ModelError(f"{name!r}: no such adapter is open; open are: {known}", code="unknown-adapter")
        return name

    @cached_property
    def cache_check(self) -> CacheCheck:
        """Whether rows of this model can be computed together, by a test on it."""
        check = check_cache(self.model, self.context)
        if check.remark:
            logger.warning("note: replies are computed one by one: %s", check.remark)
        return check

    @cached_property
    def batcher(self) -> Batcher:
        """The generator of `generate`; it keeps caches of earlier conversations.

        It gets a copy of this object: two that name each other would keep the model, and the files that its weights
        are mapped from, until the garbage collector runs.
        """
        return Batcher(copy.copy(self))

    @cached_property
    def num_embeddings(self) -> int:
        """Number of token ids that the model knows."""
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        return int(embeddings.weight.shape[0])

    def room_for_reply(self, prompt_tokens: int, wanted: int) -> int:
        """Number of new tokens that fit after a prompt, at most `wanted`.

        Raises:
            ModelError: none fits.
        """
        if self.context is None:
            return wanted
        if prompt_tokens >= self.context:
            raise ModelError(
                f"the conversation has {prompt_tokens:,} tokens and the model's context is {self.context:,}, so no "
                "reply fits. Start a new conversation or write less.",
                code="context-full",
            )
        return min(wanted, self.context - prompt_tokens)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which generation stops."""
        return frozenset(find_stop_ids(self.model, self.encoder))

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Token]:
        """Tokens of the replies to prompts (as ids) as they are generated, stop tokens included.

        Raises:
            ModelError: no reply fits the context, or the model's generation_config or weights cannot be used.
        """
        if not sampling.max_new_tokens:
            return
        batcher, rows = self.batcher, {}
        is_ending = sys.is_finalizing  # a local name: at the end of Python those of modules are gone
        try:
            for place, ids in enumerate(prompts):
                rows[batcher.submit(Request(ids, sampling))] = place
            while rows:
                for token in self._next_tokens(rows):
                    place = rows[token.row]
                    if token.error is not None:
                        raise token.error
                    if token.is_last:
                        del rows[token.row]
                    yield replace(token, row=place)
        finally:
            for row in () if is_ending() else rows:
                batcher.cancel(row)
                self._unread.pop(row, None)

    def _next_tokens(self, rows: Mapping[int, int]) -> list[Token]:
        """Tokens of these rows; those of other callers' rows are put aside for them."""
        found = [token for row in rows for token in self._unread.pop(row, ())]
        if found:
            return found
        for token in self.batcher.step():
            if token.row in rows:
                found.append(token)
            else:
                self._unread.setdefault(token.row, []).append(token)
        return found


def find_stop_ids(model: Any, encoder: Encoder) -> tuple[int, ...]:
    """Ids that end a reply: the template's stop tokens first, then those of the model's generation_config.

    Raises:
        ModelError: generation_config has something else than ids.
    """
    config = getattr(model, "generation_config", None)
    own = config.eos_token_id if config is not None else None
    models = own if isinstance(own, list) else [own] if own is not None else []
    if not all(isinstance(token, int) for token in models):
        raise ModelError(
            f"the model's generation_config.json cannot be used: eos_token_id is {own!r}, not token ids. Correct or "
            "remove it.",
            code="generation-config",
        )
    return tuple(dict.fromkeys([*encoder.stop_ids, *models]))


def load_speaker(
    section: ModelSection,
    chat_template: str | None = None,
    more: Sequence[str] = (),
    allow_changed_base: bool = False,
) -> Speaker:
    """Open a model for generation; a run is opened with the template and the variables that it was trained with.

    Args:
        more: further adapters of the same base, for `switch`.
        allow_changed_base: open adapters even if their base has changed since they were trained.
    """
    if section.path.startswith("new:"):
        raise ModelError(
            f"{section.path}: has random weights. Chat needs a trained model: a run, a model folder or a hub id. To "
            f"train one: tunesmith train --model {section.path} --tokenizer T --data D --output RUN",
            code="random-weights",
        )
    tokenizer = load_tokenizer(section)
    trained, _ = trained_data(section.path)
    if chat_template is None and trained.get("chat_template") == "none":
        chat_template = "none"  # any other template is saved with the weights
    encoder = build_encoder(tokenizer, chat_template, trained.get("template_kwargs") or {}, datetime.datetime.now())
    config = load_config(section, tokenizer)
    device = pick_device()
    dtype = getattr(config, "dtype", None) or torch.float32
    if device.type == "cpu":
        dtype = torch.float32  # half precision is slow or missing on CPUs
    source = find_model(section.path, section.config)
    plain = section.model_copy(update={"path": source.name, "revision": source.revision}) if source.adapter else section
    model = load_model(plain, config, dtype, seed=0)
    adapter: Any = None
    names: dict[str, str] = {}
    if source.adapter or more:
        adapter, names = open_all(model, source, [section.path, *more], allow_changed_base)
    model.to(device).eval()
    if ignored := unapplied_settings(getattr(model, "generation_config", None)):
        logger.warning("note: %s: generation_config.json sets %s, which is ignored here: replies are sampled one token "
                       "at a time.", section.path, ", ".join(ignored))  # fmt: skip
    learned = getattr(config.get_text_config(), "max_position_embeddings", None)
    context = max(learned, trained.get("max_seq_len") or 0) if learned else None  # a run may have used longer samples
    return Speaker(model, encoder, context, adapter, names)


def open_all(
    model: nn.Module, first: ModelSource, paths: Sequence[str], allow_changed_base: bool = False
) -> tuple[Any, dict[str, str]]:
    """(PeftModel with adapters of one base, the first one active; displayed name of each adapter -> its name in peft).

    Raises:
        ModelError: one of them is not an adapter, or has another base.
    """
    wrapped: Any = None
    names: dict[str, str] = {}
    for path in paths:
        source = find_model(path)
        if source.adapter is None:
            raise ModelError(
                f"{path}: is not an adapter. Give PEFT folders or runs that trained an adapter.", code="not-an-adapter"
            )
        if source.name != first.name:
            raise ModelError(
                f"{path}: its base is {source.shown}, not {first.shown} as that of {paths[0]}.", code="bases-differ"
            )
        if remark := require_own_base(source, allow_changed_base, _ON_CHANGED):
            logger.warning("note: %s", remark)
        folder = source.adapter.resolve()
        name = folder.parent.name if folder.name == "adapter" else folder.name
        name = name if name not in (*names, "base") else f"{name}-{len(names) + 1}"
        # peft searches parameter names for the adapter's name, so a run named "bias" or "lora" would match others
        names[name] = f"adapter_{len(names) + 1}_of_chat"
        wrapped = open_adapter(model, source.adapter, names[name], onto=wrapped)
    assert wrapped is not None
    wrapped.set_adapter(next(iter(names.values())))
    return wrapped, names


_ON_CHANGED = "To use the changed base anyway: --allow-changed-base."


def trained_data(name: str) -> tuple[dict[str, Any], RunFolder | None]:
    """The data section of the run that a name belongs to, and its folder; ({}, None) for a model outside of a run."""
    path = latest_stage(Path(name).expanduser().resolve())
    for folder in (path, *path.parents[:2]):  # RUN, RUN/model, RUN/checkpoints/step-N
        run = RunFolder(folder)
        if run.config.is_file() and run.ledger.is_file():
            return _data_section(run.config), run
    return {}, None


def _data_section(file: Path) -> dict[str, Any]:
    try:
        return DataSection.model_validate({"train": ["?"]} | dict(read_yaml(file).get("data") or {})).model_dump()
    except (ValueError, TypeError) as error:  # pydantic's is a ValueError
        raise ConfigError(str(file), [f"data: is not as written by tunesmith: {telling_text(error)}"]) from None
