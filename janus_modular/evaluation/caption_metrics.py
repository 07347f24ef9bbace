"""Metrics of captions against references, by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence

from janus_modular.errors import require_extras
from janus_modular.evaluation.scoring import Metrics, Scored


def require_metrics() -> None:
    """Raise MissingExtraError if torchmetrics is not installed."""
    with require_extras("this evaluation", "metrics", modules=("torchmetrics",)):
        pass


def caption_metrics(scored: Sequence[Scored]) -> Metrics:
    """Return BLEU-4 of the whole set, and means of ROUGE-L (F1) and chrF over the captions.

    Of several references, BLEU counts n-grams of any, and ROUGE-L takes the best. Texts are lower case.
    """
    from torchmetrics.functional.text import bleu_score, chrf_score, rouge_score

    captions = [answer.lower() for _, answer in scored]
    references = [[text.lower() for text in question.answers] for question, _ in scored]
    rouge = rouge_score(captions, references, rouge_keys="rougeL")
    _, chrf = chrf_score(captions, references, n_word_order=0, return_sentence_level_score=True)
    return {
        "captions": len(scored),
        "bleu4": float(bleu_score(captions, references)),
        "rouge_l": float(rouge["rougeL_fmeasure"]),
        "chrf": float(chrf.mean()),
    }
