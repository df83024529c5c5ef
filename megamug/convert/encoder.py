"""An image encoder read from another library's file or folder, whatever format it is in, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from megamug.configuration.sections import Config
from megamug.convert.conversion import compare_fixed, configure
from megamug.convert.formats import Format, View
from megamug.convert.registry import FORMATS
from megamug.convert.source import ForeignTensors
from megamug.convert.vision import classifier
from megamug.errors import UserError

# Beginnings of names (as the formats' tables spell them) that are no part of an encoder.
OTHERS = ("decoder", "mask_token", "head.", "classifier.", "pooler.")


def foreign_encoder(path: str | Path) -> tuple[Config, Callable[[str], Tensor], list[str]]:
    """(what a run of it would be configured as, what reads one of its tensors by megamug's global name, remarks on what
    the file does not tell).

    Raises UserError: no file, a damaged one, of no format with an image encoder, an encoder that megamug does not
    compute (see `megamug convert`), learned positions.
    """
    source = ForeignTensors(path)
    form = _format(source)
    try:
        view = View(source, form.canonical)
        config = configure(form, view, [], [])
        rows = [row for row in form.rows(config, ()) if row.ours.startswith("encoder.")]
        if "fc_norm.weight" in view and "norm.weight" not in view:  # a classifier by the mean of the patches
            config.model.kind, config.classifier.pool = "classifier", "mean"
            rows = classifier.with_norm_of_the_mean(rows, config, "fc_norm")
        fixed = {name: make for name, make in form.fixed(config).items() if not name.startswith(OTHERS)}
        known = {name for row in rows for name in row.theirs} | fixed.keys()
        missing = [name for row in rows for name in row.theirs if name not in view]
        unknown = [name for name in view.actual if name not in known and not name.startswith(OTHERS)]
        for what, names in (("lacks", missing), ("holds what the encoder would not use,", unknown)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise UserError(f"taken as {form.name} it {what} {', '.join(names[:3])}{more}")
        view.remarks += compare_fixed(view, fixed, [])
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    by_name = {row.ours: row for row in rows}

    def read(name: str) -> Tensor:
        row = by_name[name]
        return row.piece.join(*(view.read(theirs) for theirs in row.theirs))

    return config, read, view.remarks


def _format(source: ForeignTensors) -> Format:
    """By config.json, else by the names of the tensors."""
    kind = (source.config or {}).get("model_type")
    if isinstance(kind, str):
        found = {"vit": "hf_vit", "vit_mae": "hf_vitmae"}.get(kind)
        if found is None:
            raise UserError(f"{source.path}: its config.json says model_type {kind!r}; encoders of vit and vit_mae are"
                            " read")  # fmt: skip
        if found == "hf_vitmae" and not any(name.startswith("decoder") for name in source.names):
            found = "hf_vit"  # saved alone it has ViT's names
        return FORMATS[found]
    if "patch_embed.proj.weight" in source.names:
        decoder = any(name.startswith("decoder") for name in source.names)
        return FORMATS["mae" if decoder else "timm"]
    raise UserError(
        f"{source.path} holds no image encoder that is known: neither a run folder nor a vision transformer of timm,"
        " transformers or MAE"
    )
