"""The command that exports a model to another format."""

__all__ = ["export"]


def export(
    source: str,
    out: str | None = None,
    format: str = "onnx",
    with_evidence: bool = False,
    top_k: int = 5,
) -> None:
    """Exports a model with its memory to one file that needs neither timm nor this package, and checks it.

    Args:
        source: A folder, or a repository, owner/name or owner/name@revision.
        out: File to write; null for the name of the source, in the working directory.
        format: onnx, or export for a .pt2 file of torch.export.
        with_evidence: Whether the file also gives the weights of the strongest samples, and their indices.
        top_k: How many samples with_evidence gives.
    """
    from timm_memwrap.exporting import default_path, export_model

    path = default_path(source, format) if out is None else out
    report = export_model(source, path, format, with_evidence=with_evidence, top_k=top_k)
    size = ", ".join(map(str, report.input_size))
    checked = "not checked" if report.difference is None else f"{report.difference:.1e} from the model at most"
    print(f"Exported {source} to {report.path}: {checked}.")
    print(f"  image [batch, {size}], of any batch size -> {', '.join(report.outputs)}")
