"""The formula moves as the paper's tables do, and the paper's runs save less."""

import pytest
from scipy import stats

from famba.analysis import paper_memory


@pytest.fixture(scope="module")
def shares():
    return paper_memory.beside_formula()


def table(shares, number: int):
    own = shares[(shares["table"] == number) & (shares["model"] == "vim_tiny")]
    return own.pivot(index=["first_layer", "r"], columns="source", values="memory_share").reset_index()


def test_every_row_of_the_tables_is_there_for_the_paper_and_for_both_models(shares):
    counts = shares.groupby(["source", "model", "table"]).size().to_dict()
    made = [("paper", "vim_tiny"), ("formula", "vim_tiny"), ("formula", "vim_small")]
    assert counts == {(*of, table): n for of in made for table, n in ((2, 14), (3, 9))}


@pytest.mark.parametrize(("number", "column", "sign"), [(2, "first_layer", 1), (3, "r", -1)])
def test_memory_moves_in_the_papers_direction_with_the_first_layer_and_with_r(shares, number, column, sign):
    rows = table(shares, number)
    for source in ("paper", "formula"):
        assert sign * stats.spearmanr(rows[column], rows[source]).statistic > 0.9
    assert stats.spearmanr(rows["paper"], rows["formula"]).statistic > 0.95


def test_the_papers_fusion_saves_less_than_fewer_tokens_can(shares):
    for number in (2, 3):
        rows = table(shares, number)
        above = rows["paper"] - rows["formula"]
        assert above.between(0.02, 0.12).all()
