"""The facts of a run in words: printed before step 1, and again in the model's card."""

from __future__ import annotations

import os

import torch

from tunesmith import __version__
from tunesmith.adapters.adapter import describe_adapter, find_zero_gates
from tunesmith.cards.card import describe_base, front_matter, load_adapter_lines, load_model_lines
from tunesmith.cards.licence import base_licence
from tunesmith.cards.sections import data_section, hub_datasets, licence_section, results_section
from tunesmith.config.data_keys import DataSection
from tunesmith.config.deepspeed_file import read_deepspeed
from tunesmith.data.dataset import Dataset
from tunesmith.data.ledger import Ledger, Problem
from tunesmith.display import format_bytes, format_count, to_markdown
from tunesmith.model.load import count_parameters
from tunesmith.model.loss import SupervisedLM
from tunesmith.monitor.memory import MemoryPlan, head_shape, heap_share, measure_kept, process_memory, tied_bytes
from tunesmith.monitor.room import total_memory
from tunesmith.run.assemble import ReadyRun
from tunesmith.run.folder import count_average_bytes
from tunesmith.runfolder import read_metrics
from tunesmith.streaming.data import stream_lines
from tunesmith.training.cost import Cost, count_step_flops, explain_cost, measure_flops_per_s
from tunesmith.training.progress import Progress
from tunesmith.training.randomness import restore_random_states, take_random_states

_SHOWN_REASONS = 8  # causes of refusals
_SHOWN_SOURCES = 12
_COUNTS = ("num_hidden_layers", "hidden_size")  # which a model of other people's code may not have
_BUCKET_BYTES = 4 * 2**25  # of gradients that processes sum at once (distributed/spread.py)


def summary_lines(ready: ReadyRun, plan: MemoryPlan | str) -> list[tuple[str, str]]:
    config, held_out = ready.session.config, ready.feed.held_out
    sources = ready.session.sources.train if ready.session.sources else None
    parameters, trainable = count_parameters(ready.lm.model)
    gates = {} if ready.lm.adapter else find_zero_gates(ready.lm.model)
    trained = f"{trainable:,} trained ({trainable / parameters:.2%})"
    if trainable + sum(gate.numel() for gate in gates.values()) == parameters:
        trained = "all trained but its shared experts' gates" if gates else "all trained"
    of_each = " in each process" if ready.session.world.size > 1 else ""
    lines = [
        ("model", f"{config.model.path}: {type(ready.lm.model).__name__}, {parameters:,} parameters, {trained}"),
        *([("", "these gates are all zero and stay frozen: a shared expert of MiniMind has no gate")] if gates else []),
        *([("", remark)] if (remark := ready.session.model.remark) else []),
        *_adapter_lines(ready),
        ("device", f"{ready.session.device.type}, {ready.session.precision.name}, {_threads()}"),
        *_process_lines(ready),
        *(stream_lines(sources) if config.data.stream and sources else []),
        *_ledger_lines("so far" if config.data.stream else "data", ready.dataset.ledger, config.data),
        *(("", line) for line in ready.dataset.ledger.describe_draws(config.data)),
        *_source_lines(ready),
    ]
    if ready.dataset.eval_ledger:
        lines += _ledger_lines("eval data", ready.dataset.eval_ledger, config.data)
        if config.data.eval_split:
            lines.append(("", "held out of the rows above; nothing is added to them or removed from them"))
    elif held_out is not None and isinstance(ready.dataset, Dataset):
        samples = len(ready.dataset.train)
        lines.append(("eval data", f"{held_out.num_samples:,} of {samples:,} samples held out"))
    lines += [
        ("template", _template_line(ready)),
        ("lengths", _length_line(ready)),
        ("attention", ready.isolation.report),
        ("head", _head_line(ready.lm)),
        *([("prefixes", ready.sharing.line)] if ready.sharing.line else []),
        ("steps", ready.feed.describe_steps()),
        *([("checkpoints", ready.form.line)] if ready.form.line else []),
        ("memory", _memory_line(plan, of_each)),
    ]
    return lines


def _process_lines(ready: ReadyRun) -> list[tuple[str, str]]:
    """How the packs of a step are dealt, and a warning where some processes would have none."""
    world, packs = ready.session.world, ready.session.config.train.grad_accum_steps
    if world.size == 1:
        return []
    what = {"ddp": "each has the whole model (ddp)", "fsdp": "each keeps a shard of the model (fsdp)"}
    if ready.session.parallel == "deepspeed":
        parts = {1: "averages", 2: "averages and gradients", 3: "weights, gradients and averages"}
        stage = read_deepspeed(ready.session.config, ready.session.precision.name).stage
        what["deepspeed"] = f"each keeps a part of the {parts[stage]} (deepspeed, ZeRO-{stage})"
    dealt = f"a step's {packs} packs are dealt" if packs > 1 else "a step has one pack"
    lines = [("processes", f"{world.size}: {what[ready.session.parallel]}; {dealt}")]
    if packs % world.size:
        idle = "have nothing to do" if packs < world.size else "make one forward less"
        better = -(-packs // world.size) * world.size
        lines.append(
            (
                "warning",
                f"train.grad_accum_steps {packs} is the number of packs a step in all processes: some of the "
                f"{world.size} {idle}. Set it to {better}, or to another multiple of {world.size}",
            )
        )
    return lines


def _threads() -> str:
    number = torch.get_num_threads()
    return f"{number} thread{'s' if number != 1 else ''}"


def _memory_line(plan: MemoryPlan | str, of_each: str) -> str:
    if isinstance(plan, str):
        return plan
    need = plan.need()
    return f"about {format_bytes(max(need.total, plan.peak))} at its peak{of_each}: {need.describe()}"


def cpu_lines(ready: ReadyRun, plan: MemoryPlan | str) -> list[tuple[str, str]]:
    """A warning where the plan is too large for a CPU, and what to train there instead."""
    if ready.session.device.type != "cpu":
        return []
    feed, model = ready.feed, ready.lm.model
    flops = count_step_flops(model, feed.tokens_per_step)
    cost, room = Cost(flops, feed.total_steps, 0.0 if isinstance(plan, str) else plan.need().total), total_memory()
    if cost.is_cheap() and cost.memory <= room:
        return []
    reason = explain_cost(cost, measure_flops_per_s(model.config.get_text_config().hidden_size), room)
    if reason is None:
        return []
    if ready.session.config.model.path.startswith("new:"):
        advice = "this is a plan for a GPU; on a CPU: tunesmith train recipe:laptop-pretrain"
    else:
        advice = (
            "this is a plan for a GPU; on a CPU: a smaller model, fewer train.max_steps, a smaller "
            "train.micro_batch_tokens, or recipe:laptop-pretrain and recipe:laptop-sft"
        )
    return [("warning", reason), ("", advice)]


def _adapter_lines(ready: ReadyRun) -> list[tuple[str, str]]:
    if ready.lm.adapter is None:
        return []
    lora, model = ready.session.config.lora, ready.lm.model
    lines = [("adapter", describe_adapter(ready.lm.adapter))]
    has_experts = any(name.endswith("mlp.experts.down_proj") for name, _ in model.named_parameters())
    has_experts = has_experts or any(".experts." in name for name, _ in model.named_parameters())
    if has_experts and not ready.lm.adapter.peft_config["default"].target_parameters:
        lines.append(
            (
                "",
                "its experts are not adapted (lora.target_parameters adapts them, with lora or rslora and no dropout)",
            )
        )
    if has_experts and lora.quantize != "none":
        lines.append(
            (
                "",
                f"its experts stay in full precision: bitsandbytes knows none, so {lora.quantize} saves little",
            )
        )
    if lora.quantize != "none":
        lines.append(("", f"frozen weights in {lora.quantize}; merge puts the adapter onto the base in full precision"))
    return lines


def _ledger_lines(name: str, ledger: Ledger, data: DataSection) -> list[tuple[str, str]]:
    files = len(ledger.files)
    lines = [
        (
            name,
            f"{ledger.rows:,} rows of {files} file{'s' if files != 1 else ''}: {ledger.used:,} used, "
            f"{ledger.refused:,} refused, {ledger.truncated:,} truncated",
        )
    ]
    problems = ledger.problems(data)
    refused = [problem for problem in problems if problem.what.startswith("refused: ")]
    lines += [_problem_line(problem) for problem in refused[:_SHOWN_REASONS]]
    if ledger.truncated:
        lines.append(("", f"truncated: {ledger.tokens_lost:,} tokens lost; a larger data.max_seq_len keeps them"))
    if ledger.split:
        lines.append(("", f"split to max_seq_len: {ledger.split:,} rows, every trained token kept"))
    lines += [_problem_line(problem) for problem in problems if problem not in refused]
    if ledger.passed_over:
        shown = ", ".join(ledger.passed_over[:4]) + (" ..." if len(ledger.passed_over) > 4 else "")
        lines.append(("", f"passed over: {shown}"))
    share = ledger.target_tokens / max(1, ledger.tokens)
    lines.append(("", f"{ledger.tokens:,} tokens in {ledger.num_samples:,} samples, {share:.1%} supervised"))
    return lines


def _source_lines(ready: ReadyRun) -> list[tuple[str, str]]:
    """Of a mix: the share of each source in the tokens, and how often a run takes it."""
    if not isinstance(ready.dataset, Dataset):
        return []
    sources, total_epochs, mix = ready.dataset.describe_sources(), ready.feed.total_epochs or 0.0, ready.dataset.mix
    lines = []
    for source in sources[:_SHOWN_SOURCES]:
        passes = source.passes * total_epochs
        rows = f"{source.rows:,} row{'s' if source.rows != 1 else ''}, {format_count(source.tokens)} tokens"
        lines.append(f"{source.name}: {source.asked:.1%} of the tokens; {rows}, {passes:.2f} passes over them")
    if len(sources) > _SHOWN_SOURCES:
        lines.append(f"and {len(sources) - _SHOWN_SOURCES} more sources; data_ledger.json has them all")
    if mix is not None and mix.quotas and len(sources) > 1:
        full = max(sources, key=lambda source: source.passes)
        if all(source.passes <= 1 for source in sources):
            lines.append(f"an epoch ends with the last row of {full.name}; the next takes other rows of the others")
    return [("sources" if number == 0 else "", line) for number, line in enumerate(lines)]


def _problem_line(problem: Problem) -> tuple[str, str]:
    """The level and what it is about. Refused rows within data.max_refused are what the line above has counted."""
    rows = f"{problem.count:,} row{'s' if problem.count != 1 else ''}"
    advice = f": {problem.advice}" if problem.advice else ""
    if problem.level == "error" or (problem.level == "warning" and not problem.what.startswith("refused: ")):
        return problem.level, f"{problem.what} ({rows}){advice}"
    return "", f"{'note: ' if problem.level == 'note' else ''}{problem.what} ({rows})"


def _template_line(ready: ReadyRun) -> str:
    template, stop = ready.session.encoder.template, ready.session.encoder.stop.text
    if ready.dataset.ledger.count_how().keys() == {"text"}:
        return "not used: raw text, every token trained"
    if template is None:
        return f"none: prompt + completion + {stop}; chat will need the same"
    if template.is_fallback:
        return f"alpaca, because the model has none of its own; replies end with {stop}"
    return f"{template.source}; replies end with {stop}"


def _length_line(ready: ReadyRun) -> str:
    remark = f" ({ready.session.lengths.remark})" if ready.session.lengths.remark else ""
    packs = ready.feed.describe_packs("forward" if ready.lm.is_packed else "group")
    return f"max_seq_len {ready.session.lengths.max_seq_len}{remark}; {packs}"


def _head_line(lm: SupervisedLM) -> str:
    router = f", router loss added ({lm.router.kind}, coefficient {lm.router.coefficient:g})" if lm.router else ""
    if lm.head_path == "decoder":
        return f"at supervised positions only{router}"
    if lm.head_path == "logits_to_keep":
        return f"at supervised positions only, through the model's own forward{router}"
    return f"at all positions: this model transforms its logits in a way we cannot reproduce{router}"


def plan_memory(ready: ReadyRun) -> MemoryPlan | str:
    """What the memory of one process follows from, or why that is not known."""
    session, lm = ready.session, ready.lm
    train, precision = session.config.train, session.precision
    device = session.device
    if (session.parallel in ("fsdp", "deepspeed") and session.world.size > 1) or session.parallel == "deepspeed":
        return f"not estimated: shared out over the processes ({session.parallel})"
    if device.type not in ("cpu", "cuda"):
        return f"not estimated on {device.type}"
    random = take_random_states()
    kept = measure_kept(lm, precision.context(device), session.lengths.max_seq_len)
    restore_random_states(*random)
    config = lm.model.config.get_text_config()
    if kept is None or not all(isinstance(getattr(config, name, None), int) for name in _COUNTS):
        return "not estimated: this model cannot be measured before its first step"
    parameters = list(lm.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    weights, gradients = (float(sum(p.numel() * p.element_size() for p in some)) for some in (parameters, trained))
    averages = float(sum(count_average_bytes(parameter, session.config.optim.name) for parameter in trained))
    is_cpu = device.type == "cpu"
    largest = max((parameter.numel() * parameter.element_size() for parameter in trained), default=0)
    second = tied_bytes(lm.model)
    is_half = precision.compute is not None or precision.weights.itemsize == 2
    accumulates = train.grad_accum_steps > session.world.size or not lm.is_packed
    is_split = session.is_adapter or is_half or accumulates or lm.router is not None
    makes_again = train.gradient_checkpointing or session.config.lora.quantize != "none"
    taken, peak = process_memory()
    tokens, longest, share = plan_forward(ready)
    return MemoryPlan(
        taken=max(taken, weights) if is_cpu else weights,
        weights=weights,
        gradients=gradients,
        averages=averages,
        snapshot=gradients + averages if is_cpu and session.world.is_main and not ready.form.in_shards else 0.0,
        kept=kept,
        head=head_shape(lm, 2 if is_half else 4),
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        tokens=tokens,
        longest=longest,
        share=share,
        accumulates=accumulates,
        is_checkpointed=train.gradient_checkpointing,
        exchange=max(second, 2 * min(gradients, max(largest, _BUCKET_BYTES)) if session.world.size > 1 else 0.0),
        heap=heap_share(is_split, makes_again) if is_cpu else 1.0,
        peak=peak if is_cpu else 0.0,
    )


def plan_forward(ready: ReadyRun) -> tuple[int, int, float]:
    """Tokens of the largest forward and of its longest document, and the supervised share of its tokens."""
    session, lm, dataset = ready.session, ready.lm, ready.dataset
    capacity = session.lengths.capacity if lm.is_packed else session.lengths.max_seq_len
    if not isinstance(dataset, Dataset) or not len(dataset.train):
        return capacity, session.lengths.max_seq_len, 1.0
    lengths = dataset.train.lengths[:]
    longest, tokens = int(lengths.max()), int(lengths.sum())
    share = int(dataset.train.num_targets[:].sum()) / tokens
    if ready.sharing.is_on and not ready.sharing.trains_once:  # a computed token has the targets of several samples
        share *= ready.sharing.ratio
    return min(capacity, tokens if lm.is_packed else longest), longest, share


def model_card(ready: ReadyRun, progress: Progress, lines: list[tuple[str, str]]) -> str:
    """README.md beside the weights: how to load them, what they were trained on and how, and their licence.

    Args:
        lines: from `summary_lines`.
    """
    session, dataset = ready.session, ready.dataset
    config, source, is_adapter = session.config, session.model, session.is_adapter
    last = f"step {progress.step}, {progress.epoch:.2f} epochs, {progress.supervised_tokens:,} supervised tokens"
    if progress.best_step is not None:
        last += f"; weights of step {progress.best_step}, the best evaluated (eval_loss {progress.best_eval_loss:.4f})"
    is_chat = session.encoder.template is not None
    if is_adapter:
        rows = ready.lm.model.config.get_text_config().vocab_size if session.new_tokens else None
        load = load_adapter_lines(source, config.model.revision or source.revision, rows, is_chat)
    else:
        load = load_model_lines(is_chat)
    base, licence = describe_base(source), base_licence(source)
    front = front_matter(source, is_adapter, licence.to_front() if licence else None, hub_datasets(dataset.ledger))
    sections = [
        load,
        data_section(dataset.ledger, dataset.eval_ledger),
        results_section(read_metrics(session.folder.metrics)),
        _training_section(ready, lines),
        licence_section(licence, "" if source.kind == "preset" else to_markdown(base)),
    ]
    return (
        f"{front}# {to_markdown(config.train.output_dir.rstrip('/').rsplit('/', 1)[-1])}\n\n"
        f"{'An adapter' if is_adapter else 'A model'} trained from {to_markdown(base)} with tunesmith "
        f"{__version__}: {last}.\n\n" + "\n".join(filter(None, sections))
    )


_OF_CARD = ("model", "adapter", "device", "processes", "template", "lengths", "attention", "head", "prefixes", "steps")


def _training_section(ready: ReadyRun, lines: list[tuple[str, str]]) -> str:
    """The facts of the run; its data have a section of their own, without the texts of refusals, which quote rows."""
    config, shown, group = ready.session.config, [], ""
    path, base = config.model.path, describe_base(ready.session.model)
    for name, text in lines:
        group = name or group
        if group in _OF_CARD:
            shown.append(f"- {name or '  '} {to_markdown(_without_path(text, path, base))}".rstrip())
    return (
        "## Training\n\n" + "\n".join(shown) + "\n\n"
        f"Learning rate {config.optim.lr:g} ({config.optim.schedule}), seed {config.train.seed}. "
        f"Replies stop at {to_markdown(ready.session.encoder.stop.text)} (generation_config.json).\n"
    )


def _without_path(text: str, path: str, name: str) -> str:
    """A line of the summary with the base's name for its folder, and files by their names alone."""
    words = text.replace(path, name).split(" ")
    return " ".join(os.path.basename(word) if os.path.isabs(word) else word for word in words)
