"""Load tokenizers, bind them to a chat template, and write them."""

from __future__ import annotations

import datetime
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer

from tunesmith.chat_template.template import ChatTemplate, RenderSettings, find_template, require_template_file
from tunesmith.config.data_keys import DataSection
from tunesmith.config.schema import ModelSection
from tunesmith.encode.encoder import Encoder, bos_ids
from tunesmith.errors import ModelError
from tunesmith.minimind.read import is_weight_file
from tunesmith.model.source import ModelSource, explain_load_error, find_model, open_path, require_plain_files


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """Where a tokenizer is loaded from.

    Attributes:
        folder: a folder or a hub id.
        revision: of a hub id.
        is_models: whether it comes with a model's config.json, which transformers then reads as well.
    """

    folder: str
    revision: str | None
    is_models: bool


def find_tokenizer(section: ModelSection, model: ModelSource | None = None) -> TokenizerSource:
    """Where the tokenizer of the run is: model.tokenizer, else with the model or its adapter.

    Args:
        model: result of find_model(section.path), if already known.
    """
    name = section.tokenizer or section.path
    if name.startswith("new:"):
        raise ModelError(
            f"{name} has random weights and no tokenizer. Give one: --tokenizer FOLDER (any Hugging Face tokenizer).",
            code="tokenizer-missing",
        )
    revision = section.revision if name == section.path else None
    if section.tokenizer and open_path(name).is_dir():  # a tokenizer folder needs no config.json
        require_plain_files(open_path(name))
        return TokenizerSource(str(open_path(name)), revision, is_models=False)
    if section.tokenizer is None and is_weight_file(Path(section.path)):
        raise ModelError(
            f"{name}: a .pth has no tokenizer. Give its folder with --tokenizer (MiniMind's is its folder model/).",
            code="pth-without-tokenizer",
        )
    source = model if model and name == section.path else find_model(name, section.config)
    if source.adapter and (source.adapter / "tokenizer_config.json").is_file():
        return TokenizerSource(str(source.adapter), revision, is_models=False)
    return TokenizerSource(source.name, revision, is_models=name == section.path)


def load_tokenizer(section: ModelSection, source: TokenizerSource | None = None) -> Any:
    """Load the tokenizer of the run, with model.add_tokens.

    Args:
        source: from find_tokenizer, if already known.
    """
    return extend_tokenizer(section, source)[0]


def extend_tokenizer(section: ModelSection, source: TokenizerSource | None = None) -> tuple[Any, list[str]]:
    """Load the tokenizer of the run, add the tokens of model.add_tokens that it lacks, and name these.

    Args:
        source: from find_tokenizer, if already known.

    Returns:
        The tokenizer, and the tokens without an id so far. A token that it already has keeps its id, its settings and,
        in the model, its trained row.
    """
    source = source or find_tokenizer(section)
    name, trust = section.tokenizer or section.path, section.trust_remote_code
    require_template_file(source.folder)
    try:
        if source.is_models:
            AutoConfig.from_pretrained(
                source.folder, revision=source.revision, trust_remote_code=trust
            )  # a single file: fails at once without a network
        tokenizer = AutoTokenizer.from_pretrained(source.folder, revision=source.revision, trust_remote_code=trust)
        is_usable = len(tokenizer) > 0 and bool(tokenizer("a")["input_ids"])
    except Exception as error:
        raise explain_load_error(name, "its config or tokenizer", error) from None
    if not is_usable:
        raise ModelError(
            f"{name}: the folder has no usable tokenizer (tokenizer.json or vocab files). Give one with --tokenizer.",
            code="tokenizer-unusable",
        )
    known, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    # matched literally: no other text may be normalized to them
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in section.add_tokens if text not in added])
    return tokenizer, [text for text in dict.fromkeys(section.add_tokens) if text not in known]


def load_encoder(
    model: ModelSection, data: DataSection, date: datetime.datetime, source: TokenizerSource | None = None
) -> Encoder:
    """Load tokenizer and chat template of a run, for training and preview alike.

    Args:
        source: from find_tokenizer, if already known.
    """
    return build_encoder(
        load_tokenizer(model, source), data.chat_template, data.template_kwargs, date, data.control_text
    )


def build_encoder(
    tokenizer: Any,
    chat_template: str | None,
    template_kwargs: dict[str, Any],
    date: datetime.datetime,
    control_text: str = "plain",
) -> Encoder:
    defaults = RenderSettings(date, template_kwargs)
    if chat_template == "none":
        return Encoder(tokenizer, None, defaults, control_text)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    text, source, is_fallback = find_template(
        chat_template, tokenizer.chat_template, special, add_bos=bool(bos_ids(tokenizer))
    )
    return Encoder(tokenizer, ChatTemplate(text, source, special, is_fallback), defaults, control_text)


def write_tokenizer(encoder: Encoder, folder: Path) -> None:
    tokenizer = encoder.tokenizer
    # do not save a template that was not used in training
    tokenizer.chat_template = encoder.template.text if encoder.template is not None else None
    tokenizer.save_pretrained(folder)
    _complete_config(tokenizer, folder / "tokenizer_config.json")


def _complete_config(tokenizer: Any, file: Path) -> None:
    """Complete tokenizer_config.json with what save_pretrained omits, or writes for transformers 5 only."""
    config = json.loads(file.read_text(encoding="utf-8"))
    # LlamaTokenizer reads `legacy`, on which its ids depend, and does not save it
    for name in inspect.signature(type(tokenizer).__init__).parameters:
        if isinstance(value := getattr(tokenizer, name, None), bool):
            config.setdefault(name, value)
    if config.get("tokenizer_class") == "TokenizersBackend":  # unknown to transformers 4; both know the older name
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
