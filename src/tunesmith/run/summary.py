"""The facts of a run in words: printed before step 1, and again in the model's card."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import yaml
from torch import nn

from tunesmith import __version__
from tunesmith.adapters.adapter import describe_adapter
from tunesmith.config.schema import RunConfig
from tunesmith.data.ledger import Ledger
from tunesmith.display import format_bytes, format_count, to_markdown, visible
from tunesmith.encode.encoder import Encoder
from tunesmith.model.isolation import Isolation
from tunesmith.model.load import count_parameters
from tunesmith.model.loss import SupervisedLM
from tunesmith.train.loop import Progress as RunProgress
from tunesmith.train.plan import Plan
from tunesmith.train.precision import Precision


@dataclass(frozen=True)
class RunFacts:
    config: RunConfig
    encoder: Encoder
    ledger: Ledger
    eval_ledger: Ledger | None
    lm: SupervisedLM
    plan: Plan
    isolation: Isolation
    precision: Precision
    device: torch.device
    max_seq_len: int
    length_remark: str


def summary_lines(facts: RunFacts) -> list[tuple[str, str]]:
    config, plan = facts.config, facts.plan
    parameters, trainable = count_parameters(facts.lm.model)
    trained = "all trained" if parameters == trainable else f"{trainable:,} trained ({trainable / parameters:.2%})"
    lines = [
        ("model", f"{config.model.path}: {type(facts.lm.model).__name__}, {parameters:,} parameters, {trained}"),
        *_adapter_lines(facts),
        ("device", f"{facts.device.type}, {facts.precision.name}, {torch.get_num_threads()} threads"),
        *_ledger_lines("data", facts.ledger),
    ]
    if facts.eval_ledger:
        lines += _ledger_lines("eval data", facts.eval_ledger)
    elif plan.eval is not None:
        held_out = sum(len(pack) for pack in plan.eval_packs)
        lines.append(("eval data", f"{held_out:,} of {len(plan.train):,} samples held out"))
    lines += [
        ("template", _template_line(facts)),
        ("lengths", _length_line(facts)),
        ("attention", facts.isolation.report),
        ("head", _head_line(facts.lm)),
        ("steps", _steps_line(facts)),
        ("memory", f"about {format_bytes(estimate_memory(facts))} at its peak"),
    ]
    return lines


def _adapter_lines(facts: RunFacts) -> list[tuple[str, str]]:
    if facts.lm.adapter is None:
        return []
    lora, model = facts.config.lora, facts.lm.model
    lines = [("adapter", describe_adapter(facts.lm.adapter))]
    has_experts = any(name.endswith("mlp.experts.down_proj") for name, _ in model.named_parameters())
    has_experts = has_experts or any(".experts." in name for name, _ in model.named_parameters())
    if has_experts and not facts.lm.adapter.peft_config["default"].target_parameters:
        lines.append(
            ("", "its experts are left alone (lora.target_parameters reaches them, with lora or rslora and no dropout)")
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


def _ledger_lines(name: str, ledger: Ledger) -> list[tuple[str, str]]:
    files = len(ledger.files)
    lines = [
        (
            name,
            f"{ledger.rows:,} rows of {files} file{'s' if files != 1 else ''}: {ledger.used:,} used, "
            f"{ledger.refused:,} refused, {ledger.truncated:,} truncated",
        )
    ]
    lines += [("", f"refused: {reason} ({count:,} rows)") for reason, count in ledger.count_reasons().most_common(8)]
    if ledger.truncated:
        lines.append(("", f"truncated: {ledger.tokens_lost:,} tokens lost; a larger data.max_seq_len keeps them"))
    if ledger.split:
        lines.append(("", f"split to max_seq_len: {ledger.split:,} rows, every trained token kept"))
    lines += [("", f"note: {note} ({count:,} rows)") for note, count in ledger.count_notes().items()]
    if ledger.passed_over:
        shown = ", ".join(ledger.passed_over[:4]) + (" ..." if len(ledger.passed_over) > 4 else "")
        lines.append(("", f"passed over: {shown}"))
    share = ledger.target_tokens / max(1, ledger.tokens)
    lines.append(("", f"{ledger.tokens:,} tokens in {ledger.num_samples:,} samples, {share:.1%} supervised"))
    return lines


def _template_line(facts: RunFacts) -> str:
    template, stop = facts.encoder.template, facts.encoder.stop.text
    if facts.ledger.count_how().keys() == {"text"}:
        return "not used: raw text, every token trained"
    if template is None:
        return f"none: prompt + completion + {stop}; chat will need the same"
    if template.is_fallback:
        return f"alpaca, because the model has none of its own; replies end with {stop}"
    return f"{template.source}; replies end with {stop}"


def _length_line(facts: RunFacts) -> str:
    remark = f" ({facts.length_remark})" if facts.length_remark else ""
    plan = facts.plan
    tokens = int(plan.train.lengths[plan.train_ids].sum())
    fill = tokens / (len(plan.first_epoch) * plan.capacity)
    packs = f"{len(plan.first_epoch):,} {'forwards' if facts.lm.is_packed else 'groups'} an epoch"
    return f"max_seq_len {facts.max_seq_len}{remark}; {packs} of {plan.capacity} tokens, {fill:.1%} full"


def _head_line(lm: SupervisedLM) -> str:
    router = ", router loss added" if lm.router else ""
    if lm.head_path == "decoder":
        return f"at supervised positions only{router}"
    if lm.head_path == "logits_to_keep":
        return f"at supervised positions only, through the model's own forward{router}"
    return f"at all positions: this model's logits are its own affair{router}"


def _steps_line(facts: RunFacts) -> str:
    plan = facts.plan
    per_epoch = -(-len(plan.first_epoch) // plan.grad_accum_steps)
    tokens = int(plan.train.lengths[plan.train_ids].sum()) / per_epoch
    epochs = plan.total_steps / per_epoch
    return f"{plan.total_steps:,} steps of about {format_count(tokens)} tokens, {epochs:.2f} epochs"


def estimate_memory(facts: RunFacts) -> float:
    """Bytes at the peak of a step: weights, gradients, AdamW's two averages, activations, logits.

    The count of activations per token and layer is that of a pre-norm block with a gated MLP and fused attention
    (after Korthikanti et al. 2022): an estimate, for what fits by far and what does not.
    """
    model, plan = facts.lm.model, facts.plan
    _, trainable = count_parameters(model)
    width = torch.finfo(facts.precision.weights).bits // 8
    states = sum(p.numel() * p.element_size() for p in model.parameters()) + trainable * 3 * width
    config = model.config.get_text_config()
    layers, hidden = config.num_hidden_layers, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    act_width = 2 if facts.precision.autocast or width == 2 else 4
    tokens = plan.capacity if facts.lm.is_packed else facts.max_seq_len
    per_layer = tokens * (12 * hidden + 4 * inner) * act_width
    activations = layers * per_layer
    if facts.config.train.gradient_checkpointing:
        activations = per_layer + layers * tokens * hidden * act_width
    logits = min(tokens * _vocabulary(model) * 4 * 3, 3 * 256 * 2**20)
    return states + activations + logits


def _vocabulary(model: nn.Module) -> int:
    return int(model.config.get_text_config().vocab_size)


def model_card(facts: RunFacts, progress: RunProgress) -> str:
    """RUN/model/README.md: what it was made of, in a form the hub reads."""
    config = facts.config
    front: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if not config.model.path.startswith("new:"):
        front["base_model"] = visible(config.model.path)
    front["tags"] = ["tunesmith", "sft"]
    head = yaml.safe_dump(front, sort_keys=False, default_flow_style=None)
    last = f"step {progress.step}, {progress.epoch:.2f} epochs, {progress.supervised_tokens:,} supervised tokens"
    if progress.best_step is not None:
        last += f"; weights of step {progress.best_step}, the best evaluated (eval_loss {progress.best_eval_loss:.4f})"
    rows = "\n".join(
        f"- {name or '  '} {to_markdown(text)}".rstrip() for name, text in summary_lines(facts) if name != "memory"
    )
    return (
        f"---\n{head}---\n"
        f"# {to_markdown(config.train.output_dir.rstrip('/').rsplit('/', 1)[-1])}\n\n"
        f"Trained with tunesmith {__version__}: {last}.\n\n{rows}\n\n"
        f"Learning rate {config.optim.lr:g} ({config.optim.schedule}), seed {config.train.seed}. "
        f"Replies stop at {to_markdown(facts.encoder.stop.text)} (generation_config.json).\n"
    )
