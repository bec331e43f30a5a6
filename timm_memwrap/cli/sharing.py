"""The commands that hand a model on: to the Hugging Face Hub and back, or to another format."""

from typing import Any

from timm_memwrap import hub
from timm_memwrap.data import open_remembered
from timm_memwrap.exporting import default_path, export_model

__all__ = ["export", "inspect", "pull", "push"]


def push(
    folder: str,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    include_images: bool = False,
    overwrite_card: bool = False,
    memory_only: bool = False,
    images_to: str | None = None,
    memory_data: str | None = None,
) -> None:
    """Pushes a model with its memory, or the memory alone, from a folder to the Hugging Face Hub, in one commit.

    Log in first with `hf auth login`, or set HF_TOKEN.

    Args:
        folder: Folder that save_pretrained or pull wrote.
        repo_id: The repository, owner/name or the name of your own; created if it does not exist.
        private: Whether a new repository is private.
        revision: Branch to push to; created if it does not exist.
        create_pr: Whether to open a pull request instead.
        message: First line of the commit message.
        include_images: Whether to upload the images in the memory.
        overwrite_card: Whether to replace a README.md that the repository has by the folder's.
        memory_only: Whether to push the memory alone: to the repository that has the model, or to one of its own, which
            names the repository that its weights are from.
        images_to: Data set on the Hub to push pictures of the remembered images to first, owner/name; needs
            memory_data.
        memory_data: As in explain: what the memory was built from.
    """
    if (images_to is None) != (memory_data is None):
        raise ValueError("Pictures need both --images_to, where to push them, and --memory_data, where they are.")
    if images_to is not None and memory_data is not None:
        model = hub.from_pretrained(folder)
        commit = hub.push_memory_images(model, images_to, open_remembered(memory_data), private=private)
        hub.save_pretrained(model, folder)
        print(f"Pushed pictures of {len(model.memory_bank):,} remembered images: {commit.commit_url}")
    options: dict[str, Any] = {"private": private, "revision": revision, "create_pr": create_pr}
    options["include_images"] = include_images
    if message is not None:
        options["commit_message"] = message
    if memory_only:
        commit = hub.push_memory_bank(hub.from_pretrained(f"local-dir:{folder}"), repo_id, **options)
    else:
        commit = hub.push_folder(folder, repo_id, overwrite_card=overwrite_card, **options)
    pushed, branch = commit.repo_url.repo_id, commit.pr_revision or revision
    name = f"{pushed}@{branch}" if branch else pushed
    if commit.commit_message:
        print(f"Pushed {folder} to {pushed}: {commit.pr_url or commit.commit_url}")
    else:
        print(f"Nothing has changed since the last commit of {pushed}: {commit.commit_url}")
    print(f'Load it with timm.create_model("hf-hub:{name}", pretrained=True), after import timm_memwrap.')


def pull(repo_id: str, folder: str, overwrite: bool = False) -> None:
    """Downloads a model with its memory from the Hugging Face Hub to a folder, and checks it.

    Args:
        repo_id: The repository, owner/name or owner/name@revision.
        folder: Folder to write to; created if it does not exist.
        overwrite: Whether to replace a model in the folder.
    """
    path = hub.pull(repo_id, folder, overwrite=overwrite)
    print(f"Pulled {repo_id} to {path}: {', '.join(sorted(file.name for file in path.iterdir()))}")


def inspect(source: str) -> None:
    """Shows what a model in a folder or on the Hugging Face Hub is, and what it remembers.

    Args:
        source: A folder, or a repository, owner/name or owner/name@revision.
    """
    print(hub.summarize(source).report())


def export(
    source: str, out: str | None = None, format: str = "onnx", with_evidence: bool = False, top_k: int = 5
) -> None:
    """Exports a model with its memory to one file that needs neither timm nor this package, and checks it.

    Args:
        source: A folder, or a repository, owner/name or owner/name@revision.
        out: File to write; null for the name of the source, in the working directory.
        format: onnx, or export for a .pt2 file of torch.export.
        with_evidence: Whether the file also gives the weights of the strongest samples, and their indices.
        top_k: How many samples with_evidence gives.
    """
    path = default_path(source, format) if out is None else out
    report = export_model(source, path, format, with_evidence=with_evidence, top_k=top_k)
    size = ", ".join(map(str, report.input_size))
    checked = "not checked" if report.difference is None else f"{report.difference:.1e} from the model at most"
    print(f"Exported {source} to {report.path}: {checked}.")
    print(f"  image [batch, {size}], of any batch size -> {', '.join(report.outputs)}")
