import pytest
import timm
import torch

from timm_memwrap.training.heads import WithoutMemory


@pytest.mark.parametrize("name", ["memwrap_test_resnet", "memwrap_baseline_test_resnet"])
@pytest.mark.parametrize("training", [True, False])
def test_the_control_reads_nothing(name: str, training: bool) -> None:
    model = timm.create_model(name, num_classes=3).train(training)
    images = torch.randn(4, 3, 32, 32)
    control = WithoutMemory(model).train(training)
    with torch.no_grad():
        encoding = model.encode(images)
        # What would be read is zero, where the head takes the input too and where it does not.
        nothing = torch.zeros_like(encoding)
        expected = model.head.classify(encoding, nothing)
        torch.testing.assert_close(control(images), expected)


def test_the_control_learns_from_its_own_image_alone() -> None:
    control = WithoutMemory(timm.create_model("memwrap_test_resnet", num_classes=3))
    # In evaluation mode, where batch norm mixes nothing, but with gradients.
    images = torch.randn(3, 3, 32, 32, requires_grad=True)
    control.eval()(images)[0].sum().backward()
    assert images.grad is not None
    assert images.grad[0].abs().sum() > 0
    assert images.grad[1:].abs().sum() == 0
