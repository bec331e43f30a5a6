"""Explanations where images may have several classes, or none: which samples say of each that it is there."""

from collections.abc import Callable

import pytest
import torch

import timm_memwrap
from timm_memwrap import MemoryWrapModel, explain
from timm_memwrap.explaining import Explanation
from timm_memwrap.explaining.reading import read_without

Make = Callable[..., MemoryWrapModel]
MakeImages = Callable[..., torch.Tensor]


def _explained(model: MemoryWrapModel, images: torch.Tensor, **kwargs: int) -> tuple[list[Explanation], torch.Tensor]:
    with torch.no_grad():
        return explain(model, images, **kwargs), model(images).sigmoid()


def test_each_class_that_is_present_is_explained(several: MemoryWrapModel, make_images: MakeImages) -> None:
    explanations, probabilities = _explained(several, make_images(20))
    numbers = set()
    for explanation, row in zip(explanations, probabilities, strict=True):
        said = [label for label in row.argsort(descending=True).tolist() if row[label] > 0.5]
        assert explanation.present == bool(said)
        assert [each.prediction for each in explanation.classes] == (said or [int(row.argmax())])
        for each in explanation.classes:
            assert each.probability == pytest.approx(float(row[each.prediction]), abs=1e-5)
            assert each.present == explanation.present
            assert each.classes == ()
        # The rest is of the most probable one.
        first = explanation.classes[0]
        assert (explanation.prediction, explanation.samples) == (first.prediction, first.samples)
        numbers.add(len(said))
    assert len(numbers) > 1


def test_samples_speak_for_a_class_if_the_model_says_that_they_have_it(
    several: MemoryWrapModel, make_images: MakeImages
) -> None:
    explanations, _ = _explained(several, make_images(12), top_k=16)
    says = several.own_logits(torch.arange(16)) > 0
    labels = several.memory_bank.labels
    kinds = set()
    for each in [part for explanation in explanations for part in explanation.classes]:
        assert each.samples
        for sample in each.samples:
            assert sample.is_example == bool(says[sample.position, each.prediction])
            assert sample.predictions == tuple(says[sample.position].nonzero().flatten().tolist())
            assert sample.labels == tuple(labels[sample.position].nonzero().flatten().tolist())
            assert sample.label is sample.prediction is None
            assert sample.disputed == (sample.labels != sample.predictions)
            assert len(sample.class_name.split(", ")) == max(1, len(sample.labels))
            kinds.add(sample.is_example)
        assert {*each.examples, *each.counterfactuals} == {*each.samples}
    assert kinds == {True, False}


def test_influence_is_on_the_class_that_is_explained(several: MemoryWrapModel, make_images: MakeImages) -> None:
    images = make_images(6)
    explanations, _ = _explained(several, images)
    with torch.no_grad():
        encoding = several.encode(images)
        for i, explanation in enumerate(explanations):
            for each in explanation.classes:
                for sample in each.samples:
                    without = read_without(several, encoding[i : i + 1], torch.tensor([[sample.position]]))[0]
                    left = float(without[each.prediction].sigmoid())
                    assert sample.influence == pytest.approx(each.probability - left, abs=1e-4)
                    assert sample.prediction_without == (each.prediction if left > 0.5 else None)


def test_a_picture_of_nothing_has_no_class(make_several_model: Make, make_images: MakeImages) -> None:
    model = make_several_model()
    with torch.no_grad():
        model.backbone.get_classifier().bias -= 100
    timm_memwrap.build_memory_bank(
        model, torch.utils.data.TensorDataset(make_images(8), torch.eye(8)[:, :4]), progress=False
    )
    explanation = explain(model, make_images(1, seed=9))[0]
    assert not explanation.present
    assert len(explanation.classes) == 1
    assert explanation.title == "none of its classes"
    assert "none of its classes" in str(explanation)
    assert not explanation.examples
    assert explanation.counterfactuals[0].predicted_class_name == "none"


def test_nothing_is_said_without_a_memory(make_several_model: Make, make_images: MakeImages) -> None:
    for each in explain(make_several_model(), make_images(8)):
        assert each.prediction_without_memory is None
        assert each.probability_without_memory == 0.5


def test_contenders_bear_their_class_and_do_not_speak_against_each_other(
    make_several_model: Make, make_images: MakeImages
) -> None:
    model = make_several_model()
    explanations, probabilities = _explained(model, make_images(6), contenders=4)
    for explanation, row in zip(explanations, probabilities, strict=True):
        assert [each.prediction for each in explanation.contenders] == row.argsort(descending=True).tolist()
        for contender in explanation.contenders:
            assert contender.samples
            for sample in contender.samples:
                assert model.memory_bank.labels[sample.position, contender.prediction] == 1
                assert sample.class_name == contender.class_name
        assert explanation.most_alike is None
        assert explanation.confidence is None
        assert not [doubt for doubt in explanation.doubts if "looks more like" in doubt]


def test_what_the_samples_carry_is_a_share_of_the_plain_logit(
    make_several_model: Make, make_images: MakeImages
) -> None:
    model, images = make_several_model(), make_images(8)
    with torch.no_grad():
        plain, read = model.backbone(images), model(images)
    for i, explanation in enumerate(explain(model, images)):
        for each in explanation.classes:
            whole = float(plain[i, each.prediction])
            assert (each.carried is None) == (whole <= 0)
            if each.carried is not None:
                assert each.carried * whole == pytest.approx(float(read[i, each.prediction]), abs=1e-3)


def test_a_summary_names_all_classes_and_json_holds_them(make_several_model: Make, make_images: MakeImages) -> None:
    explanations = explain(make_several_model(), make_images(20))
    explanation = max(explanations, key=lambda each: len(each.classes))
    assert len(explanation.classes) > 1
    for each in explanation.classes:
        assert f"{each.class_name} ({each.probability:.0%}) from " in str(explanation)
        assert each.class_name in explanation.title
    values = explanation.to_dict()
    assert [each["prediction"] for each in values["classes"]] == [each.prediction for each in explanation.classes]
    assert values["samples"][0]["labels"] == [*explanation.samples[0].labels]


def test_images_of_one_class_each_are_explained_as_before(make_model: Make, make_images: MakeImages) -> None:
    for explanation in explain(make_model("wrapped"), make_images(3)):
        assert explanation.classes == ()
        assert explanation.present
        for sample in explanation.samples:
            assert sample.labels == (sample.label,)
            assert sample.predictions == (sample.prediction,)


def test_a_vote_counts_one_label(make_images: MakeImages) -> None:
    import timm

    model = timm.create_model("memwrap_baseline_test_resnet", num_classes=4, classifier="vote")
    data = torch.utils.data.TensorDataset(make_images(4), torch.eye(4))
    for given in (data, iter(torch.utils.data.DataLoader(data))):
        with pytest.raises(ValueError, match=r"classifier='vote' counts one label.*'own', 'linear' or 'mlp'"):
            timm_memwrap.build_memory_bank(model, given, progress=False)
    with pytest.raises(ValueError, match="a vote counts one label"):
        model.head(torch.randn(2, 96), torch.randn(4, 96), labels=torch.eye(4))


def test_one_hot_labels_are_told_to_be_multi_label(
    make_several_model: Make, make_images: MakeImages, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_several_model()
    assert "exactly one class" not in caplog.text
    timm_memwrap.build_memory_bank(model, torch.utils.data.TensorDataset(make_images(4), torch.eye(4)), progress=False)
    assert "exactly one class" in caplog.text
