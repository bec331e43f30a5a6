"""Read heads that see with a trained classifier: they make keys and queries of what it predicts.

Shapes: N samples, D width of the pre-logits, E of an encoding (D, or D and the logits behind them), C classes.
"""

import math

import torch
from torch import Tensor, nn

from timm_memwrap.attention import unit

__all__ = ["CentredLogits", "Joint", "PreLogits", "Probabilities"]


class PreLogits(nn.Module):
    """Compares the pre-logits of encodings `[N, E]`."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, encoding: Tensor) -> Tensor:
        """Returns `[N, D]`."""
        return encoding[..., : self.features]


class CentredLogits(nn.Module):
    """Compares the classifier's logits, each row minus its mean: softmax cannot see it, a similarity can."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, encoding: Tensor) -> Tensor:
        """Returns `[N, C]`."""
        logits = self.classifier(encoding)
        return logits - logits.mean(dim=-1, keepdim=True)


class Probabilities(nn.Module):
    """Compares what is seen and what is predicted.

    The cosine similarity of two keys is, to four fifths, that of the pre-logits, and to one fifth that of the predicted
    probabilities. Pre-logits tell samples of a class apart, which keeps the support small; probabilities tell classes
    apart, where a backbone that was not fine-tuned to them does not.
    """

    # Weight of the pre-logits beside the 1 of the probabilities. Chosen on held-out training images, as is the default
    # scale; from 3 to 5 and from 15 to 30 nothing changes that seeds do not change too.
    FEATURE_WEIGHT = 4.0

    def __init__(self, features: int, classifier: nn.Module) -> None:
        super().__init__()
        self.features, self.classifier = features, classifier

    def forward(self, encoding: Tensor) -> Tensor:
        """Returns `[N, D + C]`."""
        probabilities = self.classifier(encoding).softmax(dim=-1)
        seen = math.sqrt(self.FEATURE_WEIGHT) * unit(encoding[..., : self.features])
        return torch.cat([seen, unit(probabilities)], dim=-1)


class Joint(nn.Module):
    """Compares what is seen and, by default to a seventh, what is predicted: the pre-logits and the centred logits."""

    # Length of the logits beside the 1 of the pre-logits. The larger, the more the prediction depends on what the
    # classifier says of an input instead of how it looks. Chosen on held-out training images, for reconstruction: from
    # 0.25 to 1 the accuracy is that of the classifier, without logits a point less. Of several classes it takes 1 to
    # rank as the classifier does.
    LOGIT_WEIGHT, EQUAL_WEIGHT = 0.4, 1.0

    def __init__(self, features: int, classifier: nn.Module, logit_weight: float = LOGIT_WEIGHT) -> None:
        super().__init__()
        self.pre_logits, self.logits = PreLogits(features), CentredLogits(classifier)
        self.logit_weight = logit_weight

    def forward(self, encoding: Tensor) -> Tensor:
        """Returns `[N, D + C]`."""
        seen, predicted = unit(self.pre_logits(encoding)), unit(self.logits(encoding))
        return torch.cat([seen, self.logit_weight * predicted], dim=-1)
