"""The card of a merged model: its base, its adapters, and what their own cards say of their training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.cards.card import describe_base, front_matter, load_model_lines
from tunesmith.cards.licence import CARD, base_licence, split_front
from tunesmith.cards.sections import DATA, RESULTS, TRAINING, licence_section, section_text
from tunesmith.display import to_markdown
from tunesmith.model.source import ModelSource
from tunesmith.reading import read_text

_LONGEST = 2**16  # characters of an adapter's card


def merged_card(
    title: str, source: ModelSource, adapters: Sequence[Path], weights: Sequence[float], method: str, is_chat: bool
) -> str:
    """README.md of a merged model.

    Args:
        title: name of its folder.
        source: of the base.
        is_chat: it has a chat template.
    """
    base, licence = to_markdown(describe_base(source)), base_licence(source)
    front = front_matter(source, False, licence.to_front() if licence else None)
    cards = [_read(adapter) for adapter in adapters]
    names = [to_markdown(_name(adapter)) for adapter in adapters]
    merged = f"{base} with the adapter {names[0]}"
    if len(adapters) > 1:
        each = [f"{name} (weight {weight:g})" for name, weight in zip(names, weights, strict=True)]
        merged = f"{base} with the adapters {', '.join(each)} ({method})"
    sections = [load_model_lines(is_chat)]
    for name, card in zip(names, cards, strict=True):
        of_it = f" of {name}" if len(adapters) > 1 else ""
        found = {heading: section_text(card, heading) for heading in (DATA, RESULTS, TRAINING)}
        sections += [f"## {heading}{of_it}\n\n{text}\n" for heading, text in found.items() if text]
    sections.append(licence_section(licence, base))
    return f"{front}# {to_markdown(title)}\n\n{merged} merged in by tunesmith.\n\n" + "\n".join(sections)


def _read(adapter: Path) -> str:
    try:
        return split_front(read_text(adapter / CARD, errors="replace")[:_LONGEST])[1]
    except OSError:
        return ""


def _name(adapter: Path) -> str:
    """RUN for RUN/adapter."""
    return adapter.parent.name if adapter.name == "adapter" else adapter.name
