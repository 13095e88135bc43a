"""Scores of a reply's text beside its reference: exact match, ROUGE, BLEU and chrF.

BLEU and chrF are sacrebleu's. They are corpus scores: functions of counts that are summed over all replies. ROUGE is
rouge-score's F1 and the mean over replies. All equal what these tools' own commands print for the same texts, one a
line; line breaks inside a text become spaces first.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.data.scripts import script_of
from tunesmith.errors import UsageError
from tunesmith.generation.matching import rouge_l, split_words

ROUGE = (
    "rouge-score, no stemming, mean F1; words of a-z and 0-9 as its own tokenizer finds them; where it drops text of "
    "other scripts, their words, and each character of scripts without spaces"
)
_LEAST_SHARE = 0.05  # of rows in a script without spaces, to choose its tokenizer for all
_OWN_TOKENIZER = {  # script -> tokenizers of sacrebleu, the best first, each with the module that it needs
    "Chinese": (("zh", ""),),
    "Japanese": (("ja-mecab", "MeCab"), ("char", "")),
    "Korean": (("ko-mecab", "mecab_ko"), ("char", "")),
    "Thai": (("char", ""),),
}
_LINE_BREAK = re.compile(r"\r\n|\r|\n")

Counts = npt.NDArray[np.float64]


class WordTokenizer:
    """`split_words` in the form that rouge-score takes."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


def one_segment(text: str) -> str:
    """The text on one line, as files for the tools' own commands hold it."""
    return _LINE_BREAK.sub(" ", text)


def choose_tokenizer(references: Iterable[str]) -> tuple[str, str]:
    """sacrebleu's tokenizer for a corpus, by the scripts of its references, and the reason in words."""
    scripts = Counter(script_of(reference) for reference in references)
    total = scripts.total() - scripts["no letters"]
    own = Counter({script: scripts[script] for script in _OWN_TOKENIZER})
    if not total or own.total() < _LEAST_SHARE * total:
        return "13a", "text with spaces between words"
    script = own.most_common(1)[0][0]
    share = f"{script} in {own[script]:,} of {total:,} references"
    for name, module in _OWN_TOKENIZER[script]:
        if not module or importlib.util.find_spec(module):
            return name, share
        share += f"; {name} is not installed"
    raise AssertionError(script)


class TextScorer:
    """Counts of a reply beside its reference, from which all text scores follow.

    Args:
        tokenizer: sacrebleu's, for BLEU.
    """

    def __init__(self, tokenizer: str) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def _bleu(self) -> Any:
        from sacrebleu.metrics.bleu import BLEU

        return BLEU(tokenize=self.tokenizer, force=True)

    @cached_property
    def _chrf(self) -> Any:
        from sacrebleu.metrics.chrf import CHRF

        return CHRF()

    @cached_property
    def _rouge(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(["rouge1", "rouge2"], tokenizer=WordTokenizer())

    def bleu_counts(self, reply: str, reference: str) -> list[int]:
        """[reply length, reference length, matches of order 1-4, n-grams of order 1-4]."""
        found: Sequence[Sequence[int]] = self._bleu._extract_corpus_statistics(
            [one_segment(reply)], [[one_segment(reference)]]
        )
        return [int(count) for count in found[0]]

    def chrf_counts(self, reply: str, reference: str) -> list[int]:
        """For each order of 1-6: n-grams of the reply, of the reference, and matches."""
        found: Sequence[Sequence[int]] = self._chrf._extract_corpus_statistics(
            [one_segment(reply)], [[one_segment(reference)]]
        )
        return [int(count) for count in found[0]]

    def rouge(self, reply: str, reference: str) -> dict[str, float]:
        """F1 of ROUGE-1, ROUGE-2 and ROUGE-L."""
        found = self._rouge.score(reference, reply)
        scores = {name: float(score.fmeasure) for name, score in found.items()}
        return scores | {"rougeL": rouge_l(reply, reference)}

    def signatures(self) -> dict[str, str]:
        """sacrebleu's signatures, with which others get the same scores."""
        self._bleu.corpus_score(["a"], [["a"]])
        self._chrf.corpus_score(["a"], [["a"]])
        return {"bleu": str(self._bleu.get_signature()), "chrf": str(self._chrf.get_signature())}


def require_tokenizer(name: str) -> None:
    """Check that sacrebleu's tokenizer can be used.

    Raises:
        UsageError: it needs a package that is not installed.
    """
    needed = {"ja-mecab": ("MeCab", "ja"), "ko-mecab": ("mecab_ko", "ko")}
    if name in needed and importlib.util.find_spec(needed[name][0]) is None:
        raise UsageError(
            f"--bleu-tokenizer {name}: sacrebleu needs another package for it: pip install "
            f"'sacrebleu[{needed[name][1]}]', or choose char.",
            code="extra-missing",
        )


def bleu_of(counts: Counts) -> Counts:
    """sacrebleu's corpus BLEU with exponential smoothing, of summed counts [..., 10]."""
    counts = np.asarray(counts, dtype=np.float64)
    reply_length, reference_length = counts[..., 0], counts[..., 1]
    matches, totals = counts[..., 2:6], counts[..., 6:10]
    with np.errstate(divide="ignore", invalid="ignore"):
        brevity = np.where(
            reply_length < reference_length, np.exp(1 - reference_length / np.maximum(reply_length, 1e-300)), 1.0
        )
        halvings = np.cumsum((matches == 0) & (totals > 0), axis=-1)
        precisions = np.where(matches > 0, 100.0 * matches / totals, 100.0 / (2.0**halvings * totals))
        logs = np.where(totals > 0, np.log(precisions), -np.inf)
        scores = brevity * np.exp(logs.sum(axis=-1) / 4)
    return np.where((matches.sum(axis=-1) > 0) & (totals > 0).all(axis=-1), scores, 0.0)


def sentence_bleu(counts: Sequence[int]) -> float:
    """sacrebleu's BLEU of one reply: only of the orders of n-grams that it has."""
    from sacrebleu.metrics.bleu import BLEU

    score = BLEU.compute_bleu(
        list(counts[2:6]), list(counts[6:10]), counts[0], counts[1], smooth_method="exp", effective_order=True
    )
    return float(score.score)


def chrf_of(counts: Counts) -> Counts:
    """sacrebleu's chrF2 of summed counts [..., 18]."""
    counts = np.asarray(counts, dtype=np.float64)
    replies, references, matches = counts[..., 0::3], counts[..., 1::3], counts[..., 2::3]
    is_used = (replies > 0) & (references > 0)
    orders = np.maximum(is_used.sum(axis=-1), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(is_used, matches / replies, 0.0).sum(axis=-1) / orders
        recall = np.where(is_used, matches / references, 0.0).sum(axis=-1) / orders
        scores = 100 * 5 * precision * recall / (4 * precision + recall)
    return np.where(precision + recall > 0, scores, 0.0)
