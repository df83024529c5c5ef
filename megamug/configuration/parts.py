"""The parts of a MUG: what their tensors depend on, and which of them another run's weights give."""

from __future__ import annotations

from megamug.configuration.counts import as_mug
from megamug.configuration.presets import FINE_TUNED
from megamug.configuration.sections import Config
from megamug.errors import UserError

# Of a MUG (a classifier and a segmenter have the first): keys of `model_identity` that their tensors depend on, beside
# model.kind.
PARTS = {
    "encoder": ("patch_size", "layers", "width", "heads", "ffn_width", "register_tokens"),
    "image_decoder": ("patch_size", "width", "decoder_layers", "decoder_width", "decoder_heads",
                      "decoder_register_tokens"),
    "text_decoder": ("width", "text_unimodal_layers", "text_multimodal_layers", "text_width", "text_heads",
                     "tie_vocabulary", "text_objective"),
}  # fmt: skip


def initial_parts(config: Config) -> tuple[str, ...]:
    """The parts that `model.initial` gives, for each of which this model has a place. Raises UserError."""
    parts = config.model.initial_parts
    if parts is None:
        return ()
    if config.model.initial is None:
        raise UserError("model.initial_parts is set and model.initial is not; say whose parts they are, or leave it"
                        " out")  # fmt: skip
    model = as_mug(config).model
    own = {"encoder": True, "image_decoder": model.image_loss_weight > 0,
           "text_decoder": model.caption_loss_weight > 0}  # fmt: skip
    for part in parts:
        if part not in own:
            raise UserError(f"model.initial_parts: there is no part {part!r}; there are {', '.join(own)}")
        if not own[part]:
            kind = config.model.kind
            why = f"it is a {kind}" if kind in FINE_TUNED else "its loss weight is 0"
            raise UserError(f"model.initial_parts: this model has no {part} ({why}); leave it out")
    if not parts or len(set(parts)) < len(parts):
        raise UserError("model.initial_parts: name each part once, at least one; null takes all of them")
    return tuple(parts)
