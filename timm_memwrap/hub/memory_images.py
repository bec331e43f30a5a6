"""Pushes the pictures of a memory to the Hugging Face Hub, as an image data set that the model then names."""

import logging
import tempfile
from collections.abc import Iterator
from math import isqrt
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, DatasetCard, DatasetCardData
from tqdm import tqdm

from timm_memwrap._utils import check_count, optional_import
from timm_memwrap.constants import CARD_FILE
from timm_memwrap.data import SampleImages, class_names
from timm_memwrap.hub.client import hub_api
from timm_memwrap.hub.image_tables import INDEX_FILE, MOST_PIXELS, encoded_image, features_of, key_of, write_tables
from timm_memwrap.hub.privacy import public_bank
from timm_memwrap.hub.pushing import prepare_repo, send_commit, with_owner
from timm_memwrap.memory_checks import check_memory
from timm_memwrap.model import MemoryWrapModel

__all__ = ["push_memory_images"]

_logger = logging.getLogger(__name__)

_TYPE = "dataset"
_TEXT = """# {title}

Pictures of the {count:,} samples that an image classifier with [Memory Wrap](https://arxiv.org/abs/2106.01440) has in
its memory, and predicts from. They are for people to look at: large ones were made smaller. Rows are in the order of
the memory, in which `id` names them.

```python
from datasets import load_dataset
samples = load_dataset("{repo_id}", split="train")
```

`{index}` tells where in the files each picture is, so that a figure of an explanation fetches only those that it shows.
"""


def push_memory_images(
    model: MemoryWrapModel,
    repo_id: str,
    dataset: Any,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Push pictures of the memory",
    max_size: int = 512,
    progress: bool = True,
) -> CommitInfo:
    """Pushes pictures of the memory's samples to the Hugging Face Hub, as an image data set, in one commit.

    The bank then names the data set and the commit (`model.memory_bank.provenance.image_dataset`), and keeps that when
    it is saved and pushed: figures and reports of the model fetch from it the pictures that they show. Samples that are
    remembered later have no picture there. `datasets.load_dataset` reads the data set, and the Hub's viewer shows it.

    Pictures are encoded again from their pixels: turned as EXIF says, and without EXIF or other metadata. Ids are
    those that `push_to_hub` publishes, in its order. Of a data set that this function pushed before, the text of the
    card is kept.

    Args:
        model: The model whose memory it is.
        repo_id: The data set, `"owner/name"` or the name of your own; made if it does not exist.
        dataset: Where to find the pictures by id: the data set that the bank was built from, or a mapping from id to
            image. Where it has a transform, that is applied, so pass it without one.
        token: As in `push_to_hub`, and so are `private`, `revision` and `create_pr`.
        private: See `token`.
        revision: See `token`.
        create_pr: See `token`.
        commit_message: First line of the commit.
        max_size: Most pixels of the longer side, up to 8192; larger pictures are made smaller.
        progress: Whether to show a progress bar.

    Returns:
        What `huggingface_hub` returns about the commit: its `oid`, `commit_url`, `pr_url`.

    Raises:
        ImportError: If pyarrow is not installed.
        ValueError: If the bank is empty, samples of it are not in `dataset`, a picture cannot be read, `repo_id` is not
            a valid repo id or a data set of something else, or `private=True` was asked for one that is public.
        OSError: `huggingface_hub`'s own, if the Hub refuses or cannot be reached. The data set is then as before, and
            so is the model.
    """
    check_memory(model)
    check_count("max_size", max_size)
    if max_size**2 > MOST_PIXELS:
        raise ValueError(f"max_size={max_size} is not valid. Pass at most {isqrt(MOST_PIXELS)}.")
    optional_import("pyarrow.parquet", extra="images", what="push_memory_images")
    api, bank = hub_api(token), model.memory_bank
    repo_id = with_owner(repo_id, api)
    encodings, labels = bank.filled()
    ids = public_bank(bank).ids
    features = features_of(ids, class_names(model), bank.multi_label)
    with tempfile.TemporaryDirectory(prefix="timm-memwrap-") as name:
        folder = Path(name)
        images = _images(model, dataset, max_size, progress)
        files = write_tables(folder, images, labels, ids, key_of(encodings), features)
        info = prepare_repo(api, repo_id, _TYPE, private, revision, create_pr)
        there = {sibling.rfilename for sibling in info.siblings or []}
        if INDEX_FILE not in there and (others := sorted(there - {".gitattributes", CARD_FILE})):
            raise ValueError(
                f"The data set {repo_id!r} exists and holds something else, e.g. {others[:3]}. Pass another name."
            )
        if not info.private:
            _logger.warning(
                "%s is public: the images of %d samples of the memory will be visible to everyone.",
                repo_id,
                len(bank),
            )
        card = None
        if CARD_FILE in there:
            card = Path(api.hf_hub_download(repo_id, CARD_FILE, repo_type=_TYPE, revision=info.sha)).read_text("utf-8")
        sizes = [file.stat().st_size for file in files[:-1]]
        files.append(_write_card(folder / CARD_FILE, card, repo_id, len(bank), sum(sizes), features))
        named = {file.relative_to(folder).as_posix(): file for file in files}
        old = sorted(path for path in there - named.keys() if path.startswith("data/"))
        operations = [CommitOperationAdd(path, file) for path, file in named.items()]
        removals = [CommitOperationDelete(path) for path in old]
        options = {"revision": revision, "create_pr": create_pr, "commit_message": commit_message}
        commit = send_commit(api, info, _TYPE, [*operations, *removals], **options)
    bank.set_provenance(image_dataset=f"{repo_id}@{commit.oid}")
    return commit


def _images(model: MemoryWrapModel, dataset: Any, max_size: int, progress: bool) -> Iterator[bytes]:
    """Yields the pictures of the memory's samples in order; raises a `ValueError` at the end if there are not all."""
    samples, ids = SampleImages(model, dataset), model.memory_bank.ids
    missing = []
    for sample_id in tqdm(ids, desc="Pictures", unit="img", disable=not progress):
        picture = samples.picture(sample_id)
        if picture is None:
            missing.append(sample_id)
        elif not missing:
            yield encoded_image(picture, max_size)
    if missing:
        raise ValueError(
            f"{len(missing):,} of the {len(ids):,} samples in the memory are not in {type(dataset).__name__}, or there "
            f"twice, the first {missing[0]!r}. Pass the data set that the bank was built from, or a mapping from id to "
            f"image."
        )


def _write_card(path: Path, there: str | None, repo_id: str, count: int, size: int, features: dict[str, Any]) -> Path:
    """Writes the card with what the viewer and `datasets` read of it; the text of one that is there is kept."""
    columns = [
        {"name": "image", "dtype": "image"},
        {"name": "label", **_label(features["label"])},
        {"name": "id", "dtype": features["id"]["dtype"]},
    ]
    split = {"name": "train", "num_bytes": size, "num_examples": count}
    metadata = {
        "task_categories": ["image-classification"],
        "dataset_info": {"features": columns, "splits": [split], "download_size": size, "dataset_size": size},
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    }
    if there is None:
        data = DatasetCardData(tags=["timm", "memory-wrap"], **metadata)  # type: ignore[arg-type]
        text = _TEXT.format(title=repo_id.split("/")[1], count=count, repo_id=repo_id, index=INDEX_FILE)
        card = DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    else:
        card = DatasetCard(there)
        for key, value in metadata.items():
            card.data[key] = value
    card.save(path)
    return path


def _label(feature: dict[str, Any]) -> dict[str, Any]:
    """Returns the type of the labels as a card has it."""
    if "feature" in feature:
        return {"sequence": _label(feature["feature"])["dtype"]}
    return {"dtype": {"class_label": {"names": {str(i): name for i, name in enumerate(feature["names"])}}}}
