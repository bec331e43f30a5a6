"""Read heads that see with a trained classifier, against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_memwrap import BaselineMemory
from timm_memwrap.read_heads import CentredLogits, Joint, PreLogits, Probabilities


class _LogitsBehind(nn.Module):
    """Finds two classes' logits in the last columns of an encoding."""

    def forward(self, encoding: torch.Tensor) -> torch.Tensor:
        return encoding[..., -2:]


def test_centred_logits_are_the_classifiers_minus_their_mean() -> None:
    classifier, encoding = nn.Linear(6, 4), torch.randn(3, 6)
    centred, logits = CentredLogits(classifier)(encoding), classifier(encoding)
    torch.testing.assert_close(centred.sum(dim=1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(centred.softmax(dim=1), logits.softmax(dim=1))
    torch.testing.assert_close(centred, logits - logits.mean(dim=1, keepdim=True))


def test_pre_logits_are_what_an_encoding_begins_with() -> None:
    encoding = torch.randn(3, 6)
    assert torch.equal(PreLogits(6)(encoding), encoding)
    assert torch.equal(PreLogits(4)(encoding), encoding[:, :4])


def test_probabilities_compare_to_four_fifths_the_pre_logits() -> None:
    classifier, one, other = nn.Linear(6, 4), torch.randn(5, 6), torch.randn(5, 6)
    head = Probabilities(6, classifier)
    seen = F.cosine_similarity(one, other)
    predicted = F.cosine_similarity(classifier(one).softmax(dim=1), classifier(other).softmax(dim=1))
    torch.testing.assert_close(F.cosine_similarity(head(one), head(other)), 0.8 * seen + 0.2 * predicted)


def test_probabilities_of_encodings_with_logits_behind_compare_the_pre_logits_alone() -> None:
    one, other = torch.randn(5, 6), torch.randn(5, 6)
    head = Probabilities(4, _LogitsBehind())
    seen = F.cosine_similarity(one[:, :4], other[:, :4])
    predicted = F.cosine_similarity(one[:, 4:].softmax(dim=1), other[:, 4:].softmax(dim=1))
    torch.testing.assert_close(F.cosine_similarity(head(one), head(other)), 0.8 * seen + 0.2 * predicted)


@pytest.mark.parametrize(("weight", "part"), [(Joint.LOGIT_WEIGHT, 7), (Joint.EQUAL_WEIGHT, 2)])
def test_joint_compares_to_a_seventh_or_a_half_the_centred_logits(weight: float, part: int) -> None:
    classifier, one, other = nn.Linear(6, 4), torch.randn(5, 6), torch.randn(5, 6)
    head, centred = Joint(6, classifier, weight), CentredLogits(classifier)
    seen, predicted = F.cosine_similarity(one, other), F.cosine_similarity(centred(one), centred(other))
    share = weight**2 / (1 + weight**2)
    torch.testing.assert_close(F.cosine_similarity(head(one), head(other)), (1 - share) * seen + share * predicted)
    assert round(1 / share) == part
    assert Joint(6, classifier).logit_weight == Joint.LOGIT_WEIGHT


def test_probabilities_without_confidence_or_features_have_a_finite_gradient() -> None:
    """Zero pre-logits (after a ReLU) and saturated or level logits."""
    encoding = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 200.0, -200.0], [0.0, 1.0, 5.0, 5.0]], requires_grad=True)
    classifier = _LogitsBehind()
    layer = BaselineMemory(4, 2, head=Probabilities(2, classifier), classifier=classifier, scale=20)
    output = layer(encoding, encoding.detach().clone())
    assert output.isfinite().all()
    output.square().sum().backward()
    assert encoding.grad is not None
    assert encoding.grad.isfinite().all()


@pytest.mark.parametrize(
    "head",
    [PreLogits(4), CentredLogits(_LogitsBehind()), Probabilities(4, _LogitsBehind()), Joint(4, _LogitsBehind())],
)
def test_read_heads_have_no_weights_of_their_own(head: nn.Module) -> None:
    assert not head.state_dict()
