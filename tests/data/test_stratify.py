import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm_graph.data.stratify import stratified_choice, stratified_folds

LABELS = st.lists(st.integers(0, 3), min_size=2, max_size=60).map(np.array)


@settings(deadline=None)
@given(LABELS, st.data(), st.integers(0, 2**32 - 1))
def test_folds_partition_and_keep_the_classes(labels, data, seed):
    num_folds = data.draw(st.integers(2, len(labels)))
    folds = stratified_folds(labels, num_folds, seed)
    assert sorted(np.concatenate(folds)) == list(range(len(labels)))
    for counts in [[len(f) for f in folds]] + [
        [(labels[f] == c).sum() for f in folds] for c in range(4)
    ]:
        assert max(counts) - min(counts) <= 1
    again = stratified_folds(labels, num_folds, seed)
    assert all((a == b).all() for a, b in zip(folds, again, strict=True))


@settings(deadline=None)
@given(LABELS, st.data(), st.integers(0, 2**32 - 1))
def test_choice_has_its_size_and_its_share_of_every_class(labels, data, seed):
    size = data.draw(st.integers(0, len(labels)))
    chosen, rest = stratified_choice(labels, size, seed)
    assert len(chosen) == size
    assert sorted([*chosen, *rest]) == list(range(len(labels)))
    for c in range(4):
        share = (labels == c).sum() * size / len(labels)
        assert abs((labels[chosen] == c).sum() - share) < 2


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_folds is 1; choose 2 to 4"):
        stratified_folds(np.zeros(4, int), 1, 0)
    with pytest.raises(ValueError, match="5 examples are wanted, but there are 4"):
        stratified_choice(np.zeros(4, int), 5, 0)
