"""Promise 3: documents in a pack never see each other; models that mix them get one document per forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from conftest import ARCHITECTURES, build_model, set_up_attention, tiny_config
from tunesmith.data.pack import Documents
from tunesmith.errors import ModelError
from tunesmith.model.attention import PACKED_ATTENTION
from tunesmith.model.head import choose_head_path
from tunesmith.model.isolation import choose_doc_lens, measure_difference, probe_isolation
from tunesmith.model.probe import probe_model

LENS = [7, 1, 12, 40, 9]


def packed_and_solo(model, lens: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits of each document in one pack (our attention) and alone (transformers' own)."""
    own = model.config._attn_implementation
    docs = [torch.randint(0, 400, (1, n), generator=torch.Generator().manual_seed(n)) for n in lens]
    solo = [model(input_ids=d, use_cache=False).logits[0] for d in docs]
    set_up_attention(model, 128, 256)
    assert model.config._attn_implementation == PACKED_ATTENTION
    positions = torch.cat([torch.arange(n) for n in lens])[None]
    packed = model(
        input_ids=torch.cat(docs, 1), position_ids=positions, use_cache=False, documents=Documents(lens)
    ).logits[0]
    model.set_attn_implementation(own)
    return list(packed.split(lens)), solo


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_packed_logits_match_solo(name: str) -> None:
    """float64; the tolerance is that of models whose norms or softmax compute in fp32."""
    model = build_model(tiny_config(name), torch.float64).eval()
    for packed, solo in zip(*packed_and_solo(model, LENS), strict=True):
        assert (packed - solo).abs().max() < 2e-5 * solo.abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_document_cannot_be_seen_from_another(name: str) -> None:
    """Changing one document changes that document and no bit of the others."""
    model = build_model(tiny_config(name)).eval()
    assert set_up_attention(model, 128, 256).is_isolated
    positions = torch.cat([torch.arange(n) for n in LENS])[None]
    ids = torch.randint(0, 400, (1, sum(LENS)), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 8:20] = (other[0, 8:20] + 1) % 400  # the third document
    one, two = (
        model(input_ids=i, position_ids=positions, use_cache=False, documents=Documents(LENS)).logits[0].split(LENS)
        for i in (ids, other)
    )
    for index in (0, 1, 3, 4):
        assert torch.equal(one[index], two[index])
    assert not torch.equal(one[2], two[2])


@torch.no_grad()
def test_the_well_known_leak_is_one_that_this_test_would_see() -> None:
    """Stock attention with the default use_cache sees across documents, silently; ours does not."""
    model = build_model(tiny_config("qwen3")).eval()
    docs = [torch.randint(0, 400, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 9)]
    positions = torch.arange(9).repeat(2)[None]
    solo = model(input_ids=docs[1], use_cache=False).logits[0]
    leaking = model(input_ids=torch.cat(docs, 1), position_ids=positions, use_cache=True).logits[0, 9:]
    assert (leaking - solo).abs().max() > 0.1


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1)])
@pytest.mark.parametrize("window", [1, 5, 16, 64])
@torch.no_grad()
def test_windows_match_the_models_own_mask(window: int, heads: int, kv_heads: int) -> None:
    config = transformers.MistralConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=64, sliding_window=window, initializer_range=0.3,
    )  # fmt: skip
    model = build_model(config, torch.float64).eval()
    for packed, solo in zip(*packed_and_solo(model, [40, 3, 17]), strict=True):
        assert (packed - solo).abs().max() < 2e-5 * solo.abs().max()


@torch.no_grad()
def test_attention_sinks_match() -> None:
    config = transformers.GptOssConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=16, num_local_experts=4, sliding_window=8, initializer_range=0.3, experts_implementation="eager",
    )  # fmt: skip
    model = build_model(config).eval()
    for packed, solo in zip(*packed_and_solo(model, [30, 5]), strict=True):
        assert (packed - solo).abs().max() < 1e-3 * solo.abs().max()


def lfm2(initializer_range: float = 0.3):
    config = transformers.Lfm2Config(
        vocab_size=400, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, layer_types=["conv", "full_attention", "conv"], initializer_range=initializer_range,
    )  # fmt: skip
    return build_model(config).eval()


def long_rope():
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = transformers.Phi3Config(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=256, original_max_position_embeddings=64, initializer_range=0.3,
        pad_token_id=0, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors},
    )  # fmt: skip
    return build_model(config).eval()


def test_convolutions_across_documents_are_seen_and_the_model_gets_one_document_a_forward() -> None:
    model = lfm2()
    own = model.config._attn_implementation
    isolation = set_up_attention(model, 128, 256)
    assert not isolation.is_isolated
    assert isolation.report.startswith("one document per forward: packed and solo differ by")
    assert model.config._attn_implementation == own


def test_rope_that_looks_at_the_longest_document_is_seen_where_max_seq_len_allows_one() -> None:
    assert set_up_attention(long_rope(), max_seq_len=64, micro_batch_tokens=256).is_isolated
    isolation = set_up_attention(long_rope(), max_seq_len=128, micro_batch_tokens=256)
    assert not isolation.is_isolated
    assert "73 tokens" in isolation.report


def test_long_documents_are_tried_only_where_a_pack_could_hold_them() -> None:
    config = long_rope().config
    assert choose_doc_lens(config, 128, 256) == [7, 33, 5, 20, 73]
    assert choose_doc_lens(config, 128, 128) == [7, 33, 5, 20]
    assert choose_doc_lens(config, 16, 256) == [7, 5]
    assert choose_doc_lens(tiny_config("gemma2", sliding_window=40), 64, 256) == [7, 33, 5, 20, 49]


def test_checking_leaves_the_model_as_it_was() -> None:
    model = build_model(tiny_config("qwen3")).train()
    before = copy.deepcopy(model.state_dict())
    set_up_attention(model, 128, 256)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    with torch.no_grad():
        assert measure_difference(model, "sdpa", [5, 6]) < 1e-4


def test_a_leak_does_not_hide_in_half_precision_or_behind_a_large_channel() -> None:
    model = lfm2(initializer_range=0.02).bfloat16()
    before = copy.deepcopy(model.state_dict())
    model.model.embedding_norm.weight.data[3] = 100.0
    before["model.embedding_norm.weight"][3] = 100.0
    assert not set_up_attention(model, 128, 256).is_isolated
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) and after[n].dtype == before[n].dtype for n in before)


def test_models_that_see_later_tokens_are_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.BertLMHeadModel(config)
    with pytest.raises(ModelError, match="BertLMHeadModel") as error:
        set_up_attention(model, 64, 128)
    assert error.value.code == "not-causal"


def test_two_models_of_one_config_keep_their_own_attention() -> None:
    config = tiny_config("llama")
    one, two = build_model(config), build_model(config)
    set_up_attention(one, 128, 256)
    assert one.config._attn_implementation == PACKED_ATTENTION
    assert two.config._attn_implementation == "sdpa"


# the probed model


def test_a_model_that_is_whole_is_probed_itself() -> None:
    model = build_model(tiny_config("qwen3"))
    assert probe_model(model) is model


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2", "qwen3_moe"])
def test_a_model_that_is_too_large_is_probed_by_its_first_layers(name: str) -> None:
    deep: dict[str, Any] = {"n_layer": 6} if name == "gpt2" else {"num_hidden_layers": 6}
    if name == "gemma2":
        deep["layer_types"] = ["sliding_attention"] * 4 + ["full_attention", "sliding_attention"]
    model = build_model(tiny_config(name, **deep)).bfloat16()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    small = probe_model(model, max_parameters=1)
    assert small is not model
    layers = small.config.num_hidden_layers
    assert layers == {"gemma2": 5}.get(name, 2)
    assert set(getattr(small.config, "layer_types", None) or []) == set(
        getattr(model.config, "layer_types", None) or []
    )
    assert small.get_input_embeddings().weight.shape == model.get_input_embeddings().weight.shape
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert probe_isolation(small, 64, 256).is_isolated
    assert choose_head_path(small, is_packed=False) == "decoder"
    assert model.config.num_hidden_layers == 6
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_small_model_shows_the_leak_of_the_large_one() -> None:
    for model in (lfm2(), long_rope()):
        small = probe_model(model, max_parameters=1)
        assert small is not model
        assert not probe_isolation(small, 128, 256).is_isolated


def test_a_sharded_model_is_not_run() -> None:
    """Weights on the meta device stand for shards held by other processes."""
    with torch.device("meta"):
        model = build_model(tiny_config("llama"))
    small = probe_model(model)
    assert not any(p.is_meta for p in small.parameters())
    assert probe_isolation(small, 64, 256).is_isolated
