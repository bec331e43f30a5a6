"""Memory Wrap for timm and the Hugging Face Hub: image classifiers that show their evidence.

Importing the package registers `memwrap_<name>`, `memwrap_baseline_<name>` and `memwrap_evidence_<name>` for timm's
architectures.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from timm_memwrap.factory import register_backbones as register_backbones
from timm_memwrap.layers import BaselineMemory as BaselineMemory
from timm_memwrap.layers import MemoryWrapLayer as MemoryWrapLayer
from timm_memwrap.memory_bank import MemoryBank as MemoryBank
from timm_memwrap.model import MemoryWrapModel as MemoryWrapModel
from timm_memwrap.readouts import MemoryReadout as MemoryReadout
from timm_memwrap.wrapping import wrap as wrap

if TYPE_CHECKING:
    from timm_memwrap.building import build_memory_bank as build_memory_bank
    from timm_memwrap.explaining import calibrate as calibrate
    from timm_memwrap.explaining import explain as explain
    from timm_memwrap.hub import from_pretrained as from_pretrained
    from timm_memwrap.hub import push_memory_bank as push_memory_bank
    from timm_memwrap.hub import push_memory_images as push_memory_images
    from timm_memwrap.hub import push_to_hub as push_to_hub
    from timm_memwrap.hub import save_pretrained as save_pretrained
    from timm_memwrap.remembering import forget as forget
    from timm_memwrap.remembering import relabel as relabel
    from timm_memwrap.remembering import remember as remember
    from timm_memwrap.streaming import stream_memory as stream_memory

__version__ = "0.1.0"

__all__ = [
    "BaselineMemory",
    "MemoryBank",
    "MemoryReadout",
    "MemoryWrapLayer",
    "MemoryWrapModel",
    "build_memory_bank",
    "calibrate",
    "explain",
    "forget",
    "from_pretrained",
    "push_memory_bank",
    "push_memory_images",
    "push_to_hub",
    "register_backbones",
    "relabel",
    "remember",
    "save_pretrained",
    "stream_memory",
    "wrap",
]

# Imported at first use: together they take as long as the registration, and creating a model needs none of them.
_LAZY = {
    "build_memory_bank": "building",
    "calibrate": "explaining",
    "explain": "explaining",
    "forget": "remembering",
    "from_pretrained": "hub",
    "push_memory_bank": "hub",
    "push_memory_images": "hub",
    "push_to_hub": "hub",
    "relabel": "remembering",
    "remember": "remembering",
    "save_pretrained": "hub",
    "stream_memory": "streaming",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    return value


def _bind(name: str) -> None:
    """Makes a function of a higher room a method of the model as well, which itself knows nothing of it."""

    def method(self: MemoryWrapModel, *args: Any, **kwargs: Any) -> Any:
        return __getattr__(name)(self, *args, **kwargs)

    method.__name__, method.__qualname__ = name, f"MemoryWrapModel.{name}"
    method.__doc__ = f"Calls `timm_memwrap.{name}` with this model."
    setattr(MemoryWrapModel, name, method)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


for _name in ("save_pretrained", "push_to_hub", "remember", "forget", "relabel"):
    _bind(_name)
register_backbones()
