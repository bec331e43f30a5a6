"""What timm's own `tests/test_models.py` asserts of its models, asserted of ours.

The cases are all `test_*` models of timm, and of every timm module file without one the model of fewest parameters.
Input sizes are small where the model allows. Every architecture is built and run in `test_sweep.py`.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import timm
import timm.optim
import torch
from timm.layers import get_channel_dim, get_spatial_dim
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules, group_parameters
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from timm_memwrap import MemoryWrapModel, build_memory_bank
from timm_memwrap.checks import without_values
from timm_memwrap.constants import BASELINE_PREFIX, EVIDENCE_PREFIX, PREFIX

NUM_CLASSES = 42
TARGET_SIZE = 96
PREFIXES = (PREFIX, BASELINE_PREFIX, EVIDENCE_PREFIX)

# Of each module file of timm, the model of fewest parameters; a smaller depth where that one is still large.
SMALLEST: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", {"depth": 2}),
    "byoanet": ("halonet_h1", {}),
    "byobnet": ("test_byobnet", {}),
    "cait": ("cait_xxs24_224", {"depth": 4}),
    "coat": ("coat_tiny", {}),
    "convit": ("convit_tiny", {}),
    "convmixer": ("convmixer_768_32", {}),
    "convnext": ("test_convnext", {}),
    "cpubone": ("cpubone_nano", {}),
    "crossvit": ("crossvit_tiny_240", {}),
    "csatv2": ("csatv2", {}),
    "cspnet": ("cs3darknet_focus_s", {}),
    "cspnext": ("cspnext_tiny", {}),
    "davit": ("davit_tiny", {}),
    "deepseek_vit": ("deepseek_vit_412m", {"depth": 2}),
    "deit": ("deit_tiny_patch16_224", {}),
    "densenet": ("densenet121", {}),
    "dla": ("dla46x_c", {}),
    "dpn": ("dpn48b", {}),
    "edgenext": ("edgenext_xx_small", {}),
    "efficientformer": ("efficientformer_l1", {}),
    "efficientformer_v2": ("efficientformerv2_s0", {}),
    "efficientnet": ("test_efficientnet", {}),
    "efficientvim": ("efficientvim_m1", {}),
    "efficientvit_mit": ("efficientvit_b0", {}),
    "efficientvit_msra": ("efficientvit_m0", {}),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", {}),
    "fasternet": ("fasternet_t0", {}),
    "fastvit": ("fastvit_t8", {}),
    "focalnet": ("focalnet_tiny_srf", {}),
    "gcvit": ("gcvit_xxtiny", {}),
    "gemma4_vit": ("gemma4_vit_167m", {"depth": 2}),
    "ghostnet": ("ghostnet_050", {}),
    "hardcorenas": ("hardcorenas_b", {}),
    "hgnet": ("hgnetv2_b0", {}),
    "hiera": ("hiera_tiny_224", {}),
    "hieradet_sam2": ("sam2_hiera_tiny", {}),
    "hrnet": ("hrnet_w18_small", {}),
    "iformer": ("iformer_t", {}),
    "inception_next": ("inception_next_atto", {}),
    "inception_resnet_v2": ("inception_resnet_v2", {}),
    "inception_v3": ("inception_v3", {}),
    "inception_v4": ("inception_v4", {}),
    "lcnetv2": ("lcnetv2_small", {}),
    "levit": ("levit_128s", {}),
    "lowformer": ("lowformer_b0", {}),
    "mambaout": ("test_mambaout", {}),
    "maxxvit": ("test_coatnet", {}),
    "metaformer": ("poolformerv2_s12", {}),
    "mlp_mixer": ("gmlp_ti16_224", {}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
    "mobilenetv5": ("mobilenetv5_base", {}),
    "mobilevit": ("mobilevit_xxs", {}),
    "mvitv2": ("mvitv2_tiny", {}),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", {"depth": 2}),
    "nasnet": ("nasnetalarge", {}),
    "nest": ("nest_tiny", {}),
    "nextvit": ("nextvit_small", {}),
    "nfnet": ("test_nfnet", {}),
    "pit": ("pit_ti_224", {}),
    "pnasnet": ("pnasnet5large", {}),
    "pvt_v2": ("pvt_v2_b0", {}),
    "qwen3_vit": ("qwen3_vit_88m", {"depth": 2}),
    "rdnet": ("rdnet_tiny", {}),
    "regnet": ("regnetx_002", {}),
    "repghost": ("repghostnet_050", {}),
    "repvit": ("repvit_m1", {}),
    "res2net": ("res2next50", {}),
    "resnest": ("resnest14d", {}),
    "resnet": ("test_resnet", {}),
    "resnetv2": ("resnetv2_18", {}),
    "rexnet": ("rexnet_100", {}),
    "selecsls": ("selecsls42", {}),
    "senet": ("legacy_seresnet18", {}),
    "sequencer": ("sequencer2d_s", {}),
    "shvit": ("shvit_s1", {}),
    "sknet": ("skresnet18", {}),
    "starnet": ("starnet_s050", {}),
    "swiftformer": ("swiftformer_xs", {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", {}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", {}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", {}),
    "tiny_vit": ("tiny_vit_5m_224", {}),
    "tnt": ("tnt_s_legacy_patch16_224", {"depth": 4}),
    "tresnet": ("tresnet_m", {}),
    "twins": ("twins_svt_small", {}),
    "vgg": ("vgg11", {"mlp_ratio": 0.1}),
    "visformer": ("visformer_tiny", {}),
    "vision_transformer": ("test_vit", {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", {}),
    "vision_transformer_relpos": ("test_vit_relpos", {}),
    "vision_transformer_sam": ("samvit_base_patch16_224", {"depth": 2}),
    "vitamin": ("vitamin_small_224", {}),
    "volo": ("volo_d1_224", {}),
    "vovnet": ("ese_vovnet19b_slim_dw", {}),
    "xception": ("legacy_xception", {}),
    "xception_aligned": ("xception41", {}),
    "xcit": ("xcit_nano_12_p16_224", {}),
}


class Case(NamedTuple):
    prefix: str
    backbone: str
    args: dict[str, Any] = {}  # noqa: RUF012
    memory_args: dict[str, Any] = {}  # noqa: RUF012

    @property
    def name(self) -> str:
        return self.prefix + self.backbone

    def create(self, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        return timm.create_model(self.name, **{"num_classes": NUM_CLASSES, **self.args, **self.memory_args, **kwargs})

    def create_with(self, state_dict: dict[str, Tensor], **kwargs: Any) -> Any:
        """Creates a model whose head can be run with these weights, without initialising others first."""
        with torch.device("meta"), without_values():
            model = self.create(**kwargs).eval()
        model.load_state_dict(state_dict, assign=True)
        return model

    def create_plain(self, **kwargs: Any) -> Any:
        """Creates the backbone on the meta device, which is enough for names and shapes."""
        with torch.device("meta"), without_values():
            return timm.create_model(self.backbone, **{"num_classes": NUM_CLASSES, **self.args, **kwargs})

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.memory_args.items())])


TEST_CASES = [
    *(Case(prefix, name) for name in timm.list_models("test_*") for prefix in PREFIXES),
    Case(PREFIX, "test_vit", memory_args={"read_head": "identity", "classifier": "linear"}),
    Case(EVIDENCE_PREFIX, "test_resnet", memory_args={"read_head": "logits"}),
    Case(EVIDENCE_PREFIX, "test_vit", memory_args={"read_head": "logits"}),
    Case(EVIDENCE_PREFIX, "test_efficientnet", memory_args={"read_head": "logits"}),
    Case(EVIDENCE_PREFIX, "test_resnet", memory_args={"read_head": "pre_logits"}),
    Case(EVIDENCE_PREFIX, "test_vit", memory_args={"read_head": "pre_logits"}),
    # Their logits are not an affine function of their pre-logits: two heads, other features, an MLP.
    Case(EVIDENCE_PREFIX, "crossvit_tiny_240"),
    Case(EVIDENCE_PREFIX, "volo_d1_224"),
]
FAMILY_CASES = [Case(PREFIX, *entry) for entry in SMALLEST.values() if not entry[0].startswith("test_")]
CASES = [*TEST_CASES, *FAMILY_CASES]


@pytest.fixture(scope="module")
def created() -> dict[str, Any]:
    """Holds the model of one case at a time: the tests of a case follow each other."""
    return {}


@pytest.fixture
def shared(case: Case, created: dict[str, Any]) -> Any:
    """Returns the case's model in evaluation mode, not to be changed."""
    if created.get("case") != case:
        created.clear()
        created.update(case=case, model=case.create().eval())
    return created["model"]


@pytest.fixture
def model(shared: Any) -> Any:
    """Returns a copy of the case's model, in evaluation mode."""
    return copy.deepcopy(shared)


@pytest.fixture
def last(shared: Any, created: dict[str, Any]) -> Iterator[Any]:
    """Returns the case's model for good: the next test gets a new one."""
    yield shared
    created.clear()


@pytest.fixture
def plain(case: Case, shared: Any, created: dict[str, Any]) -> Any:
    """Returns the case's backbone as timm alone makes it, on the meta device, not to be changed."""
    if "plain" not in created:
        created["plain"] = case.create_plain()
    return created["plain"]


def input_size(model: Any, target: int = TARGET_SIZE) -> tuple[int, int, int]:
    """Returns the smallest input size that timm tests a model with: sizes that are fixed stay."""
    cfg = model.pretrained_cfg
    size = cfg["input_size"]
    if cfg.get("fixed_input_size") or max(size) <= target:
        return size
    return cfg.get("min_input_size") or tuple(min(side, target) for side in size)


def images(model: Any, batch_size: int = 1) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch_size, *input_size(model))


def outcome(action: Callable[[], Any]) -> Any:
    """Returns what `action` returns, or the type of what it raises: what a backbone refuses, its wrapper refuses."""
    try:
        return action()
    except Exception as error:
        return type(error)


def assert_same_outcome(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, type):
        assert actual is expected
    else:
        torch.testing.assert_close(actual, expected)


def for_each(cases: list[Case]) -> pytest.MarkDecorator:
    params = [pytest.param(case, marks=pytest.mark.slow) if _is_repetition(case) else case for case in cases]
    return pytest.mark.parametrize("case", params, ids=str, scope="module")


def _is_repetition(case: Case) -> bool:
    """Returns whether another case differs in the paper's layer alone, of which timm's contract knows nothing."""
    return case.prefix == BASELINE_PREFIX and case.backbone not in ("test_resnet", "test_vit", "test_convnext")


def test_table_covers_every_timm_module() -> None:
    modules = timm.models._registry._model_to_module
    of_backbones = {modules[name] for name in modules if not name.startswith(PREFIXES) and f"memwrap_{name}" in modules}
    assert set(SMALLEST) == of_backbones
    assert {module: modules[name] for module, (name, _) in SMALLEST.items()} == {module: module for module in SMALLEST}


@for_each(CASES)
class TestEveryModuleFile:
    @torch.no_grad()
    def test_forward(self, case: Case, shared: Any) -> None:
        x = images(shared)
        assert isinstance(shared, MemoryWrapModel)
        logits = shared(x)
        assert logits.shape == (1, NUM_CLASSES)
        assert torch.isfinite(logits).all()

    def test_gradient_checkpointing_changes_no_output(self, case: Case, shared: Any) -> None:
        refused = outcome(shared.backbone.set_grad_checkpointing)
        if isinstance(refused, type):
            with pytest.raises(refused):
                shared.set_grad_checkpointing()
            return
        x = images(shared)
        # With gradient, so that there is something to recompute.
        outputs = []
        for enabled in (True, False):
            shared.set_grad_checkpointing(enabled)
            outputs.append(shared.encode(x))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)

    def test_default_cfg_names_real_parameters(self, case: Case, shared: Any) -> None:
        cfg, state_dict = shared.default_cfg, shared.state_dict()
        assert shared.pretrained_cfg["num_classes"] >= 0
        assert cfg["architecture"] == case.name
        for names in (cfg["classifier"], cfg["first_conv"]):
            for name in (names,) if isinstance(names, str) else names:
                assert f"{name}.weight" in state_dict
        if case.prefix == EVIDENCE_PREFIX:
            assert shared.get_classifier() is shared.backbone.get_classifier()
        else:
            assert shared.get_classifier() is shared.get_submodule(cfg["classifier"])

    @torch.no_grad()
    def test_features_pre_logits_and_reset_classifier(self, case: Case, model: Any, plain: Any) -> None:
        x = images(model)
        features = model.forward_features(x)

        def head(of: Any) -> Any:
            return of.forward_head(copy.deepcopy(features))

        # Features in several tensors, as of CrossViT or NaFlexViT, have no shape that timm tests.
        if isinstance(features, Tensor):
            layout = getattr(model.backbone, "output_fmt", "NCHW")
            channel = get_channel_dim(layout) if features.ndim == 4 else -1
            assert features.shape[channel] == model.num_features
        pre_logits = model.forward_head(copy.deepcopy(features), pre_logits=True)
        assert pre_logits.shape == (1, model.head_hidden_size)
        torch.testing.assert_close(head(model), model(x))

        model.reset_classifier(5)
        assert head(model).shape == (1, 5)

        model.reset_classifier(0)
        assert model.num_classes == 0
        assert isinstance(model.get_classifier(), nn.Identity)
        torch.testing.assert_close(model(x), pre_logits)

        bare = case.create_with(model.state_dict(), num_classes=0)
        assert bare.num_classes == 0
        assert not list(bare.head.parameters())
        torch.testing.assert_close(head(bare), pre_logits)

        # Without pooling too, by a reset and from the start, wherever the backbone can do without.
        refused = outcome(lambda: model.reset_classifier(0, ""))
        assert refused is None or refused is outcome(lambda: copy.deepcopy(plain).reset_classifier(0, ""))
        unpooled = outcome(lambda: case.create_with(model.state_dict(), num_classes=0, global_pool=""))
        if isinstance(unpooled, type):
            assert outcome(lambda: case.create_plain(num_classes=0, global_pool="")) is unpooled
        else:
            assert_same_outcome(outcome(lambda: head(unpooled)), outcome(lambda: head(model)))

    @torch.no_grad()
    def test_features_only(self, case: Case, shared: Any) -> None:
        plain = outcome(lambda: case.create_plain(features_only=True))
        if isinstance(plain, type):
            with pytest.raises(plain):
                case.create(features_only=True)
            return
        extractor = case.create(features_only=True).eval()
        assert type(extractor) is type(plain)
        channels, reductions = extractor.feature_info.channels(), extractor.feature_info.reduction()
        assert (channels, reductions) == (plain.feature_info.channels(), plain.feature_info.reduction())
        x = images(shared)
        layout = getattr(extractor, "output_fmt", "NCHW")
        assert_feature_maps(extractor(x), x, channels, reductions, layout)

    @torch.no_grad()
    def test_forward_intermediates(self, case: Case, shared: Any) -> None:
        if not hasattr(shared.backbone, "forward_intermediates"):
            assert not hasattr(shared, "forward_intermediates")
            return
        info = FeatureInfo(shared.feature_info, len(shared.feature_info))
        x = images(shared)
        last, maps = shared.forward_intermediates(x, output_fmt="NCHW")
        assert_feature_maps(maps, x, info.channels(), info.reduction(), "NCHW")
        features = shared.forward_features(x)
        if isinstance(features, Tensor):
            torch.testing.assert_close(last, features)

    def test_layer_decay(self, case: Case, shared: Any, plain: Any) -> None:
        if not hasattr(plain, "group_matcher"):
            # timm then groups the layers as they come.
            assert not hasattr(shared, "group_matcher")
            assert timm.optim.create_optimizer_v2(shared, opt="adamw", layer_decay=0.7).param_groups
            return
        ids, expected = (group_parameters(m, m.group_matcher(), reverse=True) for m in (shared, plain))
        own = {name: layer_id for name, layer_id in ids.items() if name.startswith("backbone.")}
        assert own == {name: expected[name.removeprefix("backbone.")] for name in own}
        # A few backbones put their own head into their last block's group; ours, which they do not know, follows it.
        assert {ids[name] for name in set(ids) - set(own)} <= {max(expected.values()), max(own.values()) + 1}
        assert max(ids.values()) == max([ids[name] for name in set(ids) - set(own)], default=max(own.values()))
        optimizer = timm.optim.create_optimizer_v2(shared, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.7)
        scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
        assert set(scale) == {id(parameter) for parameter in shared.parameters() if parameter.requires_grad}
        head = [scale[id(parameter)] for parameter in shared.head.parameters()]
        assert set(head) <= {1.0}
        assert min(scale.values()) < 1.0

    def test_optional_capabilities_are_those_of_the_backbone(self, case: Case, shared: Any, plain: Any) -> None:
        for name in (
            "forward_intermediates",
            "set_grad_checkpointing",
            "group_matcher",
            "no_weight_decay",
            "prune_intermediate_layers",
            "set_input_size",
            "feature_info",
        ):
            assert hasattr(shared, name) == hasattr(plain, name), name
        names = set(dict(shared.named_parameters()))
        if hasattr(plain, "no_weight_decay"):
            assert shared.no_weight_decay() == {f"backbone.{name}" for name in plain.no_weight_decay()}
            assert shared.no_weight_decay() & names == {f"backbone.{name}" for name in plain.no_weight_decay()} & names
        if hasattr(plain, "feature_info"):
            modules = dict(shared.named_modules())
            plain_modules = dict(plain.named_modules())
            for ours, theirs in zip(entries(shared), entries(plain), strict=True):
                assert {**ours, "module": ""} == {**theirs, "module": ""}
                # Some of timm's own entries name no module.
                if theirs.get("module") and theirs["module"] in plain_modules:
                    assert ours["module"] in modules

    def test_backward_gives_every_parameter_a_gradient(self, case: Case, last: Any) -> None:
        logits = last.train()(images(last, 2))
        assert logits.shape == (2, NUM_CLASSES)
        assert torch.isfinite(logits).all()
        logits.mean().backward()
        without = {name for name, parameter in last.named_parameters() if parameter.grad is None}
        # timm freezes what fuses EfficientViM's own heads while it has none.
        assert without == ({"backbone.weights"} if case.backbone.startswith("efficientvim") else set())
        assert not any(parameter.requires_grad for name, parameter in last.named_parameters() if name in without)


def traced(model: Any) -> Any:
    """Returns a model as a graph of `torch.fx`, as timm traces its own."""
    tracer_args = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    names = [nodes[-1] for nodes in get_graph_node_names(model, tracer_kwargs=tracer_args)]
    return create_feature_extractor(
        model, train_return_nodes=names[:1], eval_return_nodes=names[1:], tracer_kwargs=tracer_args
    )


@for_each(TEST_CASES)
class TestFx:
    @pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
    @torch.no_grad()
    def test_graph_computes_the_same(self, case: Case, model: Any, filled: bool) -> None:
        if filled:
            data = TensorDataset(images(model, 6), torch.arange(6))
            build_memory_bank(model, data, size=None, progress=False)
        x = images(model)
        expected = model(x)
        (logits,) = traced(model)(x).values()
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    def test_graph_trains_the_head(self, case: Case, model: Any) -> None:
        x = images(model, 3)
        copied = copy.deepcopy(model).train()
        torch.manual_seed(2)
        expected = copied(x)
        graph = traced(model).train()
        torch.manual_seed(2)
        (logits,) = graph(x).values()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        logits.mean().backward()
        graph_gradients = {name: parameter.grad for name, parameter in graph.named_parameters()}
        assert all(gradient is not None for gradient in graph_gradients.values())
        missing = dict(model.named_parameters()).keys() - graph_gradients.keys()
        # The backbone's own classifier is reached from inside the head, which a graph takes whole.
        own = f"{case.create_plain().pretrained_cfg['classifier']}." if case.prefix == EVIDENCE_PREFIX else " "
        assert all(name.startswith(f"backbone.{own}") for name in missing)


def entries(model: Any) -> list[dict[str, Any]]:
    info = model.feature_info
    return info.info if isinstance(info, FeatureInfo) else info


def assert_feature_maps(maps: Any, x: Tensor, channels: list[int], reductions: list[int], layout: str) -> None:
    assert len(maps) == len(channels)
    height, width = get_spatial_dim(layout)
    for feature_map, channel, reduction in zip(maps, channels, reductions, strict=True):
        assert feature_map.shape[0] == len(x)
        assert feature_map.shape[get_channel_dim(layout)] == channel
        assert feature_map.shape[height] <= math.ceil(x.shape[-2] / reduction) + 1
        assert feature_map.shape[width] <= math.ceil(x.shape[-1] / reduction) + 1
        assert torch.isfinite(feature_map).all()
