"""timm's and PyTorch's own tools on a Memory Wrap model: checkpoints, EMA, DistributedDataParallel, compile."""

import copy
import socket
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import torch
import torch.distributed
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import create_feature_extractor, load_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV2, ModelEmaV3
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import timm_memwrap  # noqa: F401
from timm_memwrap import MemoryWrapModel, build_memory_bank
from timm_memwrap.checks import without_values

CLASSES = 4
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "memwrap": ("memwrap_test_resnet", {}),
    "baseline": ("memwrap_baseline_test_resnet", {}),
    "evidence": ("memwrap_evidence_test_resnet", {}),
    "logits": ("memwrap_evidence_test_resnet", {"read_head": "logits"}),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def create(variant: str = "memwrap", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    name, kwargs = VARIANTS[variant]
    return timm.create_model(name, num_classes=CLASSES, **kwargs).eval()


def random_images(count: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def fill(model: MemoryWrapModel, size: int = 12, seed: int = 2) -> MemoryWrapModel:
    data = TensorDataset(random_images(size, seed), torch.arange(size) % CLASSES)
    build_memory_bank(model, data, size=None, progress=False)
    return model


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model.train()
    images = random_images(6, seed)
    loss = F.cross_entropy(model(images), torch.arange(6) % CLASSES)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("memory_bank.")}


def assert_same(model: Any, other: Any) -> None:
    """Asserts that two models have the same state and answer alike, their banks included."""
    assert equal(model.state_dict(), other.state_dict())
    images = random_images()
    with torch.no_grad():
        assert torch.equal(model.eval()(images), other.eval()(images))


@each_variant
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("into_filled", [False, True], ids=["into empty", "into filled"])
def test_load_checkpoint(variant: str, suffix: str, into_filled: bool, tmp_path: Path) -> None:
    model, other = fill(create(variant)), create(variant, seed=1)
    if into_filled:
        fill(other, size=7, seed=5)
    path = tmp_path / f"checkpoint.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        save_file(model.state_dict(), path, metadata={"format": "pt"})
    load_checkpoint(other, str(path))
    assert other.memory_bank.ids == model.memory_bank.ids
    assert not other.memory_is_stale()
    assert_same(model, other)


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_without_a_bank_leaves_the_bank(strict: bool, tmp_path: Path) -> None:
    model, other = create(), fill(create(seed=1))
    remembered = {name: tensor.clone() for name, tensor in other.memory_bank.state_dict().items()}
    torch.save(model.state_dict(), tmp_path / "checkpoint.pth")
    load_checkpoint(other, str(tmp_path / "checkpoint.pth"), strict=strict)
    assert equal(other.memory_bank.state_dict(), remembered)
    assert equal(weights(other), weights(model))
    # It was encoded with other weights, and says so.
    assert other.memory_is_stale()


@each_variant
@pytest.mark.parametrize("wrong", ["missing", "unexpected", "shape", "bank"])
def test_a_refused_checkpoint_leaves_the_model_as_it_was(variant: str, wrong: str, tmp_path: Path) -> None:
    model, other = fill(create(variant, seed=1)), fill(create(variant), size=7, seed=5)
    state_dict = other.state_dict()
    # PyTorch does without the count of a norm layer's batches.
    name = [name for name in other.backbone.state_dict() if not name.endswith("num_batches_tracked")][-1]
    if wrong == "missing":
        name = f"backbone.{name}"
        del state_dict[name]
    elif wrong == "unexpected":
        name = "head.another.weight"
        state_dict[name] = torch.zeros(2)
    elif wrong == "shape":
        name = f"backbone.{next(iter(other.backbone.state_dict()))}"
        state_dict[name] = torch.zeros(2, 2)
    else:
        name = "encodings"
        state_dict["memory_bank.encodings"] = torch.zeros(7, 5)
    torch.save(state_dict, tmp_path / "checkpoint.pth")
    images = random_images()
    with torch.no_grad():
        logits = model(images)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        load_checkpoint(model, str(tmp_path / "checkpoint.pth"))
    assert equal(model.state_dict(), before)
    assert not model.memory_is_stale()
    with torch.no_grad():
        assert torch.equal(model(images), logits)


@each_variant
def test_checkpoint_saver(variant: str, tmp_path: Path) -> None:
    """Saves and reloads model, optimizer and EMA as timm's training script does."""
    model = create(variant)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3)
    ema = ModelEmaV3(model, decay=0.5)
    train_step(model, optimizer, seed=1)
    ema.update(model)
    fill(model)
    fill(ema.module)
    saver = CheckpointSaver(
        model,
        optimizer,
        args=Namespace(model=variant),
        model_ema=ema,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(epoch=0, metric=1.0)
    path = str(tmp_path / "model_best.pth.tar")

    other = create(variant, seed=1)
    other_optimizer = timm.optim.create_optimizer_v2(other, opt="adamw", lr=1e-3)
    assert timm.models.resume_checkpoint(other, path, other_optimizer, log_info=False) == 1
    assert_same(model, other)
    averaged = create(variant, seed=1)
    load_checkpoint(averaged, path, use_ema=True)
    assert_same(ema.module, averaged)
    for one in (model, other):
        train_step(one, optimizer if one is model else other_optimizer, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_clean_state_dict_of_a_wrapped_model_loads(tmp_path: Path) -> None:
    """The prefix that DistributedDataParallel and torch.compile put before names is taken off by timm."""
    model, other = fill(create()), create(seed=1)
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": wrapped}, tmp_path / "checkpoint.pth")
    load_checkpoint(other, str(tmp_path / "checkpoint.pth"))
    assert_same(model, other)


def new_ema(kind: str, model: Any) -> Any:
    return ModelEmaV2(model, decay=0.5) if kind == "V2" else ModelEmaV3(model, decay=0.5, foreach=kind == "V3 foreach")


each_ema = pytest.mark.parametrize("kind", ["V2", "V3", "V3 foreach"])


@each_variant
@each_ema
@pytest.mark.parametrize("remembers", ["both", "the average", "the model", "neither"])
def test_ema_averages_weights_and_leaves_the_memory(variant: str, kind: str, remembers: str) -> None:
    """Whether the bank is there when the average is made, comes later, goes, or never was."""
    model = create(variant)
    if remembers in ("both", "the average"):
        fill(model)
    ema = new_ema(kind, model)
    if remembers == "the average":
        model.memory_bank.clear()
    if remembers == "the model":
        fill(model)
    kept = {name: tensor.clone() for name, tensor in ema.module.memory_bank.state_dict().items()}
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.1)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step in range(3):
        train_step(model, optimizer, seed=step)
        ema.update(model)
        for name, parameter in model.named_parameters():
            expected[name].lerp_(parameter.detach(), 0.5)
    for name, parameter in ema.module.named_parameters():
        torch.testing.assert_close(parameter, expected[name])
    # Its bank is of the time when it was made, and it knows that its weights are not those of that time.
    assert equal(ema.module.memory_bank.state_dict(), kept)
    assert ema.module.memory_is_stale() == bool(kept)
    fill(ema.module)
    assert not ema.module.memory_is_stale()
    assert torch.isfinite(ema.module(random_images())).all()
    if remembers == "both":
        ema.set(model)
        assert_same(ema.module.train(), model.train())


@each_ema
def test_ema_of_a_bank_that_was_built_again_is_stale_until_it_is_built_too(kind: str) -> None:
    """timm averages what is in the state dict, and an average of two samples' encodings is of neither."""
    model = fill(create())
    ema = new_ema(kind, model)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.1)
    for step in range(3):
        train_step(model, optimizer, seed=step)
        fill(model, seed=10 + step)
        ema.update(model)
    assert ema.module.memory_is_stale()
    fill(ema.module, seed=12)
    assert not ema.module.memory_is_stale()
    other = fill(copy.deepcopy(ema.module), seed=12)
    assert_same(ema.module, other)


@each_ema
def test_ema_of_a_bank_that_changed_its_length_is_an_error(kind: str) -> None:
    model = fill(create())
    ema = new_ema(kind, model)
    fill(model, size=9)
    with pytest.raises(RuntimeError, match="size"):
        ema.update(model)
    # What to do then: the average's memory is of no use, since its weights are others.
    ema.module.memory_bank.clear()
    ema.update(model)
    assert torch.isfinite(ema.module(random_images())).all()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def spawn(worker: Callable[..., None], *args: Any, ranks: int = 2) -> None:
    """Runs `worker(rank, *args)` in gloo processes on loopback."""
    torch.multiprocessing.spawn(run_rank, args=(ranks, free_port(), worker, args), nprocs=ranks)


def run_rank(rank: int, ranks: int, port: int, worker: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    try:
        worker(rank, *args)
    finally:
        torch.distributed.destroy_process_group()


def train_under_ddp(rank: int, folder: Path) -> None:
    """Trains with an empty bank, then with banks of a different length per rank, then in evaluation in between."""
    for variant in VARIANTS:
        # Different weights per rank to begin with: DDP sends those of rank 0.
        model = create(variant, seed=rank)
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            train_step(parallel, optimizer, seed=10 * step + rank)
        fill(model, size=5 + 3 * rank, seed=rank)
        own_bank = {name: tensor.clone() for name, tensor in model.memory_bank.state_dict().items()}
        with torch.no_grad():
            assert torch.isfinite(parallel.eval()(random_images(seed=rank))).all()
        for step in range(2, 4):
            train_step(parallel, optimizer, seed=10 * step + rank)
        # Its own bank, and not rank 0's.
        remembered = model.memory_bank.state_dict()
        assert all(torch.equal(remembered[name], own_bank[name]) for name in own_bank)
        # A loss on the read reaches DDP because it passes through forward.
        readout = parallel(random_images(seed=rank), return_readout=True)
        (readout.logits.sum() + readout.weights.square().sum()).backward()
        torch.save(dict(model.named_parameters()), folder / f"{variant}-{rank}.pt")


def one_step(model: torch.nn.Module, images: Tensor, memory: Tensor) -> None:
    F.cross_entropy(model(images, memory=memory), torch.arange(len(images)) % CLASSES).backward()


def gradients_under_ddp(rank: int, folder: Path) -> None:
    model = create("memwrap")
    parallel = DistributedDataParallel(model)
    # In evaluation mode, where batch norm leaves the samples of a rank independent of each other.
    one_step(parallel.eval(), random_images(8)[4 * rank : 4 * rank + 4], random_images(5, seed=3))
    torch.save({name: p.grad for name, p in model.named_parameters()}, folder / f"gradients-{rank}.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_distributed_data_parallel_keeps_ranks_equal_and_banks_apart(tmp_path: Path) -> None:
    spawn(train_under_ddp, tmp_path)
    for variant in VARIANTS:
        first, second = (torch.load(tmp_path / f"{variant}-{rank}.pt") for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        started = dict(create(variant, seed=0).named_parameters())
        assert any(not torch.equal(first[name], started[name]) for name in first)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_distributed_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    """With the memory given, samples do not read each other, so the mean over ranks is the whole batch's gradient."""
    spawn(gradients_under_ddp, tmp_path)
    model = create("memwrap")
    one_step(model, random_images(8), random_images(5, seed=3))
    for rank in range(2):
        gradients = torch.load(tmp_path / f"gradients-{rank}.pt")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture
def compiled() -> Callable[[Any], Any]:
    torch._dynamo.reset()
    return lambda model: torch.compile(model, fullgraph=True, backend="eager")


@each_variant
def test_compile_in_training(variant: str, compiled: Callable[[Any], Any]) -> None:
    model = create(variant)
    other = copy.deepcopy(model)
    images = random_images()
    logits = [one.train()(images) for one in (compiled(model), other)]
    torch.testing.assert_close(*logits)
    for one in logits:
        one.sum().backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@each_variant
def test_compile_in_evaluation(variant: str, compiled: Callable[[Any], Any]) -> None:
    model = fill(create(variant))
    images = random_images()
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(images), model(images))


@each_variant
def test_compile_with_images_as_memory(variant: str, compiled: Callable[[Any], Any]) -> None:
    model = create(variant)
    images, memory = random_images(), random_images(5, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(images, memory=memory), model(images, memory=memory))


def test_compiled_model_sees_a_new_bank(compiled: Callable[[Any], Any]) -> None:
    model = fill(create())
    fast, images = compiled(model), random_images()
    with torch.no_grad():
        fast(images)
        fill(model, size=20, seed=9)
        torch.testing.assert_close(fast(images), model(images))


@pytest.mark.parametrize("variant", ["memwrap", "evidence", "logits"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("given", ["nothing", "images", "encodings", "images, some hidden"])
def test_compile_with_each_argument(variant: str, given: str, training: bool) -> None:
    """The same outputs and gradients from one graph, through the compiler's own backward pass."""
    torch._dynamo.reset()
    model = fill(create(variant)).train(training)
    other = copy.deepcopy(model)
    arguments: dict[str, Any] = {}
    if given.startswith("images"):
        arguments["memory"] = random_images(5, seed=3)
    if given == "encodings":
        arguments["memory"] = torch.randn(5, model.encoding_size)
    if given.endswith("hidden"):
        hidden = torch.zeros(6, 5, dtype=torch.bool)
        hidden[0, :2] = hidden[3] = True
        arguments["hidden"] = hidden
    results = []
    for one in (torch.compile(model, fullgraph=True, backend="aot_eager"), other):
        readout = one(random_images(), return_readout=True, **arguments)
        (readout.logits.square().sum() + readout.weights.square().sum()).backward()
        results.append(readout)
    ours, theirs = results
    # Eager evaluation leaves out the columns in which no input reads a sample.
    support = theirs.weights.shape[1]
    torch.testing.assert_close(ours.weights[:, :support], theirs.weights)
    assert not ours.weights[:, support:].any()
    torch.testing.assert_close(ours.logits, theirs.logits)
    read = theirs.weights > 0
    assert torch.equal(ours.positions[:, :support][read], theirs.positions[read])
    torch.testing.assert_close(ours.similarities[:, :support][read], theirs.similarities[read])
    for mine, parameter in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, parameter.grad)


def test_compile_a_vote(compiled: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("memwrap_baseline_test_resnet", num_classes=CLASSES, classifier="vote")
    fill(model.eval())
    images = random_images()
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(images), model(images))


@each_variant
def test_compile_with_an_empty_memory(
    variant: str, compiled: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Not even the warning breaks the graph."""
    model = create(variant)
    images = random_images()
    with torch.no_grad():
        expected = copy.deepcopy(model)(images)
        caplog.clear()
        torch.testing.assert_close(compiled(model)(images), expected)
    assert "The memory is empty" in caplog.text


@each_variant
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_the_model_itself(variant: str, strict: bool, tmp_path: Path) -> None:
    """Without timm_memwrap.exporting: the model traces as it is, for a batch of any size."""
    model = fill(create(variant))
    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad():
        program = torch.export.export(model, (random_images(2),), dynamic_shapes=(batch,), strict=strict)
        torch.export.save(program, tmp_path / "model.pt2")
        exported = torch.export.load(tmp_path / "model.pt2").module()
        for size in (1, 5):
            torch.testing.assert_close(exported(random_images(size)), model(random_images(size)))


@each_variant
def test_a_model_without_classes_is_traced_as_its_backbone_is(variant: str) -> None:
    """torch.fx hands every optional argument of `forward` over as a proxy, in place of its default."""
    name, kwargs = VARIANTS[variant]
    model, images = timm.create_model(name, num_classes=0, **kwargs).eval(), random_images()
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(torch.fx.symbolic_trace(model)(images), expected)
        extractor = create_feature_extractor(model, ["backbone.layer2.0.add", "backbone.global_pool.flatten"])
        block, pooled = extractor.eval()(images).values()
        assert block.ndim == 4
        assert torch.equal(pooled, expected)


@pytest.mark.parametrize(
    ("backbone", "output_fmt"),
    [("swin_tiny_patch4_window7_224", "NHWC"), ("test_mambaout", "NHWC"), ("test_vit", None)],
)
@pytest.mark.parametrize("prefix", ["memwrap_", "memwrap_evidence_"])
def test_the_layout_of_features_is_the_backbones(prefix: str, backbone: str, output_fmt: str | None) -> None:
    with torch.device("meta"), without_values():
        model, plain = (timm.create_model(name, num_classes=CLASSES) for name in (prefix + backbone, backbone))
    assert getattr(model, "output_fmt", None) == getattr(plain, "output_fmt", None)
    assert hasattr(model, "output_fmt") == hasattr(plain, "output_fmt")
    if output_fmt is not None:
        assert model.output_fmt == output_fmt
