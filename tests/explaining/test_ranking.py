"""Rankings, against scikit-learn and loops."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from timm_memwrap.explaining.ranking import area_under_risk_coverage, auroc, fpr_at_95


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("values", [3, 1000])
def test_the_area_under_the_roc_curve_is_that_of_scikit_learn(seed: int, values: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(values, (60,), generator=generator) / values
    positive = torch.rand(60, generator=generator) < 0.3
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive.numpy(), scores.numpy()))


def test_there_is_no_ranking_of_one_kind() -> None:
    assert auroc(torch.rand(5), torch.ones(5, dtype=torch.bool)) is None
    assert auroc(torch.rand(5), torch.zeros(5, dtype=torch.bool)) is None
    assert auroc(torch.ones(4), torch.tensor([True, False, True, False])) == 0.5


@pytest.mark.parametrize("seed", range(4))
def test_the_area_under_risk_and_coverage_is_a_mean_over_coverages(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    confidence, right = torch.rand(50, generator=generator), torch.rand(50, generator=generator) < 0.7
    order = sorted(range(50), key=lambda i: -float(confidence[i]))
    risks = [sum(not right[i] for i in order[:k]) / k for k in range(1, 51)]
    assert area_under_risk_coverage(confidence, right) == pytest.approx(sum(risks) / 50)


def test_equal_confidences_share_their_errors() -> None:
    right = torch.tensor([True, False, True, False, True])
    expected = area_under_risk_coverage(torch.ones(5), right)
    assert expected == pytest.approx(0.4)
    assert area_under_risk_coverage(torch.ones(5), right.flip(0)) == expected


@pytest.mark.parametrize("seed", range(4))
def test_the_false_positive_rate_is_that_of_the_highest_threshold_that_keeps_95_percent(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(50, (90,), generator=generator) / 50
    positive = torch.rand(90, generator=generator) < 0.6
    kept = [t for t in scores[positive].tolist() if (scores[positive] >= t).float().mean() >= 0.95]
    expected = (scores[~positive] >= max(kept)).float().mean()
    assert fpr_at_95(scores, positive) == pytest.approx(float(expected))
