"""What a run of MiniMind's scripts does otherwise than the run file that comes nearest."""

from __future__ import annotations

from tunesmith.foreign.minimind_command import Command

_LATE_EPOCHS = ("2025-10", "2026-01", "minimind-3")  # rows are shuffled for each epoch


def list_differences(command: Command) -> list[str]:
    """One line each, only those that apply."""
    if command.kind == "chat":
        return []
    return [*_of_steps(command), *_of_weights(command), *_of_rows(command), *_of_labels(command), *_of_losses(command)]


def _of_steps(command: Command) -> list[str]:
    values, one = command.values, command.generation
    rows, steps, processes = values["batch_size"], values["accumulation_steps"], command.launch.processes
    length = values.get("max_seq_len", 512)
    lines = [f"batches: {rows} rows there, each padded to {length} tokens; here rows are packed into {rows} x {length} "
             "tokens without padding, so a step has more rows and an epoch fewer steps; for as many steps: "
             f"train.micro_batch_tokens of {rows} x the mean tokens of a row, which check prints"]  # fmt: skip
    if steps > 1 or processes != 1:
        lines.append("loss: a step is the mean of the means of its batches there; here the mean over all its trained "
                     "tokens")  # fmt: skip
    if steps > 1:
        after = "a step whose gradient is too small" if one.is_3 else "added to the next epoch's first step"
        lines.append(f"end of an epoch: fewer than {steps} batches are {after} there; here a step as any other")
    return lines


def _of_weights(command: Command) -> list[str]:
    one, values = command.generation, command.values
    lines = []
    if one.decay:
        lines.append(f"weight decay: {one.decay:g} on all weights there (the default of AdamW); here not on norms and "
                     "embeddings")  # fmt: skip
    if one.schedule == "minimind":
        lines.append("learning rate: from 1.1 to 0.1 times --learning_rate there, and here by optim.schedule minimind; "
                     "cosine begins at 1")  # fmt: skip
    if not one.is_dtype_used and values["device"] != "cpu" and values["dtype"] == "bfloat16":
        lines.append("precision: their autocast computes in float16 whatever --dtype says, with a scaled loss; here in "
                     "bf16")  # fmt: skip
    if command.is_moe:
        how, coefficient = one.router
        what = "the rows of a batch" if how == "layers" else "each row"
        if coefficient:
            lines.append(f"router loss: over {what} with its padding there; here there is no padding")
    if command.kind == "lora" and one.name == "2024":
        lines.append("adapter: it is on the head, too, there; all-linear leaves the head out")
    elif command.kind == "lora":
        lines.append("adapter: A is drawn with std 0.02 there, and by peft here (Kaiming uniform)")
    return lines


def _of_rows(command: Command) -> list[str]:
    one = command.generation
    lines = []
    if one.name not in _LATE_EPOCHS:
        order = "is drawn once" if one.is_shuffled else "is that of the file in one process"
        lines.append(f"order of rows: {order} there; here it is drawn for each epoch by train.seed")
    if command.kind == "pretrain":
        length = command.values.get("max_seq_len", 512)
        lines.append(f"long texts: cut after {length} tokens there; here split, so that nothing is lost")
        if not one.has_marks:
            lines.append("texts: without BOS and EOS there; here both stand around a text, and EOS is trained")
    elif one.roles_by_place:
        lines.append("roles: turns are user and assistant by turns there, so that behind a system prompt questions are "
                     "trained; here each turn's role is read")  # fmt: skip
    elif one.name == "2024":
        lines.append(
            "history: a Python list as text there, [['question', 'answer']]; here JSON, and other rows are refused"
        )
    lines.append("control tokens: text of a row that spells one (<|im_end|>) becomes one there; here it stays text, "
                 "unless data.control_text is allow")  # fmt: skip
    return lines


def _of_labels(command: Command) -> list[str]:
    one = command.generation
    if command.kind == "pretrain":
        return []
    ours = "here the reply and its stop token are trained"
    if one.name == "2024":
        return [f"labels: the line breaks before and behind the last reply are trained there, too; {ours}"]
    lines = [f"labels: the line break behind a reply's stop token is trained there, too; {ours}"]
    if one.name in ("2026-01", "minimind-3"):
        lines.append("system prompts: 20 % of the rows without one get one of ten there; here rows are as they are. "
                     "Your own in data.system_prompts with data.system_prompt_share 0.2 do the same")  # fmt: skip
    return lines


def _of_losses(command: Command) -> list[str]:
    if command.kind == "distillation":
        share = command.values.get("alpha", 0.0)
        return [f"distillation: the loss is {share:g} x that of the labels + {1 - share:g} x the distance to a "
                "teacher's probabilities there; here it is that of the labels. To learn from a teacher's replies, "
                "train on rows that it has written"]  # fmt: skip
    if command.kind == "reason":
        return ["tags: tokens of <think>, </think>, <answer> and </answer> weigh 10 there; here each token weighs 1"]
    return []
