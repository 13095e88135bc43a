"""Generation: greedy tokens equal transformers', and a reply is the same alone and in a batch."""

from __future__ import annotations

import datetime
import inspect
import random
import time
import types
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

import tokenizers_of_others as others
from conftest import build_model, tiny_config
from tunesmith.errors import ModelError
from tunesmith.generation import choose, rules, sampling
from tunesmith.generation.batcher import Batcher
from tunesmith.generation.decode import PieceDecoder
from tunesmith.generation.request import Request
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import Speaker
from tunesmith.model.bpe import train_tokenizer
from tunesmith.model.tokenizer import build_encoder

LENGTHS = (3, 17, 1, 40)
NEW = 24
GREEDY = Sampling(NEW, temperature=0)


ENCODER = build_encoder(train_tokenizer(["a b"], vocab_size=300), None, {}, datetime.datetime(2026, 1, 2))


def speaker_of(model: Any, stops: tuple[int, ...] = ()) -> Speaker:
    """A speaker whose rows end at these tokens."""
    speaker = Speaker(model, ENCODER)
    speaker.__dict__["stop_ids"] = frozenset(stops)
    return speaker


def prompts_of(lengths: tuple[int, ...], sampling: Sampling) -> list[Request]:
    rng = random.Random(0)
    return [Request([rng.randrange(3, 400) for _ in range(length)], sampling) for length in lengths]


def replies(model: Any, prompts: list[Request], stops: tuple[int, ...] = ()) -> list[list[int]]:
    """Tokens of the replies, all computed together; raises what ended a row."""
    batcher = Batcher(speaker_of(model, stops))
    found: dict[int, list[int]] = {batcher.submit(prompt): [] for prompt in prompts}
    while batcher.has_work:
        for token in batcher.step():
            if token.error is not None:
                raise token.error
            found[token.row].append(token.id)
    return list(found.values())


def theirs(model: Any, prompt: Request, **options: Any) -> list[int]:
    """Tokens of transformers' generate, without those after the stop token."""
    ids = torch.tensor([list(prompt.ids)])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, pad_token_id=0, **options)
    return output[0, len(prompt.ids) :].tolist()


@pytest.fixture(params=["llama", "qwen3", "qwen3_moe", "gpt2", "gemma3"])
def model(request: pytest.FixtureRequest) -> Any:
    made = build_model(tiny_config(request.param)).eval()
    made.generation_config.eos_token_id = None
    return made


def test_greedy_tokens_are_those_of_transformers_alone_and_in_a_batch(model: Any) -> None:
    prompts = prompts_of(LENGTHS, GREEDY)
    wanted = [theirs(model, prompt, do_sample=False) for prompt in prompts]
    assert [replies(model, [prompt])[0] for prompt in prompts] == wanted
    assert replies(model, prompts) == wanted


STOP = 57
RULES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"suppress_tokens": [*range(3, 200)]},
    {"sequence_bias": [[[11], 90.0]]},
    {"bad_words_ids": [[token] for token in range(3, 300)]},
    {"min_new_tokens": 7, "sequence_bias": [[[STOP], 90.0]]},
    {"min_length": 20, "sequence_bias": [[[STOP], 90.0]]},
    {"forced_eos_token_id": STOP},
    {"forced_bos_token_id": 91},
    {"begin_suppress_tokens": [*range(3, 200)]},
    {"exponential_decay_length_penalty": (3, 9.0)},
    {"renormalize_logits": True, "sequence_bias": [[[11], 90.0]]},
]


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: next(iter(rules)))
def test_rules_of_generation_config_hold_in_greedy_replies(rules: dict[str, Any]) -> None:
    model = build_model(tiny_config("qwen3")).eval()
    prompts = prompts_of(LENGTHS, GREEDY)
    model.generation_config.eos_token_id = STOP
    plain = replies(model, prompts, (STOP,))
    for name, value in rules.items():
        setattr(model.generation_config, name, value)
    wanted = [theirs(model, prompt, do_sample=False) for prompt in prompts]
    assert wanted != plain
    assert replies(model, prompts, (STOP,)) == wanted


def test_remove_invalid_values() -> None:
    model = build_model(tiny_config("qwen3")).eval()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    model.generation_config.remove_invalid_values = True
    model.generation_config.eos_token_id = None
    prompts = prompts_of(LENGTHS, GREEDY)
    assert replies(model, prompts) == [theirs(model, prompt, do_sample=False) for prompt in prompts]


def test_every_setting_of_generation_config_is_applied_or_named() -> None:
    """A setting of a coming transformers that nobody has looked at fails here."""
    source = "".join(map(inspect.getsource, (choose, rules, sampling)))
    passive = {
        "max_length", "max_new_tokens", "early_stopping", "use_mtp", "use_cache", "cache_implementation",
        "cache_config", "max_cache_len", "length_penalty", "num_return_sequences", "output_attentions",
        "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "pad_token_id",
        "bos_token_id", "eos_token_id", "decoder_start_token_id", "compile_config", "disable_compile", "low_memory",
        "continuous_batching_config", "prefill_chunk_size", "transformers_version", "diversity_penalty",
        "num_beam_groups", "max_matching_ngram_size",
    }  # fmt: skip
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    speculative = {name for name in names if "assistant" in name or "lookbehind" in name or "speculation" in name}
    assert {name for name in names - passive - speculative if name not in source} == set()


def test_settings_that_are_not_applied_are_named() -> None:
    config = GenerationConfig(num_beams=4, top_p=0.5, stop_strings=["END"])
    assert sampling.unapplied_settings(config) == ["num_beams", "stop_strings"]
    assert sampling.unapplied_settings(GenerationConfig()) == []
    assert sampling.unapplied_settings(None) == []


def test_a_sampled_reply_is_the_same_alone_and_in_a_batch(model: Any) -> None:
    prompts = [Request(prompt.ids, Sampling(NEW, 1.5, seed)) for seed, prompt in enumerate(prompts_of(LENGTHS, GREEDY))]
    together = replies(model, prompts)
    assert together == [replies(model, [prompt])[0] for prompt in prompts]
    assert together == replies(model, prompts)
    again = [Request(prompt.ids, Sampling(NEW, 1.5, seed=9)) for prompt in prompts]
    assert all(one != other for one, other in zip(replies(model, again), together, strict=True))


def test_samples_follow_the_probabilities_that_generation_config_leaves() -> None:
    """2,000 draws of one token: only the three tokens that top_k keeps, in proportion to their probabilities."""
    model = build_model(tiny_config("qwen3", initializer_range=0.1)).eval()
    model.generation_config.do_sample, model.generation_config.top_k = True, 3
    model.generation_config.temperature = 2.0
    ids = [5, 9, 20]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1] / 2.0
    top = logits.topk(3)
    probable = dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))
    drawn = [reply[0] for reply in replies(model, [Request(ids, Sampling(1, seed=seed)) for seed in range(2000)])]
    assert set(drawn) == set(probable)
    for token, share in probable.items():
        assert drawn.count(token) / 2000 == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("spread", [0.01, 0.3])
@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 7}, {"top_k": 0}, {"top_k": 0, "top_p": 0.6}, {"top_p": 0.3}, {"top_k": 0, "min_p": 0.2},
        {"top_k": 1100, "top_p": 0.9}, {"top_k": 0, "top_p": 0.97, "min_p": 0.01}, {"temperature": 1e-9},
        {"repetition_penalty": 3.0}, {"top_k": 2000},
    ],
    ids=str,
)  # fmt: skip
def test_the_tokens_that_may_be_drawn_are_those_that_transformers_keeps(
    settings: dict[str, Any], spread: float
) -> None:
    """Whatever the random number, with a vocabulary beyond what is sorted; all rows at once, in one call."""
    vocab, count = 1500, 300
    torch.manual_seed(0)
    logits = torch.randn(1, vocab) * spread * 10
    history = [5, 9, int(logits.argmax())]
    given = Sampling(4, **({"temperature": 1.4} | settings))
    model = types.SimpleNamespace(generation_config=GenerationConfig())
    config = sampling.settings_of(model, given)  # type: ignore[arg-type]
    kept = logits
    for rule in rules.rules_of(config, 3, 4, (), "cpu"):
        kept = rule(torch.tensor([history]), kept)
    wanted = kept.softmax(-1)[0]
    cpu = torch.device("cpu")
    rows = []
    for seed in range(count):
        request = Request(history, Sampling(4, seed=seed, **({"temperature": 1.4} | settings)))
        rows.append(choose.Chooser(model, request, 4, (), cpu))  # type: ignore[arg-type]
    drawn = choose.choose(logits.repeat(count, 1), rows)
    cumulative = wanted.double().cumsum(-1)
    for seed, token in enumerate(drawn):
        number = random.Random(seed).random() * float(cumulative[-1])
        assert token == int(torch.searchsorted(cumulative, number, right=True)), seed
    mixed = [choose.Chooser(model, Request(history, one), 4, (), cpu) for one in (given, Sampling(4, 0))]  # type: ignore[arg-type]
    assert choose.choose(logits.repeat(2, 1), mixed)[1] == int(logits.argmax())


def test_top_k_is_transformers_default_where_the_model_names_none() -> None:
    model = build_model(tiny_config("qwen3", initializer_range=1e-6)).eval()  # all tokens are about equally likely
    drawn = [reply[0] for reply in replies(model, [Request([5], Sampling(1, 1.0, seed)) for seed in range(2000)])]
    assert len(set(drawn)) <= 50


def test_a_row_ends_at_its_stop_token_or_its_own_limit() -> None:
    model = build_model(tiny_config("qwen3")).eval()
    prompts = prompts_of(LENGTHS, GREEDY)
    whole = replies(model, prompts)
    stop = whole[1][5]
    ends = [reply.index(stop) + 1 if stop in reply else NEW for reply in whole]
    assert replies(model, prompts, (stop,)) == [reply[:end] for reply, end in zip(whole, ends, strict=True)]
    limits = (1, 4, 24, 9)
    some = [Request(prompt.ids, Sampling(limit, 0)) for prompt, limit in zip(prompts, limits, strict=True)]
    assert replies(model, some) == [reply[:limit] for reply, limit in zip(whole, limits, strict=True)]


def test_tokens_come_one_by_one() -> None:
    model = build_model(tiny_config("qwen3")).eval()
    speaker = speaker_of(model)
    assert speaker.cache_check.remark == ""
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    tokens = speaker.generate([prompt.ids for prompt in prompts_of((4, 7), GREEDY)], GREEDY)
    rows = [next(tokens).row for _ in range(6)]
    assert (rows, len(calls)) == ([0, 1, 0, 1, 0, 1], 3)
    tokens.close()
    assert not speaker.batcher.has_work


@pytest.mark.parametrize(
    "field", [{"top_p": "much"}, {"temperature": "warm"}, {"temperature": -1.0}, {"typical_p": 0.0}]
)
def test_a_generation_config_that_makes_no_sense(field: dict[str, Any]) -> None:
    model = build_model(tiny_config("qwen3")).eval()
    model.generation_config.do_sample = True
    for name, value in field.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ModelError) as error:
        replies(model, prompts_of((3,), Sampling(2)))
    assert error.value.code == "generation-config"


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_numbers(temperature: float) -> None:
    model = build_model(tiny_config("qwen3")).eval()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(ModelError) as error:
        replies(model, prompts_of((3, 9), Sampling(2, temperature)))
    assert error.value.code == "logits-not-finite"


def test_no_prompts() -> None:
    assert replies(build_model(tiny_config("qwen3")), []) == []


@pytest.mark.parametrize("name", ["own", "word pieces", *(others.NAMES if others.FOLDER.is_dir() else ())])
def test_pieces_join_to_what_the_tokenizer_decodes(tokenizer: Any, name: str) -> None:
    """Byte-level, byte-fallback and metaspace decoders, including ids that no text encodes to."""
    own = {"own": lambda: tokenizer, "word pieces": word_pieces}.get(name, lambda: others.build(name))()
    backend, rng = own.backend_tokenizer, random.Random(0)
    texts = [
        "a🙂 龘! é e\u0301 שלום 你好，世界。\n\n    x = 1\t👩‍👩‍👧 end  ",
        "Hello there  my friend.",
        " leading",
        "\n\n",
    ]
    cases = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    cases += [[rng.randrange(backend.get_vocab_size()) for _ in range(30)] for _ in range(100)]
    for ids in cases:
        decoder = PieceDecoder(types.SimpleNamespace(tokenizer=own))  # type: ignore[arg-type]
        pieces = [*map(decoder.push, ids), decoder.finish()]
        assert "".join(pieces) == backend.decode(ids, skip_special_tokens=False)
        assert "\ufffd" not in "".join(pieces[:-1]) or "\ufffd" in backend.decode(ids, skip_special_tokens=False)
        shown = [piece for piece in pieces[:-1] if piece]
        assert len(shown) >= len(ids) // 4  # it streams


def word_pieces() -> Any:
    vocab = ["[UNK]", *"abcdefghij", *(f"##{letter}" for letter in "abcdefghij"), ".", ","]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocab)}, unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_decoding_takes_time_by_length_not_by_its_square(tokenizer: Any) -> None:
    ids = tokenizer.backend_tokenizer.encode("the quick brown fox. " * 4000, add_special_tokens=False).ids

    def seconds(count: int) -> float:
        decoder = PieceDecoder(types.SimpleNamespace(tokenizer=tokenizer))  # type: ignore[arg-type]
        start = time.process_time()
        for token in ids[:count]:
            decoder.push(token)
        return time.process_time() - start

    assert seconds(16_000) < 10 * max(seconds(4_000), 0.01)
