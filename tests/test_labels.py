"""Promise 1: only the assistant's text and its stop token are trained; otherwise the row is refused."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import chat_row, raises
from tunesmith.config.data_keys import DataSection
from tunesmith.data.fit import NOTE_CUT_REPLY, NOTE_TURN_LOST
from tunesmith.data.labelling import NOTE_RENDERED, label_rows
from tunesmith.data.ledger import LabelledRow, Ledger
from tunesmith.encode.encoder import Encoder
from tunesmith.encode.messages import NOTE_CONTROL
from tunesmith.errors import DataError, ModelError
from tunesmith.model.tokenizer import build_encoder
from tunesmith.rows.conversation import NOTE_UNANSWERED, Message
from tunesmith.sources.read import RawRow

DATE = datetime.datetime(2026, 1, 2)


def label(encoder: Encoder, *rows: Any, max_seq_len: int = 512, **data: Any) -> list[LabelledRow]:
    raw = [RawRow("x.jsonl", number, row) for number, row in enumerate(rows, 1)]
    return list(label_rows(raw, encoder, DataSection(train=["x"], **data), max_seq_len))


def trained_texts(encoder: Encoder, row: LabelledRow) -> list[str]:
    """Text of each run of trained tokens."""
    texts, run = [], []
    for sample in row.samples:
        for token, mask in zip([*sample.input_ids, 0], [*sample.loss_mask, 0], strict=True):
            if mask:
                run.append(int(token))
            elif run:
                texts.append(encoder.tokenizer.decode(run))
                run = []
    return texts


def with_template(tokenizer: Any, text: str) -> Encoder:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = text
    return build_encoder(tokenizer, None, {}, DATE)


CHAT = {"messages": [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好 🙂?"},
    {"role": "assistant", "content": "嗨 🙂!"}, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye bye."},
]}  # fmt: skip


def test_every_assistant_turn_and_its_stop_token(encoder: Encoder) -> None:
    (row,) = label(encoder, CHAT)
    assert row.status == "used"
    assert row.how == "as_rendered"
    assert trained_texts(encoder, row) == ["嗨 🙂!<|im_end|>", "Bye bye.<|im_end|>"]
    text = encoder.tokenizer.decode(row.samples[0].input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n你好 🙂?<|im_end|>")


def test_ids_are_those_of_the_stock_chat_template(encoder: Encoder) -> None:
    (row,) = label(encoder, CHAT)
    theirs = encoder.tokenizer.apply_chat_template(CHAT["messages"], return_dict=True)["input_ids"]
    assert row.samples[0].input_ids.tolist() == theirs


def test_the_prompt_of_each_reply_is_what_chat_would_send(encoder: Encoder) -> None:
    (row,) = label(encoder, CHAT)
    sample = row.samples[0]
    starts = [i for i in range(1, len(sample.loss_mask)) if sample.loss_mask[i] and not sample.loss_mask[i - 1]]
    messages = [Message(m["role"], m["content"]) for m in CHAT["messages"]]
    for start, turn in zip(starts, (2, 4), strict=True):
        assert encoder.encode_prompt(messages[:turn]) == sample.input_ids[:start].tolist()


def test_untrained_turns_stay_context(encoder: Encoder) -> None:
    messages = [dict(m) for m in CHAT["messages"]]
    messages[2]["loss_weight"] = 0
    (row,) = label(encoder, {"messages": messages})
    assert trained_texts(encoder, row) == ["Bye bye.<|im_end|>"]


# Differences between public templates: each is refused or labelled correctly, never wrongly.
PHI3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
TRIMS = "{% for m in messages %}{{ m.role + ': ' + m.content|trim + eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
STRIPS_HISTORY = (  # as Qwen3 does with the thinking of earlier turns
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OTHER_PROMPT = PHI3.replace("<|im_start|>assistant\n' }}{% else", "<|im_start|>assistant\n<think>\n' }}{% else")
DROPS_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
REJECTS = "{% if messages|length > 2 %}{{ raise_exception('only one turn') }}{% endif %}" + TRIMS


def test_a_template_that_rewrites_history_gets_one_sample_a_turn(tokenizer: Any) -> None:
    encoder = with_template(tokenizer, STRIPS_HISTORY)
    (row,) = label(encoder, CHAT)
    assert (row.status, row.how) == ("used", "unrolled")
    thought = "<think>\n\n</think>\n\n"
    assert trained_texts(encoder, row) == [f"{thought}嗨 🙂!<|im_end|>", f"{thought}Bye bye.<|im_end|>"]
    texts = [encoder.tokenizer.decode(sample.input_ids) for sample in row.samples]
    assert texts[1].count("<think>") == 1  # the first turn as the model sees it in its history
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n你好 🙂?<|im_end|>\n<|im_start|>assistant\n"
    assert texts[0] == f"{start}{thought}嗨 🙂!<|im_end|>\n"
    assert texts[1].startswith(
        f"{start}嗨 🙂!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n{thought}"
    )


def test_a_prompt_that_opens_the_thinking_is_gone_on_with(tokenizer: Any) -> None:
    encoder = with_template(tokenizer, OTHER_PROMPT)
    messages = [*CHAT["messages"][:-1], {"role": "assistant", "content": "Bye.", "reasoning_content": "They leave."}]
    (row,) = label(encoder, {"messages": messages})
    assert (row.status, row.how) == ("used", "composed")
    assert trained_texts(encoder, row) == ["\n</think>\n\n嗨 🙂!<|im_end|>", "They leave.\n</think>\n\nBye.<|im_end|>"]
    for sample in row.samples:
        first = int(sample.loss_mask.argmax())
        assert encoder.tokenizer.decode(sample.input_ids[:first]).endswith("<|im_start|>assistant\n<think>\n")


def test_history_unroll_and_last_turn(encoder: Encoder) -> None:
    (unrolled,) = label(encoder, CHAT, history="unroll")
    assert (unrolled.how, len(unrolled.samples)) == ("unrolled", 2)
    assert trained_texts(encoder, unrolled) == ["嗨 🙂!<|im_end|>", "Bye bye.<|im_end|>"]
    (last,) = label(encoder, CHAT, history="last_turn")
    assert trained_texts(encoder, last) == ["Bye bye.<|im_end|>"]
    short, whole = label(encoder, CHAT, history="unroll", max_seq_len=len(unrolled.samples[0].input_ids))[0], unrolled
    assert len(short.samples) == 1
    assert NOTE_TURN_LOST in short.notes
    first, second = whole.samples  # the second begins with the whole of the first, which counts once
    assert short.tokens_lost == len(second.input_ids) - len(first.input_ids)


def test_a_template_that_writes_more_at_the_very_end(tokenizer: Any) -> None:
    encoder = with_template(tokenizer, PHI3)
    (row,) = label(encoder, CHAT)
    assert encoder.stop.text == "<|im_end|>"
    assert trained_texts(encoder, row) == ["嗨 🙂!<|im_end|>", "Bye bye.<|im_end|>"]


def test_a_template_whose_replies_begin_with_a_space(tokenizer: Any) -> None:
    encoder = with_template(tokenizer, TRIMS)
    (row,) = label(encoder, chat_row("Q", " A \n"))
    assert trained_texts(encoder, row) == [" A<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "code", "fact"),
    [(DROPS_SYSTEM, "context-lost", "turn 0 (system): "), (REJECTS, "template-rejects", ": only one turn")],
)
def test_templates_that_cannot_be_labelled_refuse_the_row(tokenizer: Any, template: str, code: str, fact: str) -> None:
    (row,) = label(with_template(tokenizer, template), CHAT)
    assert (row.status, row.code, row.samples) == ("refused", code, ())
    assert fact in row.reason


def test_what_a_template_drops_is_never_trained_around(encoder: Encoder) -> None:
    thinking = {"role": "assistant", "content": "A", "reasoning_content": "hm, let me see"}
    calling = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}
    question = {"role": "user", "content": "Q"}
    rows = label(
        encoder, {"messages": [question, thinking]}, {"messages": [question, calling]},
        {**chat_row("Q", "A"), "tools": [{"name": "weather"}]},
    )  # fmt: skip
    assert [row.code for row in rows] == ["reply-lost", "reply-lost", "context-lost"]
    assert ["reasoning_content" in rows[0].reason, "weather" in rows[1].reason, "weather" in rows[2].reason] == [
        True
    ] * 3


def test_a_token_across_the_border_is_never_trained(tokenizer: Any) -> None:
    """In the finished text one token spans the border; at inference the prompt ends with its own last token."""
    encoder = with_template(
        tokenizer, "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '') }}{% endfor %}"
    )
    (row,) = label(encoder, chat_row("The answ", "er is the answer"))
    assert (row.status, row.how) == ("used", "composed")
    [sample] = row.samples
    asked = encoder.encode_prompt([Message("user", "The answ")])
    assert sample.input_ids[: len(asked)].tolist() == asked
    assert sample.loss_mask.tolist() == [0] * len(asked) + [1] * (len(sample.input_ids) - len(asked))
    reply = sample.input_ids[len(asked) :].tolist()
    assert (tokenizer.decode(reply[:-1]), reply[-1]) == ("er is the answer", tokenizer.eos_token_id)


_MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\nHEAD{% generation %}INSIDE"
    "{% endgeneration %}TAIL<|im_end|>\n{% else %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("head", "inside", "tail", "trained"),
    [
        ("", "{{ m.content }}", "", "I am a model<|im_end|>"),
        ("you\n", "{{ m.content }}", "", "I am a model<|im_end|>"),  # a header that the mark leaves out is context
        ("", "{{ m.content }}", " me", "I am a model<|im_end|>"),
        ("{{ m.content }}", "", "", "I am a model<|im_end|>"),  # an empty mark is ignored
        (
            "",
            "{{ m.content[:21] }}",
            "",
            "parts-not-traced",
        ),
    ],
)
def test_generation_marks_are_used_and_proven(tokenizer: Any, head: str, inside: str, tail: str, trained: str) -> None:
    text = _MARKED.replace("HEAD", head).replace("INSIDE", inside).replace("TAIL", tail)
    (row,) = label(with_template(tokenizer, text), chat_row("Who?", "I am a model" + " and" * 5 * ("[:21]" in inside)))
    if row.status == "refused":
        assert row.code == trained
    else:
        [sample] = row.samples
        assert tokenizer.decode(sample.input_ids[sample.loss_mask == 1]) == trained


def test_a_template_for_chats_with_tools_only(tokenizer: Any) -> None:
    text = "{% for t in tools %}{{ t.function.name }} {% endfor %}" + _MARKED.replace("HEAD", "").replace("TAIL", "")
    encoder = with_template(tokenizer, text.replace("INSIDE", "{{ m.content }}"))
    tool = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}
    with_tools, without = label(encoder, {**chat_row("Q", "A"), "tools": [tool]}, chat_row("Q", "A"))
    assert (with_tools.status, without.status) == ("used", "refused")
    assert without.code == "template-rejects"
    assert "'NoneType' object is not iterable" in without.reason


def test_a_reply_that_ends_in_plain_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ModelError) as error:
        with_template(tokenizer, "{% for m in messages %}{{ m.content }} ###\n{% endfor %}")
    assert error.value.code == "no-stop-token"


def test_prompt_completion_without_template(tokenizer: Any) -> None:
    encoder = build_encoder(copy.deepcopy(tokenizer), "none", {}, DATE)
    two = {"prompt": "Q: hello\n", "completion": "you and me"}
    row, refused = label(encoder, two, CHAT)
    assert row.how == "joined"
    assert encoder.tokenizer.decode(row.samples[0].input_ids) == "Q: hello\nyou and me<|im_end|>"
    assert trained_texts(encoder, row) == ["you and me<|im_end|>"]
    assert refused.code == "needs-template"


def test_raw_text_trains_every_token_and_splits_without_loss(encoder: Encoder) -> None:
    text = "the quick brown fox says hello 你好🙂\r\n" * 50
    (row,) = label(encoder, {"text": text}, max_seq_len=64)
    assert row.reason == "split"
    assert all(sample.loss_mask[1:].all() and len(sample.input_ids) <= 64 for sample in row.samples)
    trained = [int(i) for s in row.samples for i, mask in zip(s.input_ids, s.loss_mask, strict=True) if mask]
    assert encoder.tokenizer.decode(trained) == text + "<|im_end|>"
    assert row.samples[0].input_ids[0] == encoder.tokenizer.bos_token_id
    for before, after in zip(row.samples, row.samples[1:], strict=False):
        assert after.input_ids[0] == before.input_ids[-1]  # context for the piece's first new token


def test_text_with_a_rendered_template_is_noticed(encoder: Encoder) -> None:
    (row,) = label(encoder, {"text": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"})
    assert row.notes == (NOTE_RENDERED, NOTE_CONTROL)


def test_truncation_counts_what_is_lost(encoder: Encoder) -> None:
    long = chat_row("Q", "you and me " * 40)
    ids = label(encoder, long)[0].samples[0].input_ids
    (row,) = label(encoder, long, max_seq_len=30)
    assert (row.reason, row.tokens_lost, row.notes) == ("truncated", len(ids) - 30, (NOTE_CUT_REPLY,))
    assert row.samples[0].input_ids.tolist() == ids[:30].tolist()
    (row,) = label(encoder, long, max_seq_len=30, overlong="drop")
    assert row.code == "row-too-long"
    assert f"is {len(ids)} tokens long and data.max_seq_len is 30" in row.reason
    (row,) = label(encoder, chat_row("you and me " * 40, "A"), max_seq_len=30)
    assert (row.status, row.code) == ("refused", "targets-beyond-length")


def test_truncation_before_an_untouched_reply_is_no_cut_reply(encoder: Encoder) -> None:
    rows = [("user", "Q"), ("assistant", "A"), ("user", "you and me " * 40), ("assistant", "B")]
    (row,) = label(encoder, {"messages": [{"role": r, "content": c} for r, c in rows]}, max_seq_len=40)
    assert (row.reason, row.notes) == ("truncated", ())
    assert trained_texts(encoder, row) == ["A<|im_end|>"]


def test_ledger_accounts_for_every_row(encoder: Encoder) -> None:
    rows = label(
        encoder, CHAT, chat_row("Q", ""), chat_row("Q", "I am {{name}}"), chat_row("Q", "A " * 300),
        {"messages": [*CHAT["messages"], {"role": "user", "content": "?"}]}, max_seq_len=100,
    )  # fmt: skip
    ledger = Ledger()
    for row in rows:
        ledger.add(row)
    assert (ledger.rows, ledger.used, ledger.refused, ledger.truncated) == (5, 3, 2, 1)
    assert ledger.num_bad == 1  # a placeholder row is left out by decision, an empty reply is bad
    assert ledger.count_notes() == {NOTE_UNANSWERED: 1, NOTE_CUT_REPLY: 1}
    with pytest.raises(DataError, match=r"1 of 5 rows \(20.0%\) .*\n  x.jsonl:2: turn 1 \(assistant\) "):
        ledger.raise_if_unusable(0.01)
    ledger.raise_if_unusable(0.2)
    entry = ledger.to_json()["files"]["x.jsonl"]
    numbers = [n for rows_ in entry["refused"].values() for n in rows_]
    assert sorted(numbers) == [2, 3]
    assert entry["truncated"] == [{"row": 4, "tokens_lost": rows[3].tokens_lost}]


def test_first_row_of_unknown_format_ends_the_command_later_ones_are_refused(encoder: Encoder) -> None:
    with pytest.raises(DataError) as error:
        label(encoder, {"a": 1}, CHAT)
    assert error.value.code == "format-unknown"
    assert "x.jsonl:1" in str(error.value)
    rows = label(encoder, CHAT, {"a": 1})
    assert [row.status for row in rows] == ["used", "refused"]


def test_an_absent_mapped_column_ends_the_command_at_the_first_row_only(encoder: Encoder) -> None:
    rows = [{"q": "Q", "a": "A"}, {"q": "Q", "b": "A"}]
    with raises(DataError, "format-unknown", "x.jsonl:1: ", "aa", "q, a"):
        label(encoder, *rows, fields={"prompt": "q", "completion": "aa"})
    kept, refused = label(encoder, *rows, fields={"prompt": "q", "completion": "a"})
    assert (kept.status, refused.status) == ("used", "refused")
    assert refused.code == "mapped-column-missing"
    assert "q, b" in refused.reason


def test_half_a_character_is_refused_in_data_and_in_chat(encoder: Encoder) -> None:
    rows = label(encoder, CHAT, chat_row("Q", "hi \ud83d"), {"text": "\ud83d"})
    assert [row.status for row in rows] == ["used", "refused", "refused"]
    assert [row.code for row in rows[1:]] == ["lone-surrogate", "lone-surrogate"]
    with pytest.raises(ModelError) as error:
        encoder.encode_prompt([Message("user", "hi \ud83d")])
    assert error.value.code == "lone-surrogate"


def test_the_last_error_does_not_advise_what_cannot_help(encoder: Encoder) -> None:
    ledger = Ledger()
    for row in label(encoder, chat_row("Q", ""), chat_row("Q", " ")):
        ledger.add(row)
    with pytest.raises(DataError) as error:
        ledger.raise_if_unusable(1.0)
    assert error.value.code == "no-usable-rows"
    assert "x.jsonl:1: turn 1 (assistant) " in str(error.value)
    assert "higher" not in str(error.value)
    with pytest.raises(DataError) as error:
        ledger.raise_if_unusable(0.01)
    assert "2 of 2 rows (100.0%)" in str(error.value)
    assert "higher" not in str(error.value)


def test_limit(encoder: Encoder) -> None:
    assert len(label(encoder, CHAT, CHAT, CHAT, limit=2)) == 2


@pytest.fixture
def gpt2_like(tokenizer: Any) -> Callable[[], Any]:
    def build() -> Any:
        plain = copy.deepcopy(tokenizer)
        plain.chat_template = None
        return plain

    return build


def test_a_base_model_without_template_gets_alpaca(gpt2_like: Callable[[], Any], tmp_path: Path) -> None:
    encoder = build_encoder(gpt2_like(), None, {}, DATE)
    assert encoder.template is not None
    assert encoder.template.is_fallback
    (row,) = label(encoder, chat_row("Q", "A"))
    assert encoder.tokenizer.decode(row.samples[0].input_ids) == "### Instruction:\nQ\n\n### Response:\nA<|im_end|>"
    assert trained_texts(encoder, row) == ["A<|im_end|>"]
    path = tmp_path / "mine.jinja"
    path.write_text(TRIMS)
    assert build_encoder(gpt2_like(), str(path), {}, DATE).template.text == TRIMS
    with pytest.raises(ModelError) as error:
        build_encoder(gpt2_like(), "nothing.jinja", {}, DATE)
    assert error.value.code == "template-not-found"


def test_overlong_split_drop_and_error(encoder: Encoder) -> None:
    (whole,) = label(encoder, CHAT)
    (split,) = label(encoder, CHAT, max_seq_len=30, overlong="split")
    assert (split.status, split.reason) == ("used", "split")
    ids = whole.samples[0].input_ids.tolist()
    trained = [i for i, mask in enumerate(whole.samples[0].loss_mask) if mask]
    seen: list[int] = []
    for sample in split.samples:
        assert len(sample.input_ids) <= 30
        seen += [int(i) for i, mask in zip(sample.input_ids, sample.loss_mask, strict=True) if mask]
    assert seen == [ids[i] for i in trained]  # every label once, in order
    (dropped,) = label(encoder, CHAT, max_seq_len=30, overlong="drop")
    assert (dropped.status, dropped.is_by_choice) == ("refused", True)
    with pytest.raises(DataError) as error:
        label(encoder, CHAT, max_seq_len=30, overlong="error")
    assert error.value.code == "row-too-long"
    assert "x.jsonl:1" in str(error.value)


def test_train_on_last_assistant_and_all(encoder: Encoder) -> None:
    (last,) = label(encoder, CHAT, train_on="last_assistant")
    assert trained_texts(encoder, last) == ["Bye bye.<|im_end|>"]
    (everything,) = label(encoder, CHAT, train_on="all")
    assert everything.samples[0].loss_mask.all()
    encoder = build_encoder(copy.deepcopy(encoder.tokenizer), "none", {}, DATE)
    (joined,) = label(encoder, {"prompt": "Q\n", "completion": "A"}, train_on="all")
    assert joined.samples[0].loss_mask.all()


def test_a_template_that_rejects_a_lone_question_is_an_error_not_a_traceback(tokenizer: Any) -> None:
    asks = "{% if messages|length < 2 %}{{ raise_exception('too short') }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError) as error:
        with_template(tokenizer, asks)
    assert error.value.code == "no-stop-token"


def test_reasoning_as_context_only(tokenizer: Any) -> None:
    template = STRIPS_HISTORY.replace("<think>\n\n</think>", "<think>\n' + (m.reasoning_content or '') + '\n</think>")
    encoder = with_template(tokenizer, template)
    messages = [*CHAT["messages"][:-1], {"role": "assistant", "content": "Bye.", "reasoning_content": "They leave."}]
    (row,) = label(encoder, {"messages": messages}, train_reasoning=False)
    assert trained_texts(encoder, row) == ["嗨 🙂!<|im_end|>", "Bye.<|im_end|>"]
    assert "They leave." in encoder.tokenizer.decode(row.samples[1].input_ids)


def test_the_mask_drawing_of_the_background_text_token_for_token(tokenizer: Any) -> None:
    """background/001: only the reply and the EOS after it are trained; BOS, roles, question and its EOS are not."""
    encoder = build_encoder(copy.deepcopy(tokenizer), "chatml", {}, DATE)
    reply = "你好！有什么可以帮助你的？"
    (row,) = label(encoder, chat_row("你好", reply))
    (sample,) = row.samples

    def ids(text: str) -> list[int]:
        return encoder.tokenizer.encode(text, add_special_tokens=False)

    start, end = encoder.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    context = [start, *ids("user\n你好"), end, *ids("\n"), start, *ids("assistant\n")]
    trained = [*ids(reply), end]
    assert sample.input_ids.tolist() == [*context, *trained, *ids("\n")]
    assert sample.loss_mask.tolist() == [0] * len(context) + [1] * len(trained) + [0] * len(ids("\n"))


ENDS_IN_NOTHING = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def test_a_template_that_ends_replies_in_nothing_gets_eos_there(tokenizer: Any) -> None:
    encoder = with_template(tokenizer, ENDS_IN_NOTHING)
    (row,) = label(encoder, CHAT)
    assert (row.status, row.how) == ("used", "composed")
    assert trained_texts(encoder, row) == ["嗨 🙂!<|im_end|>", "Bye bye.<|im_end|>"]
    assert encoder.tokenizer.decode(row.samples[1].input_ids).count("<|im_end|>") == 1


def test_pad_that_is_eos_is_trained_as_eos(tokenizer: Any) -> None:
    """With pad = EOS, masks that exclude pad also exclude every stop token; ours never look at pad."""
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.eos_token
    (row,) = label(build_encoder(own, None, {}, DATE), chat_row("Q", "A"))
    assert row.samples[0].input_ids[row.samples[0].loss_mask == 1][-1] == own.eos_token_id


def test_a_tokenizer_without_eos(tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    own.eos_token = None
    (row,) = label(build_encoder(own, None, {}, DATE), chat_row("Q", "A"))
    assert tokenizer.decode(row.samples[0].input_ids[-2:]) == "<|im_end|>\n"
    with pytest.raises(ModelError) as error:
        build_encoder(own, "none", {}, DATE)
    assert error.value.code == "no-eos-token"


def test_a_tokenizer_that_is_not_fast() -> None:
    from transformers.tokenization_python import PythonBackend

    class Letters(PythonBackend):
        vocab_size = 256

        def get_vocab(self) -> dict[str, int]:
            return {chr(code): code for code in range(256)}

        def _tokenize(self, text: str) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return ord(token)

        def _convert_id_to_token(self, index: int) -> str:
            return chr(index)

    slow = Letters(eos_token="#")
    with pytest.raises(ModelError) as error:
        build_encoder(slow, "alpaca", {}, DATE)
    assert error.value.code == "tokenizer-not-fast"


def test_a_template_that_asks_for_keys_nobody_has(tokenizer: Any) -> None:
    text = "{% for m in messages %}{% for part in m.parts %}{{ part }}{% endfor %}<|im_end|>{% endfor %}"
    with pytest.raises(ModelError) as error:
        with_template(tokenizer, text)
    assert error.value.code == "template-drops-replies"
    nested = "{% for m in messages %}{{ m.meta.author.name }}<|im_end|>{% endfor %}"
    with pytest.raises(ModelError) as error:
        with_template(tokenizer, nested)
    assert error.value.code == "template-rejects"
