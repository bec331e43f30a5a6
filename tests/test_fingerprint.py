"""Whether weights are still the same."""

import copy
import gc
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import timm_memwrap
from timm_memwrap.fingerprint import Watch, WatchedFingerprint, fingerprint


def _resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=2)


def test_equal_weights_have_equal_fingerprints() -> None:
    model = _resnet()
    assert fingerprint(model) == fingerprint(_resnet()) == fingerprint(copy.deepcopy(model))
    assert fingerprint(model) == fingerprint(model.eval().requires_grad_(False))
    assert fingerprint(model) == fingerprint(model.to(memory_format=torch.channels_last))


def test_every_changed_weight_changes_it() -> None:
    model = _resnet()
    before = fingerprint(model)
    seen = {before}
    weights = {name: value for name, value in model.state_dict().items() if "num_batches_tracked" not in name}
    for tensor in weights.values():
        with torch.no_grad():
            # The least change that there is, in the last entry too.
            flat = tensor.view(-1)
            flat[-1] = torch.nextafter(flat[-1], flat[-1] + 1) if tensor.is_floating_point() else flat[-1] + 1
        seen.add(fingerprint(model))
    assert len(seen) == len(weights) + 1


def test_what_changes_no_output_does_not_change_it() -> None:
    model = _resnet()
    before = fingerprint(model)
    model.train()(torch.randn(2, 3, 32, 32))
    trained = fingerprint(model)
    assert trained != before
    for name, tensor in model.named_buffers():
        if "num_batches_tracked" in name:
            tensor.add_(1)
    assert fingerprint(model) == fingerprint(timm.utils.freeze(model) or model) == trained


def test_compiling_a_part_does_not_change_it() -> None:
    model = _resnet()
    before = fingerprint(model)
    model.layer1 = torch.compile(model.layer1, backend="eager")
    assert fingerprint(model) == fingerprint(torch.compile(model, backend="eager")) == before


class _WithState(nn.Module):
    def __init__(self, state: object) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> object:
        return self.state


def test_state_that_is_no_tensor_counts() -> None:
    states = [None, 1, {"a": 1}, (torch.zeros(2), None), (torch.ones(2), None)]
    assert len({fingerprint(_WithState(state)) for state in states}) == len(states)
    module = _WithState(1)
    watched = WatchedFingerprint()
    before = watched.of(module)
    module.state = 2
    assert watched.of(module) != before


@pytest.mark.parametrize("change", ["half", "double", "bfloat16"])
def test_another_precision_changes_it_where_it_rounds(change: str) -> None:
    model = _resnet()
    before = fingerprint(model)
    assert (fingerprint(getattr(model, change)()) == before) == (change == "double")


def test_names_and_shapes_count() -> None:
    one, other = nn.Module(), nn.Module()
    one.register_buffer("a", torch.zeros(2, 3))
    other.register_buffer("a", torch.zeros(3, 2))
    assert fingerprint(one) != fingerprint(other)
    renamed = nn.Module()
    renamed.register_buffer("b", torch.zeros(2, 3))
    assert fingerprint(one) != fingerprint(renamed)


def test_an_average_of_two_is_text() -> None:
    """`ModelEmaV2` averages a bank's buffers, the fingerprint's bytes among them."""
    one, other = (torch.frombuffer(bytearray(fingerprint(nn.Linear(1, n)).encode()), dtype=torch.uint8) for n in (1, 2))
    for decay in (0.1, 0.5, 0.9, 0.9998):
        mixed = decay * one + (1 - decay) * other
        assert bytes(mixed.to(torch.uint8).tolist()).isalpha()


def test_empty_and_scalar_tensors_are_taken() -> None:
    module = nn.Module()
    module.register_buffer("nothing", torch.zeros(0, 3))
    module.register_buffer("scalar", torch.tensor(3, dtype=torch.bfloat16))
    assert len(fingerprint(module)) == 64


def _tensors() -> list[Tensor]:
    return [nn.Parameter(torch.zeros(3)), torch.zeros(2, dtype=torch.long)]


def test_a_watch_sees_no_change_in_reading() -> None:
    tensors = _tensors()
    watch = Watch(tensors)
    (tensors[0] + tensors[1].sum()).sum()
    copy.deepcopy(tensors)
    assert watch.unchanged(tensors)


def test_a_gradient_counts_as_a_change() -> None:
    """A fused optimizer writes weights without raising PyTorch's version counters."""
    tensors = _tensors()
    watch = Watch(tensors)
    tensors[0].sum().backward()
    assert not watch.unchanged(tensors)
    assert Watch(tensors).unchanged(tensors)


def test_a_watch_that_is_gone_leaves_no_hook() -> None:
    tensors = _tensors()
    watch = Watch(tensors)
    assert tensors[0]._post_accumulate_grad_hooks
    del watch
    gc.collect()
    assert not tensors[0]._post_accumulate_grad_hooks


@pytest.mark.parametrize(
    "change", ["in place", "optimizer", "fused optimizer", "frozen", "replaced", "data", "fewer", "more", "other order"]
)
def test_a_watch_sees_every_change(change: str) -> None:
    tensors = _tensors()
    watch = Watch(tensors)
    if change == "in place":
        tensors[1].add_(1)
    elif change == "optimizer":
        tensors[0].grad = torch.ones(3)
        torch.optim.SGD([tensors[0]], lr=0.1).step()
    elif change == "fused optimizer":
        tensors[0].sum().backward()
        torch.optim.AdamW([tensors[0]], fused=True).step()
    elif change == "frozen":
        tensors[0].requires_grad_(False)
    elif change == "replaced":
        tensors[1] = tensors[1].clone()
    elif change == "data":
        tensors[0].data = torch.ones(3)
    elif change == "fewer":
        tensors.pop()
    elif change == "more":
        tensors.append(torch.zeros(1))
    else:
        tensors.reverse()
    assert not watch.unchanged(tensors)


def test_a_watch_promises_nothing_for_inference_tensors() -> None:
    with torch.inference_mode():
        tensors = [torch.zeros(3)]
        assert not Watch(tensors).unchanged(tensors)


def test_an_address_that_is_used_again_is_not_the_same_tensor() -> None:
    tensors = [torch.zeros(1000)]
    watch = Watch(tensors)
    for _ in range(10):
        tensors[0].data = torch.ones(1000)
        assert not watch.unchanged(tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_saved_in_another_precision_comes_back_fitting(dtype: torch.dtype, tmp_path: Path) -> None:
    model = timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=2))
    if dtype == torch.float64:
        # Values that float32 has not, as after training in double precision.
        model.double()
        with torch.no_grad():
            for parameter in model.backbone.parameters():
                parameter.mul_(1 + 1e-12)
    data = TensorDataset(torch.randn(6, 3, 32, 32), torch.arange(6) % 2)
    timm_memwrap.build_memory_bank(model, data, size=None, progress=False)
    timm_memwrap.save_pretrained(model.to(dtype), tmp_path)
    # timm creates it in float32, with the same values.
    assert not timm_memwrap.from_pretrained(tmp_path).memory_is_stale()
