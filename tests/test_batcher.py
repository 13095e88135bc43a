"""Continuous batching: whatever joins, leaves, waits or fails beside it, a row's tokens are those of the row alone."""

from __future__ import annotations

import copy
import datetime
import os
import random
from typing import Any

import pytest
import torch

from conftest import build_model, tiny_config
from tunesmith.caches import selfcheck
from tunesmith.caches.attention import cached_attention
from tunesmith.errors import ModelError, UsageError
from tunesmith.generation.batcher import Batcher, Token
from tunesmith.generation.request import Request
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import Speaker
from tunesmith.model.bpe import train_tokenizer
from tunesmith.model.tokenizer import build_encoder

ENCODER = build_encoder(train_tokenizer(["a b 🙂 你好"], vocab_size=300), None, {}, datetime.datetime(2026, 1, 2))
ALL = ["llama", "qwen2", "qwen3", "qwen3_moe", "gpt2", "gemma2", "gemma3"]


def speaker_of(model: Any, stops: tuple[int, ...] = (), context: int | None = None, **adapters: str) -> Speaker:
    speaker = Speaker(model, ENCODER, context, adapters=adapters)
    speaker.__dict__["stop_ids"] = frozenset(stops)
    return speaker


@pytest.fixture(scope="module")
def qwen() -> Speaker:
    return speaker_of(build_model(tiny_config("qwen3")).eval(), context=512)


@pytest.fixture(scope="module")
def tuned() -> Speaker:
    """A base with two adapters of random weights."""
    from peft import LoraConfig, get_peft_model

    model = build_model(tiny_config("qwen3")).eval()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    wrapped = get_peft_model(model, config, "first")
    wrapped.add_adapter("second", copy.deepcopy(config))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.eval()
    speaker = Speaker(model, ENCODER, 512, wrapped, {"one": "first", "two": "second"})
    speaker.__dict__["stop_ids"] = frozenset()
    return speaker


def ids_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 290) for _ in range(length)]


def run(batcher: Batcher, *requests: Request) -> list[list[int]]:
    """Token ids of the replies to requests that are submitted at once."""
    return [[token.id for token in tokens] for tokens in run_tokens(batcher, *requests)]


def run_tokens(batcher: Batcher, *requests: Request) -> list[list[Token]]:
    found: dict[int, list[Token]] = {batcher.submit(request): [] for request in requests}
    while batcher.has_work:
        for token in batcher.step():
            found[token.row].append(token)
    assert all(tokens[-1].finish_reason for tokens in found.values())
    return list(found.values())


def greedy(ids: list[int], new: int = 12, **more: Any) -> Request:
    return Request(ids, Sampling(new, 0), **more)


def theirs(model: Any, ids: list[int], new: int) -> list[int]:
    """Greedy tokens of transformers' generate."""
    given = torch.tensor([ids])
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    output = model.generate(given, attention_mask=torch.ones_like(given), **options)
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", ALL)
def test_rows_that_join_and_leave_have_the_tokens_of_generate(name: str) -> None:
    """Sliding windows are 8 tokens; prompts are read in chunks of 7. Rows join every other step, and one is cancelled."""
    model = build_model(tiny_config(name)).eval()
    speaker = speaker_of(model, context=256)
    assert speaker.cache_check.remark == ""
    prompts = [ids_of(length, length) for length in (3, 40, 1, 17, 9, 25)]
    limits = [20, 6, 11, 30, 1, 9]
    wanted = [theirs(model, ids, new) for ids, new in zip(prompts, limits, strict=True)]
    batcher, found = Batcher(speaker, prefill_tokens=7), {}
    cancelled = -1
    for step in range(200):
        if step % 2 == 0 and len(found) < len(prompts):
            found[batcher.submit(greedy(prompts[len(found)], limits[len(found)]))] = []
        if step == 3:
            cancelled = batcher.submit(greedy(ids_of(30), 40))
        if step == 12:
            batcher.cancel(cancelled)
        for token in batcher.step():
            if token.row in found:
                found[token.row].append(token.id)
    assert list(found.values()) == wanted
    assert not batcher.has_work


@pytest.mark.parametrize("seed", range(40 if "TUNESMITH_LONG" in os.environ else 2))
def test_a_random_course_of_events_changes_no_row(tuned: Speaker, seed: int) -> None:
    """Random prompts with shared beginnings, lengths, settings, adapters, cancels, and memory that may be too small."""
    rng = random.Random(seed)
    beginnings = [ids_of(rng.randrange(20, 120), seed * 10 + i) for i in range(3)]
    requests = [_random_request(rng, beginnings) for _ in range(24)]
    alone = [run(Batcher(tuned), request)[0] for request in requests]
    memory = tuned.cache_check.bytes_a_token * rng.choice([1024, 1500, 4000])
    batcher = Batcher(tuned, max_rows=rng.choice([2, 7, 64]), prefill_tokens=rng.choice([5, 64]), memory_bytes=memory)
    found: dict[int, list[int]] = {}
    dropped = set()
    while len(found) < len(requests) or batcher.has_work:
        if len(found) < len(requests) and rng.random() < 0.5:
            found[batcher.submit(requests[len(found)])] = []
        if found and rng.random() < 0.03:
            dropped.add(row := rng.choice(list(found)))
            batcher.cancel(row)
        for token in batcher.step():
            assert token.row not in dropped
            found[token.row].append(token.id)
        assert batcher.cache_bytes <= memory
    for row, tokens, wanted in zip(found, found.values(), alone, strict=True):
        assert row in dropped or tokens == wanted


def _random_request(rng: random.Random, beginnings: list[list[int]]) -> Request:
    ids = rng.choice(beginnings)[: rng.randrange(1, 120)] + ids_of(rng.randrange(1, 30), rng.randrange(5))
    settings: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.3, "seed": rng.randrange(9)},
        {"temperature": 0.8, "top_p": 0.7, "top_k": 0, "seed": 5},
        {"temperature": 2.0, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3},
    ]
    sampling = Sampling(rng.choice([1, 5, 20, 90]), **rng.choice(settings))
    stops = ("a",) if rng.random() < 0.2 else ()
    return Request(ids, sampling, stops, adapter=rng.choice(["one", "two", "base", None]))


def test_a_sampled_row_is_the_same_alone_and_among_64(qwen: Speaker) -> None:
    settings: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 0},
        {"temperature": 1.0, "top_k": 0, "top_p": 0.9},
        {"temperature": 1.2, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 0},
    ]
    requests = [
        Request(ids_of(5 + place % 37, place), Sampling(16, seed=place, **settings[place % len(settings)]))
        for place in range(64)
    ]
    together = run(Batcher(qwen), *requests)
    assert together == [run(Batcher(qwen), request)[0] for request in requests]
    assert run(Batcher(qwen), *reversed(requests)) == together[::-1]


def test_a_long_prompt_stalls_nobody_for_more_than_a_chunk(qwen: Speaker) -> None:
    batcher, sizes = Batcher(qwen, prefill_tokens=16), []
    hook = qwen.model.register_forward_pre_hook(
        lambda *call: sizes.append(call[2]["input_ids"].shape[1]), with_kwargs=True
    )
    running = batcher.submit(greedy(ids_of(4), 100))
    batcher.step()
    long = batcher.submit(greedy(ids_of(400), 5))
    short = batcher.submit(greedy(ids_of(6), 5))
    steps = [[token.row for token in batcher.step()] for _ in range(30)]
    hook.remove()
    assert all(running in rows for rows in steps)
    assert max(sizes) <= 16 + 3
    assert short in steps[1]  # it need not wait until the long one is read
    first = next(number for number, rows in enumerate(steps) if long in rows)
    assert 24 <= first <= 28
    assert run(Batcher(qwen, prefill_tokens=16), greedy(ids_of(400))) == run(Batcher(qwen), greedy(ids_of(400)))


class Counting:
    """Counts the tokens that run through a model."""

    def __init__(self, speaker: Speaker) -> None:
        self.tokens = 0
        speaker.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.tokens += kwargs["input_ids"].shape[1] if kwargs else 0

    def spent(self) -> int:
        spent, self.tokens = self.tokens, 0
        return spent


def test_the_beginning_of_an_earlier_conversation_is_not_computed_again(qwen: Speaker) -> None:
    batcher, counting = Batcher(qwen), Counting(qwen)
    first = ids_of(100)
    fresh = lambda ids: run(Batcher(qwen), greedy(ids))[0]  # noqa: E731
    reply = run(batcher, greedy(first))[0]
    assert counting.spent() == 100 + 11
    longer = first + reply + ids_of(9, 1)
    answers = run(batcher, greedy(longer))
    assert counting.spent() == 1 + 9 + 11  # the reply's last token had not been computed
    assert run(batcher, greedy(longer)) == answers  # the same again: its last token alone
    assert counting.spent() == 1 + 11
    shorter = run(batcher, greedy(first[:60]))
    assert counting.spent() == 1 + 11
    other = run(batcher, greedy([*first[:50], 7, 8, 9]))
    assert counting.spent() == 3 + 11
    together = run(batcher, *[Request(ids_of(80, 3), Sampling(4, 1.0, seed)) for seed in range(6)])
    assert counting.spent() == 80 + 5 + 6 * 3  # six samples of one new prompt: it is read once
    assert (answers[0], shorter[0], other[0]) == (fresh(longer), fresh(first[:60]), fresh([*first[:50], 7, 8, 9]))
    alone = [run(Batcher(qwen), Request(ids_of(80, 3), Sampling(4, 1.0, seed)))[0] for seed in range(6)]
    assert together == alone


def test_kept_beginnings_leave_when_memory_is_needed(qwen: Speaker) -> None:
    memory = qwen.cache_check.bytes_a_token * 1100
    batcher, counting = Batcher(qwen, memory_bytes=memory), Counting(qwen)
    prompts = [ids_of(120, seed) for seed in range(9)]
    first = [run(batcher, greedy(ids, 3))[0] for ids in prompts]
    assert batcher.cache_bytes <= memory
    counting.spent()
    assert run(batcher, greedy(prompts[-1], 3))[0] == first[-1]
    assert counting.spent() == 1 + 2
    assert run(batcher, greedy(prompts[0], 3))[0] == first[0]
    assert counting.spent() == 120 + 2


def test_rows_of_several_adapters_run_together_and_share_nothing(tuned: Speaker) -> None:
    ids = ids_of(60)
    wanted = {}
    for name in ("one", "two", "base"):
        tuned.switch(name)
        wanted[name] = theirs(tuned.model, ids, 12)
    assert len({str(tokens) for tokens in wanted.values()}) == 3
    tuned.switch("two")
    batcher = Batcher(tuned)
    names = ["one", None, "base", "two", "one", "base"]
    for _ in range(2):  # the second time from kept beginnings
        found = run(batcher, *[greedy(ids, adapter=name) for name in names])
        assert found == [wanted[name or "two"] for name in names]
        assert tuned.active == "two"
    for name in ("one", "two", "base"):  # a prompt that another adapter has just answered
        fresh = ids_of(70, 5)
        assert run(batcher, greedy(fresh, adapter=name)) == run(Batcher(tuned), greedy(fresh, adapter=name))
    with pytest.raises(ModelError) as error:
        batcher.submit(greedy(ids, adapter="three"))
    assert error.value.code == "unknown-adapter"


def test_memory_is_checked_at_start_and_rows_that_do_not_fit_wait(qwen: Speaker) -> None:
    bytes_a_token = qwen.cache_check.bytes_a_token
    assert bytes_a_token == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dim, fp32
    with pytest.raises(ModelError) as error:
        Batcher(qwen, memory_bytes=bytes_a_token * 500)
    assert error.value.code == "cache-memory"
    assert "512" in str(error.value)
    memory = bytes_a_token * 1200
    batcher = Batcher(qwen, memory_bytes=memory)
    assert batcher.memory.rows_at_once == 2
    requests = [greedy(ids_of(30 + seed, seed), 200) for seed in range(6)]
    rows = [batcher.submit(request) for request in requests]
    found: dict[int, list[int]] = {row: [] for row in rows}
    most = 0
    while batcher.has_work:
        for token in batcher.step():
            found[token.row].append(token.id)
        most = max(most, batcher.num_running)
        assert batcher.cache_bytes <= memory
    assert 2 <= most < 6
    assert list(found.values()) == [run(Batcher(qwen), request)[0] for request in requests]


def test_a_row_ends_where_the_context_does(qwen: Speaker) -> None:
    (tokens,) = run_tokens(Batcher(qwen), greedy(ids_of(500), 100))
    assert (len(tokens), tokens[-1].finish_reason) == (12, "length")
    with pytest.raises(ModelError) as error:
        Batcher(qwen).submit(greedy(ids_of(512)))
    assert error.value.code == "context-full"


def test_cancel_frees_a_row_at_once(qwen: Speaker) -> None:
    batcher = Batcher(qwen, max_rows=1)
    first, second = batcher.submit(greedy(ids_of(9), 50)), batcher.submit(greedy(ids_of(8), 2))
    batcher.step()
    assert (batcher.num_running, batcher.num_waiting) == (1, 1)
    batcher.cancel(first)
    assert batcher.num_running == 0
    assert [token.row for token in batcher.step()] == [second]
    third = batcher.submit(greedy(ids_of(8), 2))
    batcher.cancel(third)
    batcher.cancel(third)
    batcher.cancel(999)
    assert [token.row for token in batcher.step()] == [second]
    assert not batcher.has_work


def test_logprobs_are_those_of_the_model_before_any_setting(qwen: Speaker) -> None:
    ids, sampling = ids_of(20), Sampling(6, 1.8, 3, top_k=4, repetition_penalty=1.4)
    plain = Request(ids_of(7, 9), Sampling(9, 0))
    (tokens, others) = run_tokens(Batcher(qwen), Request(ids, sampling, top_logprobs=3), plain)
    with torch.no_grad():
        whole = qwen.model(torch.tensor([ids + [token.id for token in tokens]])).logits[0].log_softmax(-1)
    for place, token in enumerate(tokens):
        expected = whole[len(ids) - 1 + place]
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-4)
        best = expected.topk(3)
        assert [one for one, _ in token.top_logprobs] == best.indices.tolist()
        assert [value for _, value in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert all(token.logprob is None and token.top_logprobs == () for token in others)
    (chosen_only,) = run_tokens(Batcher(qwen), Request(ids, sampling, top_logprobs=0))
    assert [token.logprob for token in chosen_only] == pytest.approx([token.logprob for token in tokens], abs=1e-4)
    assert all(not token.top_logprobs for token in chosen_only)


class Only:
    """A constraint: these tokens one after another."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = list(ids)

    def mask(self) -> torch.Tensor:
        allowed = torch.zeros(300, dtype=torch.bool)
        if self.ids:
            allowed[self.ids[0]] = True
        return allowed

    def accept(self, token_id: int) -> None:
        assert token_id == self.ids.pop(0)


def spoken(text: str) -> list[int]:
    return list(ENCODER.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def say(speaker: Speaker, text: str, *stops: str, **more: Any) -> list[Token]:
    """The tokens of a row that is made to say a text."""
    ids = spoken(text)
    request = Request([5], Sampling(len(ids), **more), stops, constraint=Only(ids))
    return run_tokens(Batcher(speaker), request, greedy(ids_of(4), 3))[0]


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("aab 🙂 b", ("b 🙂",), "aa"),  # the emoji is several tokens
        ("a🙂你好b", ("你",), "a🙂"),
        ("abababac", ("abac",), "abab"),
        ("ab ab", ("zz", " ab"), "ab"),
        ("ab", ("abc",), "ab"),  # held back, and shown at the end
        ("xyz", ("yz", "xyz"), ""),
        ("aaaa", ("b",), "aaaa"),
    ],
)
def test_stop_strings_end_a_row_and_are_never_shown(
    qwen: Speaker, text: str, stops: tuple[str, ...], shown: str
) -> None:
    for temperature in (0, 1.0):
        tokens = say(qwen, text, *stops, temperature=temperature)
        assert "".join(token.text for token in tokens) == shown
        has_stop = any(stop in text for stop in stops)
        assert tokens[-1].finish_reason == ("stop" if has_stop else "length")
        for token in tokens[:-1]:
            assert "\ufffd" not in token.text
    by_sampling = say(qwen, text, temperature=0, stop=list(stops))
    assert "".join(token.text for token in by_sampling) == shown


def test_text_is_held_back_only_while_it_may_become_a_stop_string(qwen: Speaker) -> None:
    assert [token.text for token in say(qwen, "a<b<<c", "<<c", temperature=0)] == ["a", "", "<b", "", "", ""]
    assert [token.text for token in say(qwen, "a<b<<", "<<c", temperature=0)] == ["a", "", "<b", "", "<<"]


def test_a_constraint_that_allows_nothing_ends_its_row_alone(qwen: Speaker) -> None:
    ids = spoken("ab")
    bad = Request([5], Sampling(9, 0), constraint=Only(ids))
    tokens, others = run_tokens(Batcher(qwen), bad, greedy(ids_of(4), 3))
    assert [token.id for token in tokens[:-1]] == ids
    assert tokens[-1].finish_reason == "error"
    assert tokens[-1].error is not None
    assert tokens[-1].error.code == "constraint-dead-end"
    assert [token.id for token in others] == run(Batcher(qwen), greedy(ids_of(4), 3))[0]


@pytest.mark.parametrize("method", ["mask", "accept"])
def test_a_constraint_that_fails_ends_its_row_alone(qwen: Speaker, method: str) -> None:
    constraint = Only([7, 8])

    def fail(*_: Any) -> None:
        raise RuntimeError("broken library")

    setattr(constraint, method, fail)
    tokens, others = run_tokens(Batcher(qwen), Request([5], Sampling(9, 0), constraint=constraint), greedy([6], 3))
    assert tokens[-1].error is not None
    assert tokens[-1].error.code == "constraint-failed"
    assert "broken library" in str(tokens[-1].error)
    assert [token.id for token in others] == run(Batcher(qwen), greedy([6], 3))[0]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_damaged_logits_end_their_row_alone(temperature: float) -> None:
    """A token whose embedding is nan ruins the row that has it, now and where its cache is used by another row."""
    model = build_model(tiny_config("qwen3", tie_word_embeddings=False)).eval()
    speaker = speaker_of(model, context=512)
    sound = [Request(ids_of(40, seed), Sampling(9, temperature, seed)) for seed in range(5)]
    alone = [run(Batcher(speaker), request)[0] for request in sound]
    with torch.no_grad():
        model.get_input_embeddings().weight[299] = float("nan")
    batcher = Batcher(speaker)
    damaged = Request([*ids_of(50, 7), 299, *ids_of(50, 8)], Sampling(9, temperature))
    for order in ([0, None, 1, 2], [None, 3], [4, None], [None], [0, 1, 2, 3, 4]):
        requests = [damaged if place is None else sound[place] for place in order]
        for place, tokens in zip(order, run_tokens(batcher, *requests), strict=True):
            if place is None:
                assert [(token.finish_reason, token.error and token.error.code) for token in tokens] == [
                    ("error", "logits-not-finite")
                ]
            else:
                assert [token.id for token in tokens] == alone[place]


def test_prompts_that_cannot_be_continued(qwen: Speaker) -> None:
    batcher = Batcher(qwen)
    for ids, code in (([], "prompt-empty"), ([5, 400], "token-out-of-range"), ([-1], "token-out-of-range")):
        with pytest.raises(ModelError) as error:
            batcher.submit(greedy(ids))
        assert error.value.code == code
    with pytest.raises(UsageError) as usage:
        batcher.submit(greedy([5], 0))
    assert usage.value.code == "sampling-value"
    with pytest.raises(UsageError) as usage:
        Batcher(qwen, max_rows=0)
    assert usage.value.code == "batcher-value"
    assert not batcher.has_work


def test_a_model_that_mixes_rows_runs_them_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by its logits: here a convolution over the tokens of a forward, as state-space models have."""
    model = build_model(tiny_config("qwen3")).eval()
    inner = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: inner(x + 0.1 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])
    speaker = speaker_of(model, context=256)
    assert "differ by" in speaker.cache_check.remark
    requests = [Request(ids_of(length, length), Sampling(8, 1.0, length)) for length in (3, 9, 40)]
    assert run(Batcher(speaker, max_rows=2), *requests) == [run(Batcher(speaker), one)[0] for one in requests]


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_longest_row_runs_one_by_one(rope: str) -> None:
    more: dict[str, Any] = {"rope_type": rope, "factor": 2.0, "rope_theta": 1e4}
    if rope == "longrope":
        more |= {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 64}
    model = build_model(tiny_config("llama", rope_parameters=more)).eval()
    speaker = speaker_of(model, context=256)
    assert rope in speaker.cache_check.remark
    assert run(Batcher(speaker), greedy(ids_of(9), 5))[0] == theirs(model, ids_of(9), 5)


def test_state_space_models_run_one_by_one() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.5)
    model = AutoModelForCausalLM.from_config(config).eval()
    speaker = speaker_of(model, context=256)
    assert speaker.cache_check.layout is None
    prompts = [ids_of(length, length) for length in (3, 9, 20)]
    wanted = [theirs(model, ids, 6) for ids in prompts]
    assert run(Batcher(speaker), *[greedy(ids, 6) for ids in prompts]) == wanted


def test_damaged_weights_are_no_reason_to_run_one_by_one() -> None:
    model = build_model(tiny_config("qwen3")).eval()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
        model.lm_head.weight[8] = float("inf")
    assert selfcheck.check_cache(model, 256).remark == ""


def test_an_attention_that_sees_too_little_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check can fail: with the last key hidden from every decoding row."""
    model = build_model(tiny_config("qwen3")).eval()
    attend = selfcheck.PackedRows.forward

    def shifted(self: Any, adapter: str, chunks: Any) -> Any:
        rows, logits = attend(self, adapter, chunks)
        return rows, logits.roll(1, 0)

    monkeypatch.setattr(selfcheck.PackedRows, "forward", shifted)
    assert selfcheck.check_cache(model, 256).layout is None


def test_two_callers_of_generate_may_take_turns(qwen: Speaker) -> None:
    speaker = speaker_of(qwen.model, context=512)
    one = speaker.generate([ids_of(5)], Sampling(9, 0))
    two = speaker.generate([ids_of(6), ids_of(7)], Sampling(9, 0))
    tokens = [next(one), next(two), next(two), *one, *two]
    assert len(tokens) == 27
    alone = [run(Batcher(qwen), greedy(ids_of(length), 9))[0] for length in (5, 6, 7)]
    assert [tokens[0].id, *[token.id for token in tokens[3:11]]] == alone[0]
    mixed = [*tokens[1:3], *tokens[11:]]
    assert [[token.id for token in mixed if token.row == row] for row in (0, 1)] == alone[1:]


def test_attention_is_put_back(qwen: Speaker) -> None:
    before = qwen.model.config._attn_implementation
    run(Batcher(qwen), greedy(ids_of(5)))
    assert qwen.model.config._attn_implementation == before != cached_attention.__name__
    assert qwen.model(torch.tensor([ids_of(5)])).logits.isfinite().all()
