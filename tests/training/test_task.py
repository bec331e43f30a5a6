import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import ClassificationTask

from timm_memwrap.encoding_queue import EncodingQueue
from timm_memwrap.training.task import MemoryWrapTask


@pytest.fixture
def model():
    return timm.create_model("memwrap_test_resnet", num_classes=3)


@pytest.fixture
def batch():
    return torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])


def test_it_is_a_task_of_timms_that_any_loop_can_take(model, batch) -> None:
    task = MemoryWrapTask(model, verbose=False)
    assert isinstance(task, ClassificationTask)
    result = task(*batch)
    assert result["loss"].item() == pytest.approx(F.cross_entropy(result["output"], batch[1]).item())
    result["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_given_images_are_the_memory(model, batch) -> None:
    # Batch statistics would change between two forwards.
    model.backbone.eval()
    memory = torch.randn(5, 3, 32, 32)
    assert torch.equal(MemoryWrapTask(model, verbose=False)(*batch, memory=memory)["output"], model(batch[0], memory))


def test_the_queue_is_read_without_ones_own_earlier_encodings(model, batch) -> None:
    model.train().backbone.eval()
    images, labels = batch
    task = MemoryWrapTask(model, queue_size=8, verbose=False)
    first = task(images, labels, positions=torch.arange(6))["output"]
    torch.testing.assert_close(first, model(images))
    assert len(task.queue) == 6

    # The samples 4 and 5 come again, with two new ones.
    again, positions = torch.cat([images[4:], torch.randn(2, 3, 32, 32)]), torch.tensor([4, 5, 10, 11])
    output = task(again, labels[:4], positions=positions)["output"]
    encodings = model.encode(images)
    for row, position in enumerate(positions.tolist()):
        others = [i for i in range(6) if i != position]
        expected = model.read(model.encode(again[row : row + 1]), encodings[others]).logits
        torch.testing.assert_close(output[row : row + 1], expected, atol=1e-4, rtol=1e-4)
    # The oldest two made room.
    assert task.queue.positions.tolist() == [10, 11, 2, 3, 4, 5, 4, 5]
    assert not task.queue.encodings.requires_grad


def test_a_queue_of_nothing_but_oneself_reads_nothing(model) -> None:
    model.train().backbone.eval()
    encoding = model.encode(torch.randn(1, 3, 32, 32))
    hidden = torch.ones(1, 2, dtype=torch.bool)
    readout = model.read(encoding, encoding.repeat(2, 1), hidden)
    assert not readout.weights.any()
    torch.testing.assert_close(readout.logits, model.read(encoding, encoding[:0]).logits)


@pytest.mark.parametrize("hidden", [torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.bool), torch.tensor([0, 1])])
def test_a_mask_that_is_none_is_refused(model, hidden: torch.Tensor) -> None:
    encoding = torch.randn(2, model.encoding_size)
    with pytest.raises(ValueError, match=r"a mask of the memory set.*\[2, 4\]"):
        model.read(encoding, torch.randn(4, model.encoding_size), hidden)


def test_hidden_samples_have_no_weight_in_evaluation_either(model) -> None:
    model.eval()
    encoding, memory = torch.randn(4, model.encoding_size), torch.randn(7, model.encoding_size)
    hidden = torch.rand(4, 7) > 0.5
    readout = model.read(encoding, memory, hidden)
    for row in range(4):
        alone = model.read(encoding[row : row + 1], memory[~hidden[row]]).logits
        torch.testing.assert_close(readout.logits[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_the_oldest_leave_the_queue() -> None:
    queue = EncodingQueue(3, 2)
    for i in range(5):
        queue.append(torch.full((1, 2), float(i)), torch.tensor([i]))
    assert queue.positions.tolist() == [3, 4, 2]
    assert queue.encodings[:, 0].tolist() == [3.0, 4.0, 2.0]
    other = EncodingQueue(3, 2)
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.append(torch.full((1, 2), 5.0), torch.tensor([5]))
    assert queue.positions.tolist() == other.positions.tolist() == [3, 4, 5]
    assert torch.equal(other.encodings, queue.encodings)


def test_a_model_without_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="reads no memory"):
        MemoryWrapTask(timm.create_model("test_resnet", num_classes=3), verbose=False)
