"""Which tensor of the checkpoint belongs to which parameter of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from octavo._core.errors import FormatError, UsageError
from octavo.formats.reader import DTYPES, CheckpointReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Buffers that old versions of transformers saved and that models compute themselves.
_HARMLESS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|rotary_pos_emb\.inv_freq"
    r"|(attn|attention|self_attention)\.(bias|masked_bias|rope\.freqs)|embeddings\.position_ids)$"
)


def match_names(model: PreTrainedModel, reader: CheckpointReader) -> dict[str, str]:
    """Tensor of the model -> tensor of the checkpoint, for every parameter and persistent buffer.

    Names agree exactly, or but for the base model's prefix, or after transformers' own renamings; a tied tensor that
    the checkpoint leaves out is represented by its partner.

    Raises:
        FormatError: tensors without counterpart on either side, of another shape, or not of a float dtype.
        UsageError: the checkpoint needs transformers' weight conversions (experts stored one by one, for example).
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sources: dict[str, str] = {}
    unmatched: list[str] = []
    for stored in reader.names():
        name = _plain_match(stored, wanted, model.base_model_prefix)
        if name is None:
            unmatched.append(stored)
        else:
            _assign(sources, name, stored, reader)
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unmatched = [n for n in unmatched if not _HARMLESS.search(n) and not any(p.search(n) for p in ignored)]
    if unmatched:
        unmatched = _match_renamed(model, unmatched, wanted, sources, reader)
    for name, partner in _ties(model):
        if name not in sources and partner in sources:
            sources[name] = sources[partner]
    missing = sorted(wanted.keys() - sources.keys())
    if missing or unmatched:
        raise FormatError(
            f"{reader.folder}: the checkpoint and {type(model).__name__} do not fit: "
            f"{len(missing)} tensors of the model are missing ({_some(missing)}), {len(unmatched)} tensors of the "
            f"checkpoint belong to nothing ({_some(unmatched)}). Do config.json and the weights come from one model?"
        )
    parameters = dict(model.named_parameters())
    for name, stored in sources.items():
        dtype, shape = reader.info(stored)
        if tuple(shape) != wanted[name]:
            raise FormatError(
                f"{reader.folder}: {stored} has shape {list(shape)}, but config.json makes it {list(wanted[name])}."
            )
        if name in parameters and not _is_plain_float(dtype):
            raise UsageError(
                f"{reader.folder}: {stored} is stored as {dtype}: the model is quantized already. "
                "Pass the original in float32, bfloat16 or float16."
            )
    return sources


def _plain_match(stored: str, wanted: dict[str, tuple[int, ...]], prefix: str) -> str | None:
    for name in (stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}.")):
        if name in wanted:
            return name
    return None


def _assign(sources: dict[str, str], name: str, stored: str, reader: CheckpointReader) -> None:
    if name in sources:
        raise FormatError(f"{reader.folder}: {sources[name]} and {stored} both claim to be {name}.")
    sources[name] = stored


def _match_renamed(
    model: PreTrainedModel,
    unmatched: list[str],
    wanted: dict[str, tuple[int, ...]],
    sources: dict[str, str],
    reader: CheckpointReader,
) -> list[str]:
    """Apply transformers' table of renamed tensors; returns the names that still belong to nothing."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    left: list[str] = []
    converted: list[str] = []
    state = model.state_dict()
    for stored in unmatched:
        name, conversion = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        if conversion is not None:
            converted.append(stored)
        elif name in wanted:
            _assign(sources, name, stored, reader)
        else:
            left.append(stored)
    if converted:
        raise UsageError(
            f"{reader.folder}: {len(converted)} tensors ({_some(converted)}) are stored otherwise than "
            f"{type(model).__name__} holds them; transformers fuses or splits them while loading. Octavo streams "
            "tensors as they are and does not support such models (mixtures of experts, mostly) yet."
        )
    return left


def _ties(model: PreTrainedModel) -> Iterable[tuple[str, str]]:
    """Pairs (name, partner) of tensors that share their values, in both directions."""
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        yield target, source
        yield source, target


def _is_plain_float(dtype: str) -> bool:
    return DTYPES[dtype].is_floating_point and DTYPES[dtype].itemsize >= 2


def _some(names: list[str], limit: int = 5) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + rest
