"""A visitor's edits are their own, and can be undone."""

import pytest
import torch
from demo_pages import NAMES, make_model

from timm_memwrap.demo.visitor import Visitor, own_copy
from timm_memwrap.explaining.reading import read_without


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def test_a_copy_shares_the_encoder_and_nothing_that_changes(inputs: torch.Tensor) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copied = own_copy(model)
    assert copied.backbone.conv1[0].weight is model.backbone.conv1[0].weight
    copied.remember(torch.randn(2, 3, 64, 64), "zebra", progress=False)
    copied.forget([0, 1])
    assert copied.num_classes == 4
    assert (model.num_classes, len(model.memory_bank)) == (3, 12)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert copied(inputs).shape == (1, 4)
        assert torch.equal(model(inputs), make_model()(inputs))


def test_changes_are_undone_one_by_one(inputs: torch.Tensor) -> None:
    visitor = Visitor(make_model())
    assert not visitor.undo()
    sizes = []
    for i in range(3):
        visitor.edit(lambda model, i=i: model.remember(inputs, NAMES[0], [f"new {i}"], progress=False))
        sizes.append(len(visitor.model.memory_bank))
    assert sizes == [13, 14, 15]
    while visitor.undo():
        sizes.append(len(visitor.model.memory_bank))
    assert sizes[3:] == [14, 13, 12]


def test_a_change_that_fails_changes_nothing(inputs: torch.Tensor) -> None:
    visitor = Visitor(make_model())
    with pytest.raises(ValueError, match="No sample with id 'missing'"):
        visitor.edit(lambda model: (model.remember(inputs, "zebra", progress=False), model.forget(["missing"])))
    assert (visitor.model.num_classes, visitor.history) == (3, [])


def test_leaving_out_is_a_second_read_without_a_second_encoding(
    inputs: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    asked = Visitor(model).ask("a.png", inputs)
    monkeypatch.setattr(type(model), "encode", None)
    whole = asked.probabilities()
    asked.left_out = [asked.explanation.samples[0].position]
    expected = read_without(model, asked.encoding, torch.tensor([asked.left_out]))[0].softmax(-1)
    assert torch.equal(asked.probabilities(), expected)
    assert not torch.equal(asked.probabilities(), whole)
