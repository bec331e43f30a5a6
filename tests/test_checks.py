"""What is checked before anything is built concerns the thread that checks, and costs no storage."""

import threading

import pytest
import timm
import torch

from timm_memwrap.checks import parse_config, shapes_only, without_values
from timm_memwrap.tensor_files import FileError


def weights(name: str) -> dict[str, torch.Tensor]:
    return timm.create_model(name).state_dict()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "swin_tiny_patch4_window7_224"])
def test_a_model_is_built_without_storage(name: str) -> None:
    tensors = weights(name)
    with shapes_only(tensors, "the file"):
        shell = timm.create_model(name)
    assert all(parameter.is_meta for parameter in shell.parameters())
    assert {key: value.shape for key, value in shell.state_dict().items()} == {k: v.shape for k, v in tensors.items()}


def test_a_model_that_is_larger_than_its_file_is_stopped() -> None:
    with pytest.raises(FileError, match="describes a larger model than the file holds weights for"):  # noqa: SIM117
        with shapes_only(weights("test_vit"), "the file"):
            timm.create_model("vit_base_patch16_224")


def test_other_threads_are_not_concerned() -> None:
    made, entered, go_on = [], threading.Event(), threading.Event()

    def other() -> None:
        entered.wait()
        made.append(timm.create_model("test_vit"))
        go_on.set()

    thread = threading.Thread(target=other)
    thread.start()
    with shapes_only({}, "the file"):
        entered.set()
        go_on.wait()
    thread.join()
    assert not any(parameter.is_meta for parameter in made[0].parameters())
    assert float(next(made[0].parameters()).detach().abs().sum()) > 0


def test_random_numbers_are_left_out() -> None:
    before = torch.get_rng_state()
    with without_values():
        for name in ("test_resnet", "test_vit", "test_convnext"):
            timm.create_model(name)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("cfg", "fine"),
    [
        ({"input_size": [3, 4096, 4096], "crop_pct": 1.0}, True),
        ({"input_size": [3, 1024, 1024], "test_input_size": [3, 1280, 1280], "test_crop_pct": 0.9}, True),
        ({"input_size": [3, 65536, 65536]}, False),
        ({"input_size": [3, 32, 5000]}, False),
        ({"input_size": [3, 32, 32], "test_input_size": [3, 5000, 32]}, False),
        ({"input_size": [3, 224, 224], "crop_pct": 1e-6}, False),
        ({"input_size": [3, 224, 224], "crop_pct": -1}, False),
        ({"input_size": [3, 224, 224], "crop_pct": float("nan")}, False),
        ({"input_size": [3, 224, 224], "crop_pct": "1"}, False),
        ({"input_size": [3, 224, 224], "test_input_size": 224}, False),
        ({"input_size": [3, 224, 224], "test_input_size": [3, "a", 224]}, False),
    ],
)
def test_images_are_not_resized_to_what_fills_the_memory(cfg: dict[str, object], fine: bool) -> None:
    config = {"architecture": "memwrap_test_resnet", "num_classes": 2, "pretrained_cfg": {"num_classes": 2, **cfg}}
    if fine:
        parse_config(config, "config.json", {})
    else:
        with pytest.raises(FileError, match=r"^config\.json: images would be resized to .*4096 pixels a side"):
            parse_config(config, "config.json", {})
