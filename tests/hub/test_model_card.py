"""What a visitor of the repository sees: metadata that the Hub takes, lines that run, and no more than is true."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from hub_models import make_model
from hub_server import Hub, check_card
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

import timm_memwrap
from timm_memwrap import MemoryWrapModel
from timm_memwrap.explaining import evaluate_explanations
from timm_memwrap.hub import push_folder
from timm_memwrap.hub.model_card import loading_code, make_card, update_memory
from timm_memwrap.memory_bank import Reference

DETAILS = {
    "description": "A model of **pets**.",
    "license": "mit",
    "datasets": ["me/pets-data"],
    "base_model": "timm/test_resnet.r160_in1k",
    "tags": ["pets"],
    "results": [{"dataset": "Pets", "dataset_id": "me/pets-data", "split": "test", "value": 0.925}],
}


def code_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_the_metadata_is_what_the_hub_reads(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    timm_memwrap.push_to_hub(model, "me/pets", model_card=DETAILS)
    card = ModelCard.load("me/pets")
    data = card.data
    assert data.library_name == "timm-memwrap"
    assert data.pipeline_tag == "image-classification"
    assert data.license == "mit"
    assert data.base_model == "timm/test_resnet.r160_in1k"
    assert data.datasets == ["me/pets-data"]
    assert data.tags == ["timm", "memory-wrap", "arxiv:2106.01440", "pets"]
    [result] = data.eval_results
    assert isinstance(result, EvalResult)
    assert (result.task_type, result.dataset_type, result.dataset_split) == (
        "image-classification",
        "me/pets-data",
        "test",
    )
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.925)
    assert check_card(str(card)) == ([], [])
    info = hub.repos["me/pets"]
    assert "A model of **pets**." in info.files()["README.md"].decode()


def _several_classes() -> MemoryWrapModel:
    model = timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=3), read_head="joint_equal")
    labels = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
    data = TensorDataset(torch.randn(4, 3, 64, 64), labels)
    timm_memwrap.build_memory_bank(model, data, size=None, progress=False)
    return model


@pytest.mark.parametrize(
    ("make", "labels", "score"),
    [
        (make_model, torch.arange(6) % 3, "accuracy"),
        (_several_classes, torch.eye(3).repeat(2, 1), "mean_average_precision"),
    ],
)
def test_what_was_measured_is_on_the_card_also_where_it_is_bad(
    make: Callable[[], MemoryWrapModel], labels: Tensor, score: str
) -> None:
    model = make()
    data = TensorDataset(torch.randn(6, 3, 64, 64), labels)
    metrics = evaluate_explanations(model, data, progress=False)
    results = metrics.to_results("Pets", split="test", dataset_id="me/pets-data")
    text = make_card(model, "hf-hub:me/pets", {"results": results}, model.memory_bank)
    assert check_card(text) == ([], [])
    found = ModelCard(text).data.eval_results
    assert {(each.dataset_name, each.dataset_split, each.dataset_type) for each in found} == {
        ("Pets", "test", "me/pets-data")
    }
    values = {each.metric_type: each.metric_value for each in found}
    name = score.replace("_", " ")
    assert found[0].metric_type == name
    assert values[name] == getattr(metrics, score)
    assert values[f"{name} without a memory"] == getattr(metrics, f"{score}_without_memory")
    assert values["changed without the strongest samples"] == metrics.deletion_flip_rate
    assert values["changed without random samples"] == metrics.random_flip_rate


def test_without_details_nothing_is_made_up(model: MemoryWrapModel) -> None:
    text = make_card(model, "hf-hub:me/pets", None, model.memory_bank)
    data = ModelCard(text).data.to_dict()
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
    assert check_card(text) == ([], [])
    assert "## Results" not in text


def test_the_code_runs_as_printed_and_gives_the_same_model_with_each_library(
    hub: Hub, token: str, model: MemoryWrapModel, images: Tensor, tmp_path: Path, run: Callable[..., str]
) -> None:
    pytest.importorskip("transformers")
    timm_memwrap.push_to_hub(model, "me/pets")
    folder = timm_memwrap.save_pretrained(model, tmp_path / "a 'folder'")
    push_folder(folder, "me/folder")
    torch.save((images, model(images)), tmp_path / "expected.pt")
    check = f"""
images, logits = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.equal(model(images), logits)
del model
"""
    start = f"import os, torch\nos.chdir({str(tmp_path)!r})\n"
    pushed = [hub.repos[name].files()["README.md"].decode() for name in ("me/pets", "me/folder")]
    code = start
    for card in (*pushed, (folder / "README.md").read_text()):
        with_timm, with_ours, with_transformers, reading = code_blocks(card)
        assert [len(block.strip().splitlines()) for block in code_blocks(card)] == [3, 2, 3, 2]
        in_transformers = with_transformers + "model = classifier.timm_model"
        for loading in (with_timm, with_ours, in_transformers):
            code += loading + check.replace("del model", reading + "del model")
    # Each block imports what it needs: as printed, in a process of its own.
    for block in code_blocks(pushed[0])[1:3]:
        run(start + block)
    printed = run(code).splitlines()
    # As many lines as images, nine times: the first name what the push left of the paths.
    assert len(printed) == 36
    assert "/home/me" not in "".join(printed[:24])
    assert "/home/me" in "".join(printed[24:])


def test_a_memory_alone_is_not_said_to_load_in_transformers(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    timm_memwrap.push_to_hub(model, "me/whole")
    timm_memwrap.push_memory_bank(timm_memwrap.from_pretrained("me/whole"), "me/memory")
    card = hub.repos["me/memory"].files()["README.md"].decode()
    assert "transformers" not in card
    assert 'timm_memwrap.from_pretrained("me/memory")' in card


def test_the_hub_files_the_card_under_this_library_and_under_timm(model: MemoryWrapModel) -> None:
    """The tag puts it under timm's filter. For transformers' tag, too, the Hub would show code without our import."""
    data = ModelCard(make_card(model, "hf-hub:me/pets", None, model.memory_bank)).data
    assert (data.library_name, data.tags[0]) == ("timm-memwrap", "timm")
    assert "transformers" not in data.tags


def test_the_entry_for_the_hubs_list_of_libraries_shows_the_code_of_the_card() -> None:
    entry = (Path(timm_memwrap.__file__).parent.parent / "hub_configs" / "model-libraries.ts").read_text()
    [(label, snippet)] = re.findall(
        r"export const (\w+) = \(model: ModelData\): string\[\] => \[\n\t`(.*?)`,", entry, re.S
    )
    assert label == "timm_memwrap"
    assert snippet.replace("${model.id}", "me/pets") == loading_code("hf-hub:me/pets")["timm"]
    for line in (
        '"timm-memwrap": {',
        'prettyLabel: "timm-memwrap"',
        "snippets: snippets.timm_memwrap",
        "filter: false",
    ):
        assert f"\t{line}" in entry
    assert 'countDownloads: `path:"config.json"`' in entry


def test_the_memory_is_described_as_it_is_pushed(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    timm_memwrap.push_to_hub(model, "me/pets")
    card = hub.repos["me/pets"].files()["README.md"].decode()
    assert "| Samples | 12 of 3 classes |" in card
    assert "| From | pets, 12 samples |" in card
    assert "| Chosen | all |" in card
    assert "| Images | not inside" in card
    assert "| cat | 4 |" in card
    assert "| Familiarity | not calibrated on held-out images |" in card
    model.memory_bank.set_reference(Reference("read", 1500, [0.01 * i for i in range(101)]))
    timm_memwrap.push_to_hub(model, "me/calibrated")
    files = hub.repos["me/calibrated"].files()
    assert "| Familiarity | measured against 1,500 held-out images |" in files["README.md"].decode()
    assert timm_memwrap.from_pretrained("me/calibrated").memory_bank.reference == model.memory_bank.reference
    timm_memwrap.push_to_hub(model, "me/with-images", include_images=True)
    assert "small pictures of the samples are inside" in hub.repos["me/with-images"].files()["README.md"].decode()


LIVE = [
    "<img src=x>\n# Heading",
    "[link](http://x) `code` *bold*",
    "\ud800 <!-- timm_memwrap: end of memory -->",
    "www.x.com",
    "me@x.com",
    "HTTPS://x.com",
    "a | b",
    "\x1b[31m \u202ered",
    "&lt;b&gt;",
    "_a_ ~b~ $c$",
]


def test_text_from_outside_is_only_text(model: MemoryWrapModel) -> None:
    """Whatever is not plain stands between the marks of code, of which no Markdown makes markup or a link."""
    bank = timm_memwrap.MemoryBank()
    names = ["golden retriever (dog)", *LIVE]
    count = torch.arange(len(names))
    provenance = timm_memwrap.memory_bank.Provenance(dataset="pets | <script>", selection="```\n---\nlicense: other")
    bank.replace(torch.randn(len(names), 96), count, count.tolist(), None, names, provenance)
    results = [{"dataset": "<b>|x", "value": 0.5, "metric": "[a](b)", "split": "http://x"}]
    card = make_card(model, "hf-hub:me/pets", {"results": results}, bank)
    text = ModelCard(card).text
    assert "| golden retriever (dog) | 1 |" in text
    outside = re.sub(r"`[^`\n]*`", "CODE", text.replace("```", ""))
    for live in ("<img", "<script", "<b>", "x.com", "[link]", "[a]", "http://x", "*bold*", "&lt;", "_a_", "other"):
        assert live not in outside
        assert live in text
    assert outside.count("| CODE | 1 |") == len(LIVE)
    assert outside.count("<!--") == 2
    assert "\n# Heading" not in text
    assert all(line.count("|") - line.count("\\|") == 3 for line in text.splitlines() if line.endswith("| 1 |"))
    assert "".join(text.split("\n")).isprintable()
    # The marks around the part on the memory are still found.
    assert update_memory(card, bank) == card
    bank.set_class_names([])
    assert all(live not in update_memory(card, bank) for live in ("<img", "www", "end of memory -->`"))


def test_a_card_with_many_classes_stays_readable(model: MemoryWrapModel) -> None:
    bank = timm_memwrap.MemoryBank()
    count = torch.arange(50)
    bank.replace(torch.randn(50, 3), count, count.tolist())
    card = make_card(model, "hf-hub:me/pets", None, bank)
    assert "And 30 more classes." in card
    assert "| 19 | 1 |\n\nAnd" in card


def test_accuracy_in_short(model: MemoryWrapModel) -> None:
    card = ModelCard(make_card(model, "hf-hub:me/pets", {"accuracy": 0.5}, model.memory_bank))
    assert card.data.eval_results[0].metric_value == 0.5
    assert "| pets | Accuracy | 0.5 |" in card.text


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"licence": "mit"}, r"Unknown model_card fields \['licence'\]"),
        ({"accuracy": 92.5}, "accuracy for the model card is 92.5. Pass a fraction"),
        ({"accuracy": "high"}, "'high'. Pass a number"),
        ({"results": [{"accuracy": 1}]}, r"model_card\['results'\] has \['accuracy'\]"),
        ({"license": 5}, r"model_card\['license'\] is 5. Pass text"),
        ({"license": "m\x85it"}, r"m\\x85it.* has characters that YAML changes"),
        ({"tags": [1]}, r"model_card\['tags'\] is \[1\]. Pass a list of texts"),
    ],
)
def test_a_wrong_detail_is_refused_before_the_hub_is_asked(
    hub: Hub, token: str, model: MemoryWrapModel, details: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        timm_memwrap.push_to_hub(model, "me/pets", model_card=details)
    assert not hub.requests


def test_metadata_that_the_hub_refuses_pushes_nothing(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        timm_memwrap.push_to_hub(model, "me/pets", model_card={"license": "my own"})
    assert len(hub.repos["me/pets"].history()) == 1


def test_a_figure_shows_images_and_goes_only_with_them(
    hub: Hub, token: str, model: MemoryWrapModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    figure = tmp_path / "figure.png"
    Image.new("RGB", (8, 8)).save(figure)
    with pytest.raises(ValueError, match="model_card has a figure, which shows images"):
        timm_memwrap.push_to_hub(model, "me/pets", model_card={"figure": figure})
    with pytest.raises(ValueError, match="not a PNG file"):
        timm_memwrap.push_to_hub(model, "me/pets", model_card={"figure": tmp_path / "missing.png"}, include_images=True)
    assert not hub.requests
    timm_memwrap.push_to_hub(model, "me/pets", model_card={"figure": figure}, include_images=True)
    files = hub.repos["me/pets"].files()
    assert files["explanation.png"] == figure.read_bytes()
    assert b"](explanation.png)" in files["README.md"]
    assert "is public" in caplog.text


def test_the_base_model_is_named_when_its_weights_were_loaded(model: MemoryWrapModel, tmp_path: Path) -> None:
    assert model.base_model is None
    weights = tmp_path / "backbone.safetensors"
    backbone = timm.create_model("test_resnet.r160_in1k")
    from safetensors.torch import save_file

    save_file(backbone.state_dict(), weights)
    overlay = {"file": str(weights)}
    trained = timm.create_model(
        "memwrap_test_resnet.r160_in1k", pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay
    )
    timm_memwrap.save_pretrained(trained, tmp_path / "model", allow_empty_memory=True)
    # It is remembered, and so is nothing about where the file was.
    loaded = timm_memwrap.from_pretrained(tmp_path / "model")
    assert loaded.base_model == "timm/test_resnet.r160_in1k"
    assert ModelCard.load(tmp_path / "model" / "README.md").data.base_model == "timm/test_resnet.r160_in1k"
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    untrained = timm.create_model("memwrap_test_resnet.r160_in1k", num_classes=3)
    assert untrained.base_model is None


def test_saving_never_overwrites_a_readme_unless_asked(model: MemoryWrapModel, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    timm_memwrap.save_pretrained(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    timm_memwrap.save_pretrained(model, tmp_path, overwrite_card=True, model_card={"license": "mit"})
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
