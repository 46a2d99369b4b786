"""Quantized checkpoints in transformers: the quantizer behind ``from_pretrained``, and :func:`load`.

transformers has a quantizer of its own for VPTQ, which since version 5 loads no checkpoint; this one takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from octavo import formats, parallel
from octavo._core.errors import FormatError, ResourceError, UsageError
from octavo.formats import CONFIG_FILE, CheckpointReader, HeadLayout, Quantized, Stored, native
from octavo.formats.reader import listing
from octavo.heads import VQHead
from octavo.kernels import select
from octavo.layout import Layout
from octavo.models import quantized
from octavo.nn import TiedEmbedding, VQEmbedding, VQLinear, is_offloaded

Decode = Literal["auto", "dense", "packed"]
#: Styles of transformers' tensor-parallel plans, which speak of the transposed matrix.
_SPLITS = {
    **dict.fromkeys(("colwise", "colwise_rep", "colwise_gather_output"), parallel.ROWS),
    **dict.fromkeys(("rowwise", "rowwise_rep", "rowwise_split_input"), parallel.COLUMNS),
}


def register() -> None:
    """Put the quantizer into transformers' tables for every format that Octavo reads; a second call does nothing."""
    for name in formats.registry:
        AUTO_QUANTIZATION_CONFIG_MAPPING[name] = OctavoConfig
        AUTO_QUANTIZER_MAPPING[name] = OctavoQuantizer


class OctavoConfig(QuantizationConfigMixin):
    """``quantization_config`` of a quantized checkpoint; its attributes are exactly the keys in config.json.

    Raises:
        FormatError: an unknown format version or key.
    """

    def __init__(self, /, **raw: Any) -> None:
        raw.setdefault("quant_method", native.QUANT_METHOD)
        formats.format_of(raw, CONFIG_FILE).check_config(raw, CONFIG_FILE)
        self.__dict__.update(raw)


class OctavoQuantizer(HfQuantizer):
    """Replaces the layers that config.json lists by VQLinear and refuses every checkpoint that does not fit."""

    requires_calibration = True
    quantization_config: OctavoConfig

    def __init__(self, quantization_config: OctavoConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._matrices: dict[str, Stored] = {}
        self._stored: frozenset[str] = frozenset()
        self._transposed: set[str] = set()
        #: Matrices of which every rank keeps a part: of the rows (0) or the columns (1).
        self._split: dict[str, int] = {}
        self._head: HeadLayout | None = None

    @property
    def is_trainable(self) -> bool:
        """Indices cannot be trained, and centroids are not."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Layers are single operators in a graph, so ``generate`` may compile with a static cache."""
        return True

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the same tensors again, bit for bit; not from ranks that hold parts of them."""
        return not self._split

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Tensors of quantized matrices are never cast, not even by a model's keep-in-float32 list."""
        targets = getattr(converter, "target_patterns", None) or [""]
        return None if targets[0] in self._stored else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        raw = self.quantization_config.to_dict()
        if checkpoint_files:
            folder = Path(checkpoint_files[0]).parent
            config = quantized.check(folder, raw)
        elif raw["quant_method"] == native.QUANT_METHOD:
            folder, config = None, native.parse_config(raw, CONFIG_FILE)
        else:
            raise UsageError("a VPTQ model is loaded from its folder; without one its layers are not known.")
        self._matrices, self._stored = config.matrices, frozenset(config.tensors())
        self._head = config.head
        parts = config.head.matrices if config.head else ()
        for name, matrix in config.matrices.items():
            if name in parts:
                continue
            old = _layer_at(model, name, matrix.layout)
            if isinstance(old, Conv1D):
                self._transposed.add(name)
            if not isinstance(matrix, native.NativeMatrix):
                stand_in: nn.Module = _AsStored(matrix)
            else:
                kind = VQEmbedding if isinstance(old, nn.Embedding) else VQLinear
                stand_in = kind(matrix.layout, device="meta")
            if f"{name}.weight" in _tied(model):
                _tie(model, name, stand_in, set(config.matrices))
            model.set_submodule(name, stand_in)
        if config.head is not None:
            _put_head(model, config.head, config.layouts)
        self._split = _split_by_plan(model, self._matrices)
        if folder is not None:
            from octavo.models.names import match_names

            match_names(model, CheckpointReader(folder))
        self._become_native(model, config)

    def _become_native(self, model: Any, config: Quantized) -> None:
        """``save_pretrained`` writes what is in memory: layouts and their tensors."""
        native_config = native.quantization_config(config.layouts, config.method, config.details, config.head)
        if native_config != config.raw:
            self.quantization_config = model.config.quantization_config = OctavoConfig(**native_config)
            model.quantization_method = native.QUANT_METHOD

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        # transformers marks what it loaded and fills the rest with random numbers; offloaded tensors are on "meta".
        random = [
            name
            for name, tensor in model.state_dict(keep_vars=True).items()
            if tensor.device.type != "meta" and not getattr(tensor, "_is_hf_initialized", False)
        ]
        if random:
            raise FormatError(f"{type(model).__name__}: {listing(random)} were not in the checkpoint. Fetch it again.")
        for name, matrix in self._matrices.items():
            module = model.get_submodule(name)
            if is_offloaded(module) and not isinstance(module, VQLinear):
                raise UsageError(
                    f"{name} was offloaded with its buffers, which only Octavo's own format can be. Convert the model "
                    "first: octavo convert FOLDER NEW_FOLDER --to octavo"
                )
            tensors = {key: _loaded(model, f"{name}.{key}") for key in matrix.tensors()}
            lost = [key for key, tensor in tensors.items() if tensor.device.type == "meta"]
            if lost:
                raise FormatError(f"{name}: {listing(lost)} were not loaded from the checkpoint.")
            weight = matrix.decode(tensors, name)
            weight.validate(name)
            if not isinstance(module, VQLinear):
                layer = VQLinear.from_weight(weight).train(module.training)
                if hasattr(module, "_hf_hook"):
                    from accelerate.hooks import add_hook_to_module

                    # It was given to the module that was there while the model was spread over devices.
                    add_hook_to_module(layer, module._hf_hook)  # type: ignore[arg-type]
                model.set_submodule(name, layer)
        if self._head is not None:
            module = model.get_submodule(self._head.module)
            lost = [key for key in self._head.tensors() if module.get_buffer(key).device.type == "meta"]
            if lost:
                raise FormatError(f"{self._head.module}: {listing(lost)} were not loaded from the checkpoint.")
            module.validate(self._head.module)

        for name, dim in self._split.items():
            mesh, layer = model._mesh_manager.get_mesh("tp"), model.get_submodule(name)
            layer.hold(parallel.shard(layer.vq_weight(), dim, mesh.get_local_rank(), mesh.size()))
        for name, embedding in model.named_modules():
            if isinstance(embedding, TiedEmbedding) and is_offloaded(embedding.head):
                raise UsageError(
                    f"{name} looks its rows up in the output head, which was offloaded and is not there then. Give the "
                    "head a device in device_map, such as 'lm_head': 'cpu'."
                )

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        if self._split:
            raise UsageError("a model whose matrices are split over ranks cannot be decoded; keep it packed.")
        kinds = VQLinear | VQHead
        heads = {name: module for name, module in model.named_modules() if isinstance(module, VQHead)}
        parts = {part for head in heads.values() for part in head.parts}
        layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and m not in parts}
        tied = {name: module for name, module in model.named_modules() if isinstance(module, TiedEmbedding)}
        for name, layer in layers.items():
            if any(buffer.device.type == "meta" for buffer in layer.buffers()):
                raise ResourceError(f"{name} is offloaded and cannot be decoded there. Load with decode='packed'.")
            dense = layer.densify(dtype)
            model.set_submodule(name, _as_conv1d(dense) if name in self._transposed else dense)
        for name, embedding in tied.items():
            head = next(other for other, layer in layers.items() if layer is embedding.head)
            model.set_submodule(name, embedding.densify(model.get_submodule(head)))
            model.all_tied_weights_keys = {f"{head}.weight": f"{name}.weight"}
        return model


def _split_by_plan(model: Any, matrices: Mapping[str, Stored]) -> dict[str, int]:
    """The matrices that the model's tensor-parallel plan splits, if it is loaded on several ranks, and along what.

    Quantized embeddings, heads that are embeddings as well, and heads of several parts are taken out of the plan: each
    rank has them whole.

    Raises:
        UsageError: a matrix that cannot be split in this way.
    """
    config = getattr(model.config, "distributed_config", None)
    if config is None or (config.tp_size or 1) == 1:
        return {}
    plan: dict[str, str] = model.tp_plan
    for name, module in model.named_modules():
        if isinstance(module, VQEmbedding | TiedEmbedding | VQHead):
            plan.pop(replace_layer_number_by_wildcard(name), None)
    tied = {id(module.head) for module in model.modules() if isinstance(module, TiedEmbedding)}
    split: dict[str, int] = {}
    for name, matrix in matrices.items():
        key, module = replace_layer_number_by_wildcard(name), model.get_submodule(name)
        if id(module) in tied:
            plan.pop(key, None)
        if (style := plan.get(key)) is None:
            continue
        where = f"{name} cannot be split over {config.tp_size} ranks"
        if style not in _SPLITS:
            raise UsageError(f"{where}: the plan says {style!r}, which is not known for quantized matrices.")
        if not isinstance(module, VQLinear):
            raise UsageError(f"{where} from this format. Convert it: octavo convert FOLDER NEW_FOLDER --to octavo")
        if reason := parallel.why_not(matrix.layout, _SPLITS[style], config.tp_size):
            raise UsageError(f"{where}: {reason}.")
        # For transformers: inputs and outputs are the rank's own tensors.
        module._hf_quantized_needs_local_tp = True  # type: ignore[assignment]
        split[name] = _SPLITS[style]
    return split


def _loaded(model: Any, name: str) -> Tensor:
    """A tensor of the checkpoint; from where it was offloaded to, if it was. On ``meta`` if it is nowhere."""
    tensor: Tensor = model.get_buffer(name)
    if tensor.device.type == "meta" and is_offloaded(model.get_submodule(name.rpartition(".")[0])):
        with suppress(KeyError, ValueError):
            return load_offloaded_parameter(model, name)
    return tensor


class _AsStored(nn.Module):
    """Takes the place of a linear layer while a checkpoint is loaded: its buffers are named as the file names them."""

    def __init__(self, matrix: Stored) -> None:
        super().__init__()
        # Models initialise layers by these names (GPT-2 its c_proj), but leave alone what has the mark.
        self.weight = torch.empty(matrix.layout.shape, device="meta")
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        self.register_buffer("bias", None)
        for name, (dtype, shape) in matrix.tensors().items():
            *parents, leaf = name.split(".")
            owner: nn.Module = self
            for parent in parents:
                if parent not in owner._modules:
                    owner.add_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
            owner.register_buffer(leaf, torch.empty(shape, dtype=dtype, device="meta"))


def load(
    path: str | Path,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    decode: Decode = "auto",
    *,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a checkpoint folder - Octavo's, VPTQ's or an original one - as a transformers model in evaluation mode.

    Args:
        path: the folder (or anything else that ``octavo quantize`` takes as MODEL, which is then fetched or converted).
        dtype: of everything that is not quantized and of the computation; None takes the one in config.json.
        device_map: as in ``from_pretrained``; None is the CPU.
        decode: ``packed`` keeps the matrices quantized; ``dense`` decodes each once into an ordinary linear layer,
            which costs the memory of the original model; ``auto`` is dense where a matrix has no fast kernel on the
            CPU.
        trust_remote_code: run the code that comes with the model.

    Returns:
        (model, tokenizer); ``model.octavo_decode`` says what was done: ``packed``, ``dense`` or ``original``.

    Raises:
        FormatError: no such folder, no model in it, or a checkpoint that is damaged, incomplete or of another version.
        UsageError: an unknown ``dtype`` or ``decode``.
    """
    if decode not in ("auto", "dense", "packed"):
        raise UsageError(f"decode wanted 'auto', 'dense' or 'packed', got {decode!r}.")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UsageError(f"dtype wanted a torch dtype such as 'bfloat16', got {dtype!r}.")
    folder = _folder(path, trust_remote_code)
    is_quantized = formats.is_quantized(folder)
    if is_quantized:
        quantized.check(folder, trust_remote_code=trust_remote_code)
    else:
        CheckpointReader(folder)
    raw = formats.raw_config(folder) if is_quantized else None
    is_native = raw is not None and raw["quant_method"] == native.QUANT_METHOD
    register()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            device_map=device_map,
            offload_buffers=is_native,  # Quantized matrices are buffers; VPTQ's are made anew after loading.
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **local,
        )
        model, report = loaded
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(f"{folder}: transformers cannot load this model: {error}") from error
    for kind in ("missing", "mismatched"):
        if report[f"{kind}_keys"]:
            names = [key if isinstance(key, str) else key[0] for key in report[f"{kind}_keys"]]
            raise FormatError(f"{folder}: tensors that {type(model).__name__} needs are {kind}: {listing(names)}.")
    on_cpu = {tensor.device.type for tensor in model.parameters()} == {"cpu"}
    if not is_quantized:
        model.octavo_decode = "original"
    elif decode == "dense" or (decode == "auto" and on_cpu and not _all_fast(model)):
        model = model.dequantize()
        model.octavo_decode = "dense"
    else:
        model.octavo_decode = "packed"
    return model, tokenizer


def _all_fast(model: nn.Module) -> bool:
    """Whether every quantized matrix has a kernel that somebody would choose."""
    device = torch.device("cpu")
    layouts = {module.layout for module in model.modules() if isinstance(module, VQLinear)}
    return not any(select.registry.get(select.choose(layout, device)[0]).slow for layout in layouts)


def _folder(path: str | Path, trust_remote_code: bool) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    from octavo.models.source import resolve

    return resolve(path, trust_remote_code=trust_remote_code).folder


def _layer_at(model: Any, name: str, layout: Layout) -> nn.Module:
    """The linear layer or embedding that a quantized matrix replaces; its shape must fit."""
    try:
        old = model.get_submodule(name)
    except AttributeError:
        raise FormatError(
            f"{type(model).__name__} has no module {name}, which {CONFIG_FILE} lists as quantized. "
            "Load it with AutoModelForCausalLM; if that is what you did, config.json is of another model."
        ) from None
    if isinstance(old, Conv1D):
        shape = (old.nf, old.nx)
    elif isinstance(old, nn.Linear):
        shape = (old.out_features, old.in_features)
    elif type(old) is nn.Embedding:
        shape = (old.num_embeddings, old.embedding_dim)
        if reason := layout.why_no_rows():
            raise FormatError(f"{name} is an embedding, whose rows cannot be looked up in a matrix with {reason}.")
    else:
        raise FormatError(f"{name} is a {type(old).__name__} in {type(model).__name__}; a linear layer is wanted.")
    if shape != layout.shape:
        raise FormatError(f"{name} is {shape} in {type(model).__name__}, its layout in {CONFIG_FILE} {layout.shape}.")
    if getattr(old, "bias", None) is not None and not layout.bias:
        raise FormatError(f"{name} has a bias in {type(model).__name__}, but the checkpoint stores none.")
    return old


def _put_head(model: Any, layout: HeadLayout, layouts: Mapping[str, Layout]) -> None:
    """Put a head of several parts in its place; the embedding looks its rows up there if they are tied and it has any.

    Raises:
        FormatError: the model has another head.
    """
    old = model.get_output_embeddings()
    shape = tuple(getattr(getattr(old, "weight", None), "shape", ()))
    paths = [path for path, module in model.named_modules() if module is old]
    if layout.module not in paths or shape != (layout.tokens, layout.width) or getattr(old, "bias", None) is not None:
        raise FormatError(
            f"{CONFIG_FILE} wants a head {layout.module} of {layout.tokens} x {layout.width} without bias; "
            f"{type(model).__name__} has {', '.join(paths) or 'none'} of {list(shape)}."
        )
    head = VQHead(layout, {name: layouts[f"{layout.module}.{name}"] for name in layout.parts}, device="meta")
    if f"{layout.module}.weight" in _tied(model):
        if layout.parts:
            _tie(model, layout.module, head, set(layouts))
        else:
            # Codewords are no embedding: that stays as it was.
            model.all_tied_weights_keys = {}
    model.set_submodule(layout.module, head)


def _tied(model: Any) -> set[str]:
    return {*model.all_tied_weights_keys.keys(), *model.all_tied_weights_keys.values()}


def _tie(model: Any, name: str, head: nn.Module, quantized: set[str]) -> None:
    """Let the embedding look its rows up in the layer ``head``, which is about to be the model's module ``name``.

    Raises:
        FormatError: something else is tied to the matrix, or the embedding is among the ``quantized`` modules as well.
    """
    embedding = model.get_input_embeddings()
    paths = [path for path, module in model.named_modules() if module is embedding]
    if set(paths) & quantized and name in quantized - set(paths):
        raise FormatError(f"{name} and {paths[0]} are quantized, each for itself, but {CONFIG_FILE} ties them.")
    both = {f"{name}.weight", f"{paths[0]}.weight"} if paths else set()
    is_head = model.get_output_embeddings() is model.get_submodule(name)
    fits = is_head and both == _tied(model) and type(embedding) is nn.Embedding
    if not fits or not isinstance(head, VQLinear | VQHead):
        raise FormatError(
            f"{name} is quantized but {CONFIG_FILE} ties it; only an output head may be, and to the embedding alone."
        )
    for part in head.parts if isinstance(head, VQHead) else [head]:
        if reason := part.layout.why_no_rows():
            raise FormatError(f"{name} is the embedding as well, whose rows cannot be looked up with {reason}.")
    model.set_submodule(paths[0], TiedEmbedding(head))  # type: ignore[arg-type]
    # There are no two parameters any more that transformers could tie.
    model.all_tied_weights_keys = {}


def _as_conv1d(dense: nn.Linear) -> Conv1D:
    """The same layer as GPT-2 has it, so that a decoded model saves to the checkpoint that its class expects."""
    with torch.device("meta"):
        layer = Conv1D(dense.out_features, dense.in_features)
    layer.weight = nn.Parameter(dense.weight.t().contiguous(), requires_grad=False)
    layer.bias = dense.bias
    return layer.train(dense.training)


register()
