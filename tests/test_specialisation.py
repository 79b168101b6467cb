"""Which experts take what: scores of routings made by hand, and the tables of models."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from nmm.batch import Modality
from nmm.config import ExpertGroups, MoEConfig, Routing
from nmm.errors import UserError
from nmm.plot.experts import LayerOfExperts, Scores, expert_figure
from nmm.routing import DROPPED, MORE_COLUMNS, TOKENS
from nmm.specialisation import ALL, expert_lines, normalised, of_run, score_lines, specialisation
from nmm.trained import Trained
from tests import corpora
from tests.test_export import untrained

# Tokens that every expert took: of no padding, of text, of images.
BY_HAND = {
    "all alike": ([[0, 0], [5, 9], [5, 9]], 0.0),
    "each for one": ([[0, 0], [7, 0], [0, 3]], 1.0),
    "one of each": ([[0, 0], [8, 4], [8, 0]], 0.5),
    "one idle": ([[0, 0, 0], [7, 0, 4], [0, 0, 4]], 0.5),
    "a quarter": ([[0], [3], [1]], 1 - 0.8112781),
    "images are rare": ([[0, 0], [75, 75], [25, 25]], 1 - 0.8112781),
    "three alike": ([[0], [2], [2], [2]], 0.0),
    "three apart": ([[0, 0, 0], [2, 0, 0], [0, 5, 0], [0, 0, 1]], 1.0),
    "one modality": ([[0, 0], [4, 4], [0, 0]], None),
    "nothing": ([[0, 0], [0, 0], [0, 0]], None),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_specialisation_of_routings_made_by_hand(name: str) -> None:
    taken, expected = BY_HAND[name]
    assert specialisation(torch.tensor(taken)) == pytest.approx(expected, abs=1e-6)


def test_equal_parts_forget_that_images_are_rare() -> None:
    """A router that sees no modality has the score 0 then, and a hard one still 1."""
    more = torch.zeros(3, MORE_COLUMNS)
    more[:, TOKENS] = torch.tensor([0.0, 150.0, 50.0])
    agnostic = torch.cat([torch.tensor([[0, 0], [75, 75], [25, 25]]), more], dim=1)
    assert specialisation(normalised(agnostic)) == pytest.approx(0, abs=1e-12)
    hard = torch.cat([torch.tensor([[0, 0], [150, 0], [0, 50]]), more], dim=1)
    assert specialisation(normalised(hard)) == pytest.approx(1)


def with_experts(moe: MoEConfig) -> Trained:
    trained = untrained(moe=moe)
    trained.config.data.sources = corpora.config().sources
    return trained


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(Routing.modality_hard, groups=ExpertGroups(text=1, image=1)),
        MoEConfig(Routing.modality_groups, groups=ExpertGroups(text=2, image=3)),
        MoEConfig(Routing.token_choice, experts=3, top_k=2),
        MoEConfig(Routing.expert_choice, experts=4),
    ],
)
def test_every_token_of_the_held_out_rows_is_counted(moe: MoEConfig) -> None:
    trained = with_experts(moe)
    corpus = trained.open_held_out()
    found = of_run(trained, corpus, rows_per_source=3)
    assert set(found) == {ALL, *(kind.value for kind in corpora.KINDS)}
    kinds = [tables for kind, tables in found.items() if kind != ALL]
    torch.testing.assert_close(found[ALL], sum(kinds, torch.zeros_like(found[ALL])))
    there: Counter[int] = Counter()
    for _, batches in trained.held_out_batches(corpus, rows_per_source=3):
        for batch in batches:
            there.update(batch.modality.flatten().tolist())
    for table in found[ALL]:
        for modality in (Modality.text, Modality.image):
            assert table[modality, TOKENS] == there[modality] > 0
        taken = table[:, :-MORE_COLUMNS].sum()
        if not moe.chooses_tokens:
            assert taken == table[:, TOKENS].sum() * moe.top_k
            assert table[:, DROPPED].sum() == 0
    for line in expert_lines(found, moe):
        by_modality = found[line.kind][line.layer, Modality[line.modality]]
        assert line.tokens == by_modality[line.expert]
        assert line.load == pytest.approx(line.tokens / float(by_modality[TOKENS]))
        assert (line.entropy is not None) == moe.has_router
    apart = bool(moe.groups.sizes)
    for line in score_lines(found):
        if line.kind == "text":  # without images nothing can specialise
            assert line.specialisation is line.normalised is None
        else:
            assert (line.specialisation == 1) == apart
            assert (line.normalised == 1) == apart


def test_a_dense_model_has_no_experts_to_show() -> None:
    trained = untrained()
    trained.config.data.sources = corpora.config().sources
    with pytest.raises(UserError, match=r"--experts was given and model.moe.routing is none"):
        of_run(trained, trained.open_held_out(), rows_per_source=1)


def test_the_picture_of_any_number_of_layers_and_modalities(tmp_path: Path) -> None:
    """Also of experts that nobody uses, and without a score."""
    fractions = {"text": [0.2, 0.0, 0.1], "image": [0.0, 0.0, 0.4], "speech": [0.2, 0.0, 0.1]}
    many = [LayerOfExperts(fractions, dropped_fraction=0.1)] * 5
    alone = [LayerOfExperts({"text": [0.5] * 20}, dropped_fraction=0.0)]
    scores = {"all": Scores([0.4] * 5, [None] * 5), "text": Scores([None] * 5, [None] * 5)}
    for name, layers, shown in (("many.png", many, scores), ("one.png", alone, {})):
        path = tmp_path / name
        expert_figure(layers, scores=shown, title="held-out tokens by expert", path=path)
        with Image.open(path) as picture:
            assert picture.size[0] > 1000
