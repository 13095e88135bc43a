"""The section `data`: what is trained on, and how its rows become labels."""

from __future__ import annotations

import difflib
import encodings.aliases
from typing import Any, Literal

from pydantic import Field, field_validator

from tunesmith.config.plainyaml import require_plain
from tunesmith.config.section import Section
from tunesmith.config.sources import Source, read_sources

_MOST_WORKERS = 1024


class FieldsSection(Section):
    prompt: str | None = None
    """Column with the question: a string, or a list of messages. Dots reach inside: instances.0.input."""
    completion: str | None = None
    """Column with the answer: a string, one message, or a list of messages."""
    messages: str | None = None
    """Column with the list of turns."""
    role: str | None = None
    """Key of a turn with the speaker (default: role or from)."""
    content: str | None = None
    """Key of a turn with the text (default: content or value)."""
    system: str | None = None
    """Column with the system prompt."""
    history: str | None = None
    """Column with earlier turns: [question, answer] pairs, dicts of the two, or messages."""
    reasoning: str | None = None
    """Column with the reasoning before the answer (chain of thought)."""
    tools: str | None = None
    """Column with the tool schemas, a list or JSON text."""
    instruction: str | None = None
    """Column with an alpaca instruction."""
    input: str | None = None
    """Column with an alpaca input or other context; appended to the question after a line break."""
    output: str | None = None
    """Column with an alpaca output."""
    text: str | None = None
    """Column with raw text, a string or a list of lines."""
    label: str | None = None
    """Column of true/false (as in KTO data): rows with false are left out."""


def explain_encoding(name: str) -> str | None:
    """Why a name is not a text encoding; None if it is one."""
    try:
        "a".encode(name)
    except (LookupError, ValueError):
        known = {*encodings.aliases.aliases, *encodings.aliases.aliases.values()} - {"u8", "u16", "u32", "utf"}
        close = difflib.get_close_matches(name.lower().replace("-", "_"), sorted(known), n=1, cutoff=0.6)
        hint = f"did you mean {close[0].replace('_', '-')}?" if close else "give utf-8, gb18030 or cp1252, for one"
        return f"{name!r} is not the name of a text encoding; {hint}"
    return None


class DataSection(Section):
    train: list[Source]
    """File(s), folder, glob or hub id (owner/name, owner/name:split) to train on. In YAML an item may be a source with
    path, name, weight, epochs and limit."""
    eval: list[str] | None = None
    """Held-out data in the same forms, never trained on."""
    eval_split: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the training rows held out for evaluation, drawn by the seed."""
    format: Literal[
        "auto", "messages", "sharegpt", "prompt_completion", "alpaca", "query_response", "input_output", "xtuner",
        "xlam", "chatgpt_export", "segments", "text",
    ] = "auto"  # fmt: skip
    """Format of the rows; auto detects it from their keys."""
    fields: FieldsSection = Field(default_factory=FieldsSection)
    """Column of each part, as in --data.fields.prompt question."""
    ignore_columns: list[str] = Field(default_factory=list)
    """Columns and keys of turns to ignore; other unread ones are named, or refuse the row as context."""
    chat_template: str | None = None
    """A .jinja file, chatml, alpaca, or none (prompt + completion + EOS); default: the model's own."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the template, as in --data.template_kwargs.enable_thinking false."""
    max_seq_len: int | None = Field(default=None, ge=8)
    """Longest sample in tokens; default: 2048, or the model's context where that is shorter."""
    overlong: Literal["truncate", "drop", "split", "error"] = "truncate"
    """A chat longer than max_seq_len: cut its end, drop it, split it, or fail. Raw text is always split."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which tokens of a chat are trained: every reply, the last reply, or everything, the questions too."""
    train_reasoning: bool = True
    """Train the reasoning before </think>; off: it is context only."""
    system_prompts: list[str] = Field(default_factory=list)
    """System prompts to add to training chats without one and without tools, one drawn for each by the seed."""
    system_prompt_share: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of these chats that get a system prompt, drawn by the seed."""
    empty_think_share: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the training rows that keep the empty think block which the template writes, drawn by the seed."""
    history: Literal["auto", "unroll", "last_turn"] = "auto"
    """One sample for all turns where the template allows it (auto), one per turn (unroll), or only the last turn."""
    control_text: Literal["plain", "refuse", "allow"] = "plain"
    """Text that spells a control token (<|im_end|>): encode it as plain text, refuse the row, or allow the token."""
    max_refused: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of bad rows above which the command fails."""
    max_cut_replies: float = Field(default=0.25, ge=0.0, le=1.0)
    """Share of the trained replies cut before their stop token (overlong truncate) above which a run does not start."""
    share_prefix: Literal["auto"] | bool = "auto"
    """Compute tokens with which several samples begin once for all of them; auto: where that saves a tenth or more."""
    stream: bool = False
    """For data larger than the disk: read and label rows just ahead of training. Needs train.max_steps; shuffles within
    windows of rows."""
    limit: int | None = Field(default=None, ge=1)
    """Read only this many rows of the training data."""
    encoding: str = "utf-8"
    """Encoding of text files (CSV, JSON, text): gb18030, cp1252, utf-16 or another Python name."""
    max_row_mb: float = Field(default=16.0, gt=0.0, le=1000.0)
    """Largest row in MB; a larger one is refused and never parsed. A .txt or .md file may have any size."""
    workers: Literal["auto"] | int = "auto"
    """Processes that label rows; auto: one for each core where the data are large; 0 or 1: none besides the command."""
    cache: Literal["auto"] | bool = "auto"
    """Keep prepared data in the cache folder for the next start; auto: those of files of 32 MB and more together."""

    @field_validator("train", mode="before")
    @classmethod
    def _read_train(cls, given: Any) -> Any:
        return read_sources(given)

    @field_validator("template_kwargs")
    @classmethod
    def _keep_template_kwargs(cls, variables: dict[str, Any]) -> dict[str, Any]:
        require_plain(variables)
        ours = ("messages", "tools", "add_generation_prompt", "strftime_now", "raise_exception")
        if own := [name for name in ours if name in variables]:
            raise ValueError(f"sets {own[0]}, which tunesmith sets itself; leave it out")
        return variables

    @field_validator("system_prompts")
    @classmethod
    def _keep_system_prompts(cls, prompts: list[str]) -> list[str]:
        if any(not prompt.strip() for prompt in prompts):
            raise ValueError("holds an empty text")
        if any("\ud800" <= char <= "\udfff" for prompt in prompts for char in prompt):
            raise ValueError("holds a lone surrogate (half a character), which no tokenizer can encode")
        return prompts

    @field_validator("workers")
    @classmethod
    def _keep_workers(cls, number: Literal["auto"] | int) -> Literal["auto"] | int:
        if isinstance(number, int) and not 0 <= number <= _MOST_WORKERS:
            raise ValueError(f"must be auto or a number from 0 to {_MOST_WORKERS}, not {number}")
        return number

    @field_validator("encoding")
    @classmethod
    def _know_encoding(cls, name: str) -> str:
        problem = explain_encoding(name)
        if problem:
            raise ValueError(problem)
        return name
