"""Table of supported row formats with examples, for docs/data.md and the tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of row.

    Attributes:
        format: the value of data.format that reads it; auto detects it too.
        whose: tools that write such rows.
        example: a row with every key that is read.
        becomes: what it is parsed into.
        fields: data.fields.* that it needs; usually none.
    """

    format: str
    whose: str
    example: Mapping[str, Any]
    becomes: str
    fields: Mapping[str, str] = field(default_factory=dict)


_SCHEMA = {"name": "weather", "description": "Tells the weather.", "parameters": {"city": {"type": "string"}}}
_TOOL = {"type": "function", "function": _SCHEMA}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
_CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]

FORMAT_TABLE: tuple[Shape, ...] = (
    Shape(
        "messages", "Hugging Face, OpenAI, TRL",
        {"messages": [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "Rain?", "name": "ann"},
            {"role": "assistant", "content": "I look", "reasoning_content": "Ask the tool", "tool_calls": [_CALL]},
            {"role": "tool", "content": "sunny", "name": "weather", "tool_call_id": "call_1"},
            {"role": "assistant", "content": "No", "loss_weight": 1},
        ], "tools": [_TOOL], "chat_template_kwargs": {"style": "plain"},
         "documents": [{"title": "Sky", "text": "Blue"}]},
        "unchanged; also under `conversations` (MiniMind) and `conversation` (LMSYS)",
    ),
    Shape(
        "messages", "MiniMind",
        {"conversations": [
            {"role": "system", "content": "Be brief", "tools": '[{"name": "weather"}]'},
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": "I look",
             "tool_calls": '[{"name": "weather", "arguments": {"city": "Rome"}}]'},
        ]},
        "the same turns; tools of the system turn are the chat's",
    ),
    Shape(
        "messages", "gpt-oss, TRL, DeepSeek",
        {"messages": [{"role": "user", "content": "Hello"},
                      {"role": "assistant", "content": "Hi", "thinking": "Greet"}]},
        "`thinking`, `reasoning`, `thought`, `thoughts` and `reasoning_content` are the reply's reasoning",
    ),
    Shape(
        "messages", "OpenAI's older function calling",
        {"messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": "I look",
             "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}},
            {"role": "function", "name": "weather", "content": "sunny"},
            {"role": "assistant", "content": "No", "weight": 1},
        ], "functions": [_SCHEMA]},
        "calls and tools in today's form",
    ),
    Shape(
        "messages", "OpenAI's Responses API",
        {"messages": [
            {"role": "user", "content": [{"type": "input_text", "text": "Rain?"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Ask the tool"}]},
            {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Rome"}'},
            {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "No"}]},
        ]},
        "items of one reply are joined",
    ),
    Shape(
        "messages", "Anthropic",
        {"system": [{"type": "text", "text": "Be brief"}], "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Ask the tool"},
                {"type": "text", "text": "I look"},
                {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Rome"}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": "sunny"}, {"type": "text", "text": "So?"}]},
            {"role": "assistant", "content": "No"},
        ], "tools": [{"name": "weather", "description": "Tells the weather.", "input_schema": {"type": "object"}}]},
        "tool results become separate turns",
    ),
    Shape(
        "messages", "Gemini, Vertex AI",
        {"systemInstruction": {"role": "system", "parts": [{"text": "Be brief"}]}, "contents": [
            {"role": "user", "parts": [{"text": "Rain?"}]},
            {"role": "model", "parts": [{"text": "Hm", "thought": True},
                                        {"functionCall": {"name": "weather", "args": {"city": "Rome"}}}]},
            {"role": "user", "parts": [{"functionResponse": {"name": "weather", "response": {"sky": "blue"}}}]},
            {"role": "model", "parts": [{"text": "No"}]},
        ], "tools": [{"functionDeclarations": [_SCHEMA]}]},
        "the same turns",
    ),
    Shape(
        "messages", "LLaMA-Factory's typed parts",
        {"messages": [
            {"role": "user", "content": [{"type": "text", "value": "Rain?"}], "loss_weight": 0},
            {"role": "assistant", "content": [
                {"type": "reasoning", "value": "Ask the tool"}, {"type": "text", "value": "I look"},
                {"type": "tool_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            ], "loss_weight": 1},
        ], "tools": '[{"name": "weather"}]'},
        "parts joined",
    ),
    Shape(
        "sharegpt", "ShareGPT, FastChat, LLaMA-Factory",
        {"system": "Be brief", "tools": '[{"name": "weather"}]', "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "No"},
        ]},
        "the same turns",
    ),
    Shape(
        "sharegpt", "Axolotl",
        {"conversations": [
            {"from": "human", "value": "Hello"},
            {"from": "gpt", "value": "Hi", "train": False},
            {"from": "human", "value": "Well?"},
            {"from": "gpt", "value": "Fine thanks", "train_detail": [
                {"begin_offset": 0, "end_offset": 3, "train": False},
                {"begin_offset": 4, "end_offset": 10, "train": True}]},
        ]},
        "`train`, `training`, `trainable` and `train_detail` say what is trained (`end_offset` is the last character)",
    ),
    Shape(
        "messages", "ms-swift",
        {"messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"role": "tool_response", "content": "sunny"},
            {"role": "assistant", "content": "No", "loss": True},
        ], "tools": '[{"name": "weather"}]'},
        "calls that follow each other are one reply",
    ),
    Shape(
        "messages", "LIMA", {"conversations": ["Hello", "Good day"]}, "user and assistant in turn",
    ),
    Shape(
        "xtuner", "XTuner", {"conversation": [{"system": "Be brief", "input": "Hello", "output": "Good day"}]},
        "a user and an assistant turn each; a later turn with another `system` refuses the row",
    ),
    Shape(
        "xtuner", "ms-swift", {"system": "Be brief", "conversation": [{"human": "Hello", "assistant": "Good day"}]},
        "a user and an assistant turn each",
    ),
    Shape(
        "query_response", "ms-swift, MetaMathQA",
        {"system": "Be brief", "query": "And now?", "response": "Fine", "history": [["Hello", "Good day"]]},
        "earlier pairs, then the question and its answer",
    ),
    Shape(
        "query_response", "HuatuoGPT-o1",
        {"Question": "Why?", "Complex_CoT": "Consider", "Response": "Because"}, "question, reasoning, answer",
    ),
    Shape(
        "prompt_completion", "OpenAI's first fine-tuning, TRL",
        {"prompt": "Hello", "completion": "Good day", "system": "Be brief"}, "a question and its answer",
    ),
    Shape(
        "prompt_completion", "TRL",
        {"prompt": [*_CHAT, {"role": "user", "content": "Poem?"}, {"role": "assistant", "content": "Roses are"}],
         "completion": [{"role": "assistant", "content": " red"}]},
        "turns inside a prompt are context; a prompt that ends in an assistant turn begins the reply, as context",
    ),
    Shape(
        "prompt_completion", "any columns",
        {"context": "It was 1912", "question": "When?", "answer": "1912", "why": "It says so",
         "system_prompt": "Be brief",
         "history": [{"question": "Hello", "answer": "Good day"}]},
        "question and context joined by a line break, reasoning, answer",
        {"prompt": "question", "completion": "answer", "input": "context", "reasoning": "why"},
    ),
    Shape(
        "alpaca", "Alpaca, LLaMA-Factory",
        {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief", "history": [["Hello", "Good day"]]},
        "instruction and input joined by a line break",
    ),
    Shape(
        "alpaca", "Dolly", {"instruction": "When?", "context": "It was 1912", "response": "1912"},
        "instruction and context joined by a line break",
    ),
    Shape("input_output", "many", {"input": "Hello", "output": "Good day"}, "a question and its answer"),
    Shape(
        "input_output", "Firefly", {"kind": "Chat", "input": "Hello", "target": "Good day"},
        "a question and its answer",
    ),
    Shape(
        "xlam", "Salesforce's xLAM",
        {"id": 1, "query": "Rain?", "tools": '[{"name": "weather", "parameters": {"city": {"type": "str"}}}]',
         "answers": '[{"name": "weather", "arguments": {"city": "Rome"}}]'},
        "a question and a reply of tool calls",
    ),
    Shape(
        "chatgpt_export", "ChatGPT's conversations.json",
        {"title": "Talk", "current_node": "c", "mapping": {
            "a": {"id": "a", "message": None, "parent": None, "children": ["b"]},
            "b": {"id": "b", "parent": "a", "children": ["c"], "message": {
                "id": "b", "author": {"role": "user"}, "content": {"content_type": "text", "parts": ["Hello"]},
                "weight": 1.0, "recipient": "all"}},
            "c": {"id": "c", "parent": "b", "children": [], "message": {
                "id": "c", "author": {"role": "assistant"}, "content": {"content_type": "text", "parts": ["Good day"]},
                "weight": 1.0, "recipient": "all"}},
        }},
        "the branch shown last",
    ),
    Shape(
        "segments", "Axolotl's input_output",
        {"segments": [{"label": False, "text": "<s>Hello\n"}, {"label": True, "text": "Good day</s>"}]},
        "rendered text without a template; label true is trained",
    ),
    Shape("text", "pre-training", {"text": "Once upon a time"}, "every token trained"),
)  # fmt: skip
