"""The card as it is published: the folder's own README.md, completed with what was learned after it was written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.adapters.adapter_config import read_adapter_config
from tunesmith.adapters.base import read_record
from tunesmith.cards.card import (
    COMMANDS_HERE,
    HERE,
    find_cached,
    front_matter,
    load_adapter_lines,
    load_model_lines,
    write_front,
)
from tunesmith.cards.licence import CARD, Licence, find_licence, read_licence, split_front
from tunesmith.cards.sections import (
    DATA,
    LICENCE,
    RESULTS,
    data_section,
    has_section,
    licence_section,
    name_data,
    put_section,
    results_section,
    section_text,
)
from tunesmith.display import one_line, to_markdown
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.evaluation.records import SCORES, Evaluation, EvaluationFolder, ModelResult, Score, read_evaluation
from tunesmith.model.source import ModelSource, open_path
from tunesmith.publish.bundle import Bundle
from tunesmith.publish.private import is_path, run_cwd
from tunesmith.reading import read_text
from tunesmith.report.records import RunRecords
from tunesmith.report.replies import kept_replies
from tunesmith.runfolder import RunFolder, moved_in_run
from tunesmith.streaming.ledger import load_ledger

EVALUATION, REPLIES = "Evaluation", "Sample replies"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_UNKNOWN = ("Unknown: ", "None stated.")  # how our own section begins where nothing was known


@dataclass(frozen=True, slots=True)
class Base:
    """What a model or adapter was trained from.

    Attributes:
        name: as the run or adapter names it; "" where it is not known.
        hub: its hub id; "" where it has none.
        revision: of a hub base.
    """

    name: str
    hub: str
    revision: str | None = None

    @property
    def folder(self) -> Path | None:
        """On this machine."""
        return Path(self.name).expanduser() if self.name and open_path(self.name).is_dir() else None

    @property
    def shown(self) -> str:
        if self.hub or not self.name:
            return self.hub
        return self.name if self.name.startswith("new:") else f"a local model ({Path(self.name).name})"


def find_base(bundle: Bundle, run: RunRecords | None, given: str | None) -> Base:
    """The base of what is published.

    Args:
        given: its hub id (--base).
    """
    name = run.config.model.path if run is not None else ""
    if bundle.is_adapter:
        name = read_adapter_config(bundle.folder).base_model_name_or_path or ""
        name = moved_in_run(bundle.folder, name)
    if given:
        return Base(name, given)
    if cached := find_cached(name):
        return Base(name, *cached)
    if name.startswith("new:"):
        return Base(name, "")
    there = str(run_cwd(run.run) / name) if run is not None and name else name  # a relative name is of the run's folder
    is_there = bool(name) and open_path(there).exists()
    if is_there or is_path(name) or _was_local(name, bundle, run) or not _HUB_ID.fullmatch(name):
        return Base(there if is_there else name, "")
    return Base(name, name)


def _was_local(name: str, bundle: Bundle, run: RunRecords | None) -> bool:
    """Whether a base that is not at hand was a folder, as the records of its training say."""
    weights = run.run.get("guard", {}).get("weights") if run is not None else None
    if isinstance(weights, Mapping) and weights:
        return name not in weights  # of a hub model its id, else files
    record = read_record(bundle.folder) if bundle.is_adapter else None
    return record is not None and not record.get("commit")


def read_card(bundle: Bundle) -> str:
    try:
        return read_text(bundle.folder / CARD)
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{bundle.folder / CARD}: cannot be read ({error}). Correct it, or remove it to publish a new one.",
            code="card-unreadable",
        ) from None


def choose_licence(card: str, base: Base, given: str | None, of_hub: Mapping[str, Any]) -> tuple[Licence | None, str]:
    """The licence and where it is from.

    Args:
        given: --license.
        of_hub: metadata of the base's card on the hub.
    """
    of_base = read_licence(of_hub) or (find_licence(base.folder) if base.folder else None)
    own = read_licence(split_front(card)[0])
    if given:
        licence = Licence(given)
        if of_base is not None and of_base.id != given:
            return licence, f"--license; the base {base.shown} states {of_base.shown}"
        return licence, "--license"
    if own is not None and own != of_base:
        more = f"; the base {base.shown} states {of_base.shown}" if of_base is not None else ""
        return own, f"README.md{more}"
    return of_base, f"as the base {base.shown}"


def complete_card(
    bundle: Bundle, run: RunRecords | None, repository: str, base: Base, licence: Licence | None, source: str
) -> str:
    """README.md for the repository. Text that a person has written stays; sections that it lacks are added.

    Args:
        source: of the licence, from `choose_licence`.
    """
    found = read_card(bundle) or _new_card(bundle, repository, base)
    front, body = split_front(found)
    usual, _ = split_front(front_matter(ModelSource("preset", ""), bundle.is_adapter))
    front = {**usual, **front}
    if licence is not None:
        front = {key: value for key, value in front.items() if not str(key).startswith("license")}
        front = dict(list(front.items())[:2]) | licence.to_front() | front
    if base.hub:
        front["base_model"] = base.hub
    for name, section in _sections(run).items():
        if section and not has_section(body, name):
            body = f"{body.rstrip()}\n\n{section}"
    if (
        not has_section(body, LICENCE)
        or section_text(body, LICENCE).startswith(_UNKNOWN)
        or source.startswith("--license")
    ):
        shown = to_markdown(base.shown) if not base.name.startswith("new:") else ""
        body = put_section(body, LICENCE, licence_section(licence, shown, of_base=source.startswith("as the base")))
    return write_front(front) + _for_hub(body, bundle, repository, base)


def _new_card(bundle: Bundle, repository: str, base: Base) -> str:
    """A card for a folder that has none."""
    is_chat = (bundle.folder / "chat_template.jinja").is_file()
    load = load_model_lines(is_chat)
    if bundle.is_adapter:
        load = load_adapter_lines(
            ModelSource("hub" if base.hub else "local", base.hub or base.name), None, None, is_chat
        )
    return f"# {to_markdown(repository.partition('/')[2])}\n\n{load}"


def _for_hub(body: str, bundle: Bundle, repository: str, base: Base) -> str:
    """The lines that load it, with its name on the hub."""
    local = repository.partition("/")[2]
    commands = f"tunesmith chat {repository}\ntunesmith serve {repository}  # answers as OpenAI's API does\n"
    if bundle.is_adapter:
        commands = f"hf download {repository} --local-dir {local}\ntunesmith chat {local}\n"
        commands += f"tunesmith serve {local}  # answers as OpenAI's API does\n"
    body = body.replace(HERE, f'folder = "{repository}"\n').replace(COMMANDS_HERE, commands)
    if base.hub and base.name:
        body = body.replace(to_markdown(f"a local model ({Path(base.name).name})"), to_markdown(base.hub))
    return body


def _sections(run: RunRecords | None) -> dict[str, str]:
    """Those of the run: data and results are added to a card that lacks them."""
    if run is None:
        return {}
    parts = [
        load_ledger({**part, "bad": [], "num_bad": 0}) for name in ("train", "eval") if (part := run.ledger.get(name))
    ]
    data = data_section(parts[0], parts[1] if len(parts) > 1 else None, run_cwd(run.run)) if parts else ""
    return {DATA: data, RESULTS: results_section(run.records)}


def add_evaluation(card: str, bundle: Bundle, run: RunRecords | None) -> tuple[str, str]:
    """The card with the scores of RUN/evaluate, and a remark where these were left out."""
    if run is None or has_section(card, EVALUATION):
        return card, ""
    folder = EvaluationFolder(run.folder.path / "evaluate")
    if not folder.result.is_file():
        return card, ""
    weights = max(
        file.path.stat().st_mtime for file in bundle.files if file.path and file.name.endswith(".safetensors")
    )
    if folder.result.stat().st_mtime < weights:
        return card, f"{folder.result} is older than the weights, so its scores are not in the card"
    try:
        evaluation = read_evaluation(folder)
    except TunesmithError as error:
        return card, f"without scores: {error}"
    result = _own_result(evaluation, run.folder, bundle.folder)
    if result is None:
        return card, f"{folder.result} has no scores of this model"
    return put_section(card, EVALUATION, evaluation_section(evaluation, result)), ""


def _own_result(evaluation: Evaluation, run: RunFolder, folder: Path) -> ModelResult | None:
    asked = [model for model in evaluation.models if model.base_of is None]
    here = {run.path.resolve(), run.path.parent.resolve(), folder.resolve()}
    found = [model for model in asked if Path(model.path).expanduser().resolve() in here]
    return next(iter(found or (asked if len(asked) == 1 else ())), None)


def evaluation_section(evaluation: Evaluation, result: ModelResult) -> str:
    """The scores with their intervals, beside those of the base where there are any; no replies."""
    base = next((model for model in evaluation.models if model.base_of == result.name), None)
    head = ["score", "this model", *(["base"] if base else [])]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name, kind in SCORES.items():
        if name in result.scores:
            cells = [kind.label, *(_score(name, model.scores.get(name)) for model in (result, base) if model)]
            lines.append("| " + " | ".join(cells) + " |")
    names = list(dict.fromkeys(to_markdown(name_data(source)) for source in evaluation.data.sources))
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    about = f"{evaluation.data.scored:,} rows of {shown}, {evaluation.data.replies:,} replies, by `tunesmith evaluate`"
    return f"## {EVALUATION}\n\n{about}; 95% intervals in brackets.\n\n" + "\n".join(lines) + "\n"


def _score(name: str, score: Score | None) -> str:
    if score is None or score.value is None:
        return "-"
    shown = SCORES[name].show
    ends = f" [{shown(score.low)}, {shown(score.high)}]" if score.low is not None and score.high is not None else ""
    return f"{shown(score.value)}{ends}"


def add_replies(card: str, run: RunRecords) -> tuple[str, str]:
    """The card with the sample replies of the run's report, which quote prompts of its data.

    Raises:
        TunesmithError: the run has none.
    """
    samples = kept_replies(run.folder, run.last_step)
    if not samples.replies:
        raise TunesmithError(
            f"{run.folder.path}: has no sample replies of its last step. Make them: tunesmith report {run.folder.path}",
            code="no-sample-replies",
        )
    lines = [f"## {REPLIES}", "", f"{samples.remark[:1].upper()}{samples.remark[1:]}.", ""]
    for one in samples.replies:
        lines += [f"- prompt: {to_markdown(one.prompt)}", f"  <br>reply: {to_markdown(one.reply)}"]
    return put_section(
        card, REPLIES, "\n".join(lines) + "\n"
    ), f"{len(samples.replies)} sample replies with their prompts"


def join_names(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(map(one_line, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
