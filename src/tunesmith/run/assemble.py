"""Build what the loop needs from a session and its data: the probed model, and the feed of steps."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tunesmith.adapters.adapter import add_adapter, cast_trained, quantization_config
from tunesmith.adapters.base import record_base
from tunesmith.adapters.fused import fuse_lora
from tunesmith.attention.layout import LOOP_ONLY
from tunesmith.config.schema import LoraSection, ModelSection, is_dropout
from tunesmith.data.dataset import NOT_SHARED, Dataset, DataSources, StoreHashes, build_feed, find_sharing, open_dataset
from tunesmith.data.feed import StepFeed
from tunesmith.data.ledger import Ledger
from tunesmith.distributed.blocks import compile_blocks
from tunesmith.distributed.held import part_of
from tunesmith.distributed.load import load_from_shards, load_held, release_memory
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.layers.copies import HalfCopies
from tunesmith.layers.speedup import speed_up
from tunesmith.model.head import choose_head_path
from tunesmith.model.isolation import (
    Isolation,
    TreeCheck,
    choose_kernels,
    probe_isolation,
    probe_trees,
    use_packed_attention,
)
from tunesmith.model.load import (
    NUM_EXPERTS,
    check_vocabulary,
    extend_vocabulary,
    freeze_zero_gates,
    load_config,
    load_model,
)
from tunesmith.model.loss import SupervisedLM, require_router
from tunesmith.model.probe import probe_model
from tunesmith.model.source import ModelSource, find_model
from tunesmith.monitor.room import free_memory
from tunesmith.plans.sharing import Sharing
from tunesmith.preparation.write import write_dataset
from tunesmith.run.session import Session
from tunesmith.runfolder import RunFolder, latest_stage
from tunesmith.streaming.data import StreamedDataset, StreamSettings, build_stream_feed, open_stream, write_stream
from tunesmith.tensors import find_not_finite
from tunesmith.training.checkpoint import weight_shards
from tunesmith.training.sharded import WHOLE, Form, choose_form

AnyDataset = Dataset | StreamedDataset


@dataclass(frozen=True, slots=True)
class ReadyRun:
    """A run before its first step."""

    session: Session
    dataset: AnyDataset
    lm: SupervisedLM
    isolation: Isolation
    feed: StepFeed
    form: Form = WHOLE
    sharing: Sharing = NOT_SHARED


def assemble(
    session: Session, dataset: AnyDataset, checkpoint: Path | None = None, shares_prefixes: bool | None = None
) -> ReadyRun:
    """Load the model and plan the steps.

    Args:
        checkpoint: with the weights of a resumed run, if all weights are trained.
        shares_prefixes: whether a resumed run computes shared prefixes once; None: as data.share_prefix says.
    """
    config = session.config
    if session.is_adapter:
        require_real_base(config.model.path, session.model)
    model = load_weights(session, checkpoint)
    adapter = add_new_adapter(session, model) if session.is_adapter else None
    sharing = NOT_SHARED
    if isinstance(dataset, Dataset):
        sharing = look_for_prefixes(session, dataset, model, shares_prefixes)
    isolation, trees, lm = wrap(session, model, adapter, sharing.is_on)
    sharing = require_trees(session, sharing, isolation, trees, shares_prefixes)
    if session.parallel == "fsdp":
        release_memory()  # of the model that was probed
    feed: StepFeed
    if isinstance(dataset, StreamedDataset):
        feed = build_stream_feed(dataset, stream_settings(session), lm.is_packed, session.folder, session.world.share)
    else:
        feed = build_feed(dataset, config.train, session.lengths.capacity, lm.is_packed, sharing)
    return ReadyRun(session, dataset, lm, isolation, feed, choose_checkpoints(session, lm), sharing)


def look_for_prefixes(session: Session, dataset: Dataset, model: nn.Module, is_on: bool | None) -> Sharing:
    """What shared prefixes are worth in these data; off where the setting or a dropout says so.

    Args:
        is_on: of a resumed run.
    """
    setting = session.config.data.share_prefix if is_on is None else is_on
    if setting is False:
        return NOT_SHARED
    if name := find_dropout(session, model):
        return NOT_SHARED.off(f"{name} is on, which draws several masks for the copies of a token")
    if session.config.train.compile:
        return NOT_SHARED.off("train.compile is on, which compiles the model for separate samples")
    capacity, seed = session.lengths.capacity, session.config.train.seed
    return find_sharing(dataset, session.config.data, capacity, seed, is_wanted=setting is True)


def find_dropout(session: Session, model: nn.Module) -> str:
    """The name of a dropout that is on; "" if none is."""
    if session.is_adapter and session.config.lora.dropout:
        return "lora.dropout"
    values = session.model_config.get_text_config().to_dict().items()
    of_other_heads = ("summary", "classifier")
    named = [
        name
        for name, value in values
        if is_dropout(name) and isinstance(value, float) and value and not name.startswith(of_other_heads)
    ]
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p]
    return next(iter([*named, *others]), "")


def require_trees(
    session: Session, sharing: Sharing, isolation: Isolation, trees: TreeCheck | None, is_on: bool | None
) -> Sharing:
    """The sharing, if prefix trees are exact on this model; the first process decides.

    Raises:
        ModelError: they are not, and a resumed run has steps of them.
    """
    problem = ""
    if sharing.is_on and not isolation.is_isolated:
        problem = "the model takes one document per forward"
    elif sharing.is_on and trees is not None and not trees.is_exact:
        problem = trees.report
    problem = session.world.share(lambda: {"problem": problem})["problem"]
    if problem and is_on:
        raise ModelError(
            f"data.share_prefix: the run computes shared prefixes once, which this model no longer can: {problem}. "
            "Restore the versions it began with, or add --data.share_prefix off --allow batch.",
            code="prefixes-not-shared",
        )
    return sharing.off(problem) if problem else sharing


def choose_checkpoints(session: Session, lm: SupervisedLM) -> Form:
    """The form of the checkpoints; the first process decides. An adapter is small, and always saved whole."""
    if session.parallel != "fsdp" or session.is_adapter:
        return WHOLE
    trained = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    here = float(os.environ.get("LOCAL_WORLD_SIZE", session.world.size)) / session.world.size
    # gradients and averages, which are on the GPU where there is one
    taken_first = 3 * here * sum(p.numel() * p.element_size() for p in trained) if session.device.type == "cpu" else 0.0
    setting = session.config.train.sharded_checkpoints
    chosen = session.world.share(lambda: asdict(choose_form(setting, trained, taken_first, free_memory())))
    return Form(**chosen)


def write_data(session: Session, sources: DataSources, folder: RunFolder) -> AnyDataset:
    """Label the data of a run into a folder; of a stream only what comes before step 1."""
    config = session.config
    if config.data.stream:
        return write_stream(stream_settings(session), sources, folder)
    max_seq_len, seed = session.lengths.max_seq_len, config.train.seed
    return write_dataset(config.data, sources, session.encoder, max_seq_len, seed, folder, session.reporter)


def follow_data(session: Session, folder: RunFolder, hashes: StoreHashes, sources: dict[str, list[str]]) -> AnyDataset:
    """Open the data that the first process has written to a folder.

    Args:
        sources: of a mix; the rest of the ledger is for the first process alone.
    """
    config = session.config
    if config.data.stream:
        return open_stream(stream_settings(session), None, folder, hashes)
    return open_dataset(config.data, config.train.seed, folder, hashes, Ledger(sources=sources), None)


def stream_settings(session: Session) -> StreamSettings:
    lengths = session.lengths
    return StreamSettings(
        session.config.data, session.config.train, session.encoder, lengths.max_seq_len, lengths.capacity
    )


def require_real_base(path: str, source: ModelSource) -> None:
    """Check that an adapter trained on this base can be loaded later.

    Raises:
        ModelError: the base is itself an adapter, or has random weights that are not saved.
    """
    if source.adapter:
        raise ModelError(
            f"{path}: is already an adapter; peft and other tools cannot load a second adapter on top of it. Merge it "
            f"first: tunesmith merge {path} --output MERGED; then train on MERGED.",
            code="base-is-adapter",
        )
    if source.kind == "preset":
        raise ModelError(
            f"{path}: its random weights are not saved, so an adapter trained on them could never be loaded. Train the "
            "whole model first (--lora.kind none), then an adapter on the result.",
            code="base-not-saved",
        )


def load_weights(session: Session, checkpoint: Path | None) -> PreTrainedModel:
    """The model on its device, with embedding rows for added tokens, and finite weights.

    With train.parallel fsdp it has held parameters where that can be (distributed/load.py).
    """
    config, tokenizer = session.config, session.encoder.tokenizer
    section, source, model_config = config.model, session.model, session.model_config
    if checkpoint is not None:
        section = ModelSection(path=str(checkpoint), trust_remote_code=config.model.trust_remote_code)
        source = find_model(section.path)
        model_config = load_config(section, tokenizer, source)
    dtype = weights_dtype(session)
    quantization = quantization_config(config.lora, dtype)
    new_tokens = session.new_tokens if checkpoint is None else []  # a checkpoint already contains the added rows
    is_sharded = session.parallel == "fsdp" and quantization is None
    size = session.world.size if is_sharded and loads_shards(config.lora, source) else 1
    size = 1 if has_empty_shards(model_config, size) else size
    if shards := weight_shards(checkpoint):
        model = load_from_shards(section, model_config, dtype, size, shards)
    elif size > 1:
        model = load_held(section, model_config, dtype, size, source, bool(new_tokens))
    else:
        loaded = load_model(section, model_config, dtype, config.train.seed, quantization, source)
        model = cast(PreTrainedModel, loaded)
    extend_vocabulary(model, tokenizer, new_tokens)
    check_vocabulary(model, tokenizer)
    if not is_sharded:  # otherwise each process copies its shard alone, to its device
        if quantization is None and session.parallel != "deepspeed":  # which moves it in parts
            nn.Module.to(model, session.device)  # transformers' `to` is untyped
        own_memory(model)
    refuse_not_finite(config.model.path, model)
    freeze_zero_gates(model)
    return model


def loads_shards(lora: LoraSection, source: ModelSource) -> bool:
    """Whether each process can load its shard alone: new weights are made whole, and so are those that an adapter is
    merged into, or begins with a copy of."""
    is_copied = lora.kind == "dora" or bool(lora.modules_to_save)
    return source.kind != "preset" and source.adapter is None and not is_copied


def has_empty_shards(config: PretrainedConfig, size: int) -> bool:
    """Whether some process would have none of the experts of a layer, which transformers cannot load: each then loads
    the whole model before it is sharded."""
    text: Any = config.get_text_config()
    experts = next((number for name in NUM_EXPERTS if isinstance(number := getattr(text, name, None), int)), 0)
    return experts > 0 and -(-experts // size) * (size - 1) >= experts


def weights_dtype(session: Session) -> torch.dtype:
    precision = session.precision
    if session.parallel == "deepspeed":  # takes weights of one dtype
        return precision.weights
    # frozen weights need no fp32 copy, since autocast uses half precision anyway
    return precision.compute if session.is_adapter and precision.compute else precision.weights


def add_new_adapter(session: Session, model: PreTrainedModel) -> Any:
    """peft's wrapper around the model; the adapter's initial weights depend only on the seed."""
    config, source = session.config, session.model
    torch.manual_seed(config.train.seed)
    new_ids = session.encoder.tokenizer.convert_tokens_to_ids(session.new_tokens)
    base = record_base(source.kind, source.name, config.model.revision)
    path = config.model.path
    local = latest_stage(Path(path).expanduser().resolve())
    name = str(local) if source.kind == "local" else path  # for adapter_config.json
    adapter = add_adapter(model, config.lora, name, new_ids, config.model.revision, base)
    if session.precision.compute:
        cast_trained(model, session.precision.weights)
    return adapter


def wrap(
    session: Session, model: PreTrainedModel, adapter: Any, has_trees: bool = False
) -> tuple[Isolation, TreeCheck | None, SupervisedLM]:
    """Probe the model, then configure it by the results."""
    config, lengths = session.config, session.lengths
    probe = probe_model(model)
    if session.config.lora.quantize == "none":
        nn.Module.to(probe, session.device)
    isolation = probe_isolation(probe, lengths.max_seq_len, lengths.capacity)
    own_attention, plan, trees = None, LOOP_ONLY, None
    if isolation.is_isolated:
        own_attention = model.config._attn_implementation
        use_packed_attention(probe)
        use_packed_attention(model)
        if session.device.type == "cuda":
            copies = session.precision.copies
            context = HalfCopies(probe, copies) if copies else session.precision.context(session.device)
            found = choose_kernels(probe, context, lengths.max_seq_len, lengths.capacity, has_trees)
            plan = found.plan()
            for line in found.refused:
                session.reporter.note(f"note: attention: {line}")
        if has_trees:
            trees = probe_trees(probe, own_attention, lengths.max_seq_len, lengths.capacity)
    head_path = choose_head_path(probe, isolation.is_isolated)
    lm = SupervisedLM(model, isolation.is_isolated, head_path, adapter, config.train.router_loss, own_attention, plan)
    require_router(config, lm.router)
    if adapter is not None:
        fuse_lora(model)
    if session.precision.copies:
        lm.copies = HalfCopies(model, session.precision.copies)
    if not config.train.compile:
        speed_up(model, model.get_output_embeddings(), config.train.gradient_checkpointing)
    if config.train.gradient_checkpointing:
        try:
            model.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError:
            raise TunesmithError(
                f"train.gradient_checkpointing: {type(model).__name__} does not support it. Set it to false.",
                code="checkpointing-unsupported",
            ) from None
    if config.train.compile and lm.router is None:
        compile_blocks(model)
    elif config.train.compile:
        session.reporter.note(
            "note: train.compile is left out: how many tokens an expert takes follows from the data, and a resumed run "
            "would be compiled for other numbers"
        )
    return isolation, trees, lm


def own_memory(model: PreTrainedModel) -> None:
    """Copy every weight into memory aligned by torch: mapped files may start anywhere, which changes rounding."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():  # others are quantized, and have other references to them
            tensor.data = tensor.data.clone()


def refuse_not_finite(name: str, model: PreTrainedModel) -> None:
    """Check that all weights are finite, of held parameters the shard of this process.

    Raises:
        ModelError: the model's weights contain NaN or infinity.
    """
    tensors = model.state_dict(keep_vars=True)
    if found := find_not_finite({name: _values_of(tensor) for name, tensor in tensors.items()}):
        raise ModelError(
            f"{name}: its weights are not finite ({found} contains NaN or infinity), which training cannot repair. The "
            "file is damaged, or a failed run saved it.",
            code="model-not-finite",
        )


def _values_of(tensor: Tensor) -> Tensor:
    part = part_of(tensor)
    return tensor.detach() if part is None else part
