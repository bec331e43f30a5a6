"""Finds the base of a memory that is saved or pushed alone, and pins what it is now."""

import hashlib
import os
from pathlib import Path

from timm_memwrap.bases import Base
from timm_memwrap.constants import CONFIG_FILE, WEIGHTS_FILE
from timm_memwrap.hub.client import check_repo_id, hub_api
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.tensor_files import FileError
from timm_memwrap.whole_model import read_base, split_revision

__all__ = ["find_base"]


def find_base(
    model: MemoryWrapModel, base_model: str | None = None, token: str | bool | None = None, *, public: bool = True
) -> Base:
    """Returns where the weights of a model are from, at the commit and with the hash that they have now.

    Args:
        model: The model. Whether its weights are those is seen when it is written.
        base_model: `"owner/name"`, `"owner/name@revision"`, `"local-dir:..."` or a safetensors file; `None` for what
            the model was loaded from.
        token: As in `push_to_hub`.
        public: Whether others must find them too: not what only this machine has.

    Raises:
        ValueError: If nothing says where they are from.
        OSError: `huggingface_hub`'s own, if the Hub does not give them.
    """
    if base_model is None:
        cfg = model.pretrained_cfg
        known = read_base(Path(cfg["file"], CONFIG_FILE)) if cfg.get("source") == "local-dir" else None
        if known is not None and (known.kind == "hf_hub_id" or not public):
            return known
        local = f"local-dir:{cfg['file']}" if cfg.get("source") == "local-dir" else cfg.get("file")
        base_model = (None if public else local) or (None if local else cfg.get("hf_hub_id")) or model.base_model
    if not base_model:
        raise ValueError(
            "No repository is known to have the model's weights. Pass base_model='owner/name' with one that has, or "
            "push the whole model with timm_memwrap.push_to_hub."
        )
    base_model = str(base_model).removeprefix("hf-hub:")
    if public and (base_model.startswith("local-dir:") or os.path.exists(base_model)):
        raise ValueError(f"base_model={base_model!r} is on this machine only. Push it first, and pass its repo id.")
    if base_model.startswith("local-dir:"):
        folder = Path(base_model.removeprefix("local-dir:")).expanduser().resolve()
        return Base("local_dir", str(folder), _sha256(folder / WEIGHTS_FILE))
    if os.path.isfile(base_model):
        return Base("file", str(Path(base_model).resolve()), _sha256(Path(base_model)))
    repo_id, revision = split_revision(base_model)
    check_repo_id(repo_id)
    api = hub_api(token)
    info = api.model_info(repo_id, revision=revision)
    files = {sibling.rfilename for sibling in info.siblings or []}
    if CONFIG_FILE in files:
        # A memory for the same weights has the same base.
        known = read_base(Path(api.hf_hub_download(repo_id, CONFIG_FILE, revision=info.sha)))
        if known is not None:
            return known
    if WEIGHTS_FILE not in files:
        raise FileError(
            f"{repo_id!r} has no {WEIGHTS_FILE}, and so cannot be the base of a memory. Pass another base_model, or "
            f"push the whole model with timm_memwrap.push_to_hub."
        )
    path = Path(api.hf_hub_download(repo_id, WEIGHTS_FILE, revision=info.sha))
    return Base("hf_hub_id", info.id, _sha256(path), str(info.sha))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
