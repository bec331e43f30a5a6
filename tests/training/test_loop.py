import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from timm_memwrap.training.configuration import TrainingConfig
from timm_memwrap.training.loop import evaluate, train


def _separable(count: int = 64) -> TensorDataset:
    labels = torch.arange(count) % 2
    images = torch.randn(count, 3, 32, 32) * 0.1 + labels.view(-1, 1, 1, 1)
    return TensorDataset(images, labels)


@pytest.mark.parametrize("name", ["test_resnet", "memwrap_test_resnet", "memwrap_baseline_test_resnet"])
def test_training_learns_what_can_be_learnt(name: str) -> None:
    data = _separable()
    model = timm.create_model(name, num_classes=2)
    train(model, DataLoader(data, 16, shuffle=True), TrainingConfig(epochs=6, lr=3e-3), "test", progress=False)
    assert not model.training
    assert evaluate(model, DataLoader(data, 16)) > 0.95


def test_a_loss_that_is_not_finite_stops_and_says_where() -> None:
    data = TensorDataset(torch.full((4, 3, 32, 32), float("nan")), torch.tensor([0, 1, 0, 1]))
    model = timm.create_model("test_resnet", num_classes=2)
    with pytest.raises(ValueError, match=r"loss is nan in epoch 0, step 0"):
        train(model, DataLoader(data, 2), TrainingConfig(epochs=1), "test", progress=False)


def test_accuracy_counts_right_answers() -> None:
    class Always(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0.0, 1.0]).expand(len(images), 2)

    data = TensorDataset(torch.zeros(8, 3, 4, 4), torch.tensor([0, 1, 1, 1, 0, 1, 0, 1]))
    assert evaluate(Always(), DataLoader(data, 3)) == 5 / 8
