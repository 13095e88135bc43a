"""Rows labelled for looking at, exactly as training labels them."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tunesmith.config.schema import DataSection, PreviewConfig
from tunesmith.data.labelling import label_rows
from tunesmith.data.ledger import LabelledRow
from tunesmith.encode.encoder import Encoder
from tunesmith.model.lengths import choose_lengths
from tunesmith.model.load import load_config
from tunesmith.model.reopen import require_one_reading
from tunesmith.model.tokenizer import load_encoder
from tunesmith.sources.read import Sources, find_sources, read_rows


@dataclass(frozen=True, slots=True)
class LabelledData:
    """What a config says about labels, resolved: the sources, the encoder and the longest sample.

    Attributes:
        max_seq_len: in tokens.
    """

    data: DataSection
    train: Sources
    eval: Sources
    encoder: Encoder
    max_seq_len: int

    def rows(self, limit: int | None = None) -> Iterator[LabelledRow]:
        """The labelled rows of data.train; with `limit`, the first of them."""
        raw = read_rows(self.train, self.data.encoding, self.data.max_row_mb)
        return label_rows(itertools.islice(raw, limit), self.encoder, self.data, self.max_seq_len)

    def eval_rows(self) -> Iterator[LabelledRow]:
        """The labelled rows of data.eval, which data.limit does not cut."""
        data = self.data.model_copy(update={"limit": None})
        return label_rows(read_rows(self.eval, data.encoding, data.max_row_mb), self.encoder, data, self.max_seq_len)


def open_data(config: PreviewConfig, sources: Mapping[str, Sources] | None = None) -> LabelledData:
    """Resolve a config as a run does, without its weights.

    Args:
        sources: "train" or "eval" -> sources that are resolved already, in place of the config's names.

    Raises:
        TunesmithError: the data, tokenizer, template or model config cannot be used.
    """
    data = config.data
    given = sources or {}
    train = given["train"] if "train" in given else find_sources(data.train)
    held_out = given["eval"] if "eval" in given else find_sources(data.eval or [])
    encoder = load_encoder(config.model, data, datetime.datetime.now())
    model_config = load_config(config.model, encoder.tokenizer)
    require_one_reading(config.model, encoder, model_config, config.lora.kind != "none")
    lengths = choose_lengths(model_config, data.max_seq_len, config.train.micro_batch_tokens)
    return LabelledData(data, train, held_out, encoder, lengths.max_seq_len)
