"""Resolve a config on this machine, before any data is read."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from tunesmith.adapters.adapter import require_quantization
from tunesmith.config.schema import RunConfig
from tunesmith.data.dataset import DataSources
from tunesmith.distributed.choose import choose_parallel
from tunesmith.distributed.world import World
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import ModelError
from tunesmith.hashes import describe_weights, hash_config, hash_template, hash_tokenizer
from tunesmith.model.device import pick_device
from tunesmith.model.lengths import Lengths, choose_lengths
from tunesmith.model.load import find_class, load_config
from tunesmith.model.loss import find_router, require_router
from tunesmith.model.source import ModelSource
from tunesmith.model.tokenizer import TokenizerSource, build_encoder, extend_tokenizer, find_tokenizer
from tunesmith.run.console import Reporter
from tunesmith.run.records import Fingerprint
from tunesmith.runfolder import RunFolder
from tunesmith.training.metrics import require_trackers
from tunesmith.training.optim import require_optimizer
from tunesmith.training.precision import (
    Precision,
    choose_precision,
    keep_precision,
    make_deterministic,
    resolve_precision,
)


@dataclass(frozen=True, slots=True)
class Session:
    """Everything that a config refers to, resolved once, so that what was hashed is what is trained.

    Attributes:
        sources: None if files of a resumed run are missing, since it has its own copy of their tokens; and in all
            processes but the first.
        model: location of the base model; a resumed run may load its weights from a checkpoint instead.
        date: when the run began; templates may print it.
        new_tokens: those of model.add_tokens that the tokenizer lacked; their rows of the embedding are new.
        model_config: of the base model.
        parallel: how the model is spread over the processes: the resolved train.parallel.
    """

    config: RunConfig
    folder: RunFolder
    reporter: Reporter
    date: datetime.datetime
    sources: DataSources | None
    model: ModelSource
    tokenizer: TokenizerSource
    world: World
    device: torch.device
    precision: Precision
    encoder: Encoder
    new_tokens: list[str]
    model_config: PretrainedConfig
    lengths: Lengths
    parallel: str

    @property
    def is_adapter(self) -> bool:
        return self.config.lora.kind != "none"


def require_same_start(session: Session) -> None:
    """Check that the model, its tokenizer and the template are those of the first process: hosts may differ.

    Raises:
        ModelError: they are not.
    """
    world, encoder = session.world, session.encoder
    weights = describe_weights(session.model, session.config.model.revision)
    own = {
        "the model's config": hash_config(session.model_config),
        "the model's weights": sorted(map(str, weights.values())),
        "the tokenizer": hash_tokenizer(encoder),
        "the chat template": hash_template(encoder),
    }
    first = world.share(lambda: own)
    if different := [name for name in own if own[name] != first[name]]:
        raise ModelError(
            f"{session.config.model.path}: {different[0]} on this process differs from that on the first one. Give all "
            "hosts the same files.",
            code="hosts-differ",
        )


def require_packages(config: RunConfig) -> None:
    """Check the optional packages.

    Raises:
        ConfigError: a package that the config needs is not installed.
    """
    require_trackers(list(config.train.trackers))
    require_quantization(config.lora)
    require_optimizer(config.optim.name)


def open_session(
    config: RunConfig,
    folder: RunFolder,
    reporter: Reporter,
    date: datetime.datetime,
    sources: DataSources | None,
    model: ModelSource,
    world: World,
    begun: Fingerprint | None = None,
) -> Session:
    """Resolve device, precision, tokenizer, template and lengths.

    Args:
        begun: of the run that is resumed.

    Raises:
        ModelError: the model or its tokenizer cannot be found or read.
    """
    device = pick_device(world.local_rank if world.size > 1 else None)
    parallel = choose_parallel(config, world)
    can_copy = _can_copy(config, parallel, begun)
    precision = choose_precision(world.share(lambda: _name_precision(config, device, begun)), device, can_copy)
    if config.train.deterministic:
        make_deterministic()
    torch.manual_seed(config.train.seed)
    source = find_tokenizer(config.model, model)
    tokenizer, new_tokens = extend_tokenizer(config.model, source)
    data = config.data
    encoder = build_encoder(tokenizer, data.chat_template, data.template_kwargs, date, data.control_text)
    kept = [token for token in config.model.add_tokens if token not in new_tokens]
    if kept:
        reporter.note(f"note: model.add_tokens: the tokenizer has {', '.join(kept)} already; kept as it is")
    model_config = load_config(config.model, tokenizer, model)
    if model_class := find_class(model_config):
        require_router(config, find_router(model_config, model_class))
    lengths = choose_lengths(model_config, config.data.max_seq_len, config.train.micro_batch_tokens)
    return Session(config, folder, reporter, date, sources, model, source, world, device, precision, encoder,
                   new_tokens, model_config, lengths, parallel)  # fmt: skip


def _can_copy(config: RunConfig, parallel: str, begun: Fingerprint | None) -> bool:
    """Whether bf16 may be had by copies of the weights. An adapter's base is of half precision already; where weights
    are sharded, what shards them makes the copies; runs of earlier versions had autocast."""
    return config.lora.kind == "none" and parallel in ("none", "ddp") and (begun is None or begun.has_copies)


def _name_precision(config: RunConfig, device: torch.device, begun: Fingerprint | None) -> str:
    """The resolved train.precision; that of the first process, since hosts may differ."""
    name = config.train.precision
    return keep_precision(name, begun.precision, device) if begun else resolve_precision(name, device)
