"""What a number is of, in words that need no list of measures: the column `measured` of answers."""

from nmm.config import Measure, QuestionConfig

WORDS = {
    Measure.loss_gap: "loss of {against} less that of {of}",
    Measure.frontier_gap_low: "loss of {against} less that of {of}, by their laws at the best "
    "splits of the least FLOPs that both have",
    Measure.frontier_gap_high: "loss of {against} less that of {of}, by their laws at the best "
    "splits of the most FLOPs that both have",
    Measure.size_exponent: "a of {of}, whose best size grows like C^a",
    Measure.tokens_exponent: "b of {of}, whose best number of tokens grows like C^b",
    Measure.prediction_error: "percent by which the law of {of} misses its largest models, unseen",
    Measure.specialisation_first: "experts of {of}: score of the first layer less that of those "
    "between first and last",
    Measure.specialisation_last: "experts of {of}: score of the last layer less that of those "
    "between first and last",
    Measure.synergy: "nats that {of} gains in the limit from a second modality (C)",
    Measure.interaction: "nats by which the joint loss of {of} is below the mean of two models "
    "alone",
    Measure.synergy_flops: "FLOPs from which on {of} gains from a second modality",
    Measure.perplexity_ratio: "perplexity of {of} on the modality that it has not seen, divided by "
    "that on its own",
    Measure.best_batch: "tokens a step with the lowest loss",
    Measure.eta: "FLOPs of {against} divided by those of {of} for the same loss",
}


def measured(question: QuestionConfig) -> str:
    """ "loss of late less that of early, in loss/kind/text"."""
    words = [WORDS[question.measure].format(of=question.of, against=question.against)]
    words += [f"of {question.pair.replace('_', ' and ')}"] if question.pair else []
    words += [f"on {question.mixture}"] if question.mixture else []
    words += [f"in {question.loss}"] if question.loss != "loss" else []
    return ", ".join(words)
