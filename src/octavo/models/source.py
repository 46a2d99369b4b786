"""MODEL as the user writes it (folder, hub id or .gguf file) to a local Hugging Face folder that is fit to be read."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from octavo._core.errors import FormatError, UsageError, did_you_mean
from octavo._core.io import read_json
from octavo.formats.reader import PICKLED
from octavo.models import gguf

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Small files that belong to a model besides its weights and config.json.
_AUXILIARY = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template.*",
    "processor_config.json",
    "preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)
_SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model", "*.py", "LICENSE*", "NOTICE*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelSource:
    """An original model on the local disk.

    Attributes:
        folder: config.json, safetensors shards and tokenizer files.
        name: how the model is called in reports; never a path.
        config: the transformers configuration.
        trust_remote_code: the user allowed the model's own Python files to run.
    """

    folder: Path
    name: str
    config: PretrainedConfig
    trust_remote_code: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, as the configuration says; float32 where it says nothing."""
        # Multimodal models may say it for their text part alone.
        found = self.config.dtype or self.config.get_text_config().dtype
        found = getattr(torch, found, None) if isinstance(found, str) else found
        return found if isinstance(found, torch.dtype) else torch.float32

    def auxiliary_files(self) -> list[Path]:
        """Tokenizer, chat template, generation defaults and licences, and the model's code if it is trusted; sorted."""
        patterns = (*_AUXILIARY, "*.py") if self.trust_remote_code else _AUXILIARY
        found = {path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(path for path in found if not path.name.endswith((".safetensors", *PICKLED)))


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    work: Path | None = None,
) -> ModelSource:
    """Find the model and check that its folder can be used; no weight is read.

    Args:
        model: local folder, hub id such as ``org/name``, or a .gguf file, which is converted once.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: let the Python files of the model run.
        work: folder for the converted .gguf; the user's cache folder if None.

    Raises:
        UsageError: nothing is there, the hub cannot be reached or refuses, or the model needs code that is not trusted.
        FormatError: a folder or file that is no complete safetensors model.
    """
    text = os.fspath(model)
    if not text.strip():
        raise UsageError("MODEL is empty; wanted a local folder, a hub id such as org/name, or a .gguf file.")
    path = Path(text).expanduser()
    if path.exists() and revision is not None:
        raise UsageError(f"revision {revision!r} was given, but {path} is local; revisions exist on the hub only.")
    if path.is_dir():
        return _open(path, path.resolve().name, trust_remote_code)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UsageError(
                f"{path} is a file of an unknown kind. MODEL is a folder with config.json and safetensors weights, a "
                f"hub id, or a .gguf file.{' Pass its folder.' if path.suffix == '.safetensors' else ''}"
            )
        return _open(gguf.convert(path, work), path.stem, trust_remote_code=False)
    if isinstance(model, Path) or not _HUB_ID.fullmatch(text) or path.suffix.lower() == ".gguf":
        raise UsageError(f"{path} does not exist.{_near_path(path)}")
    return _open(_download(text, revision, trust_remote_code), text, trust_remote_code)


def _near_path(path: Path) -> str:
    """A hint at a sibling with a similar name."""
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    try:
        siblings = [entry.name for entry in parent.iterdir()]
    except OSError:
        return ""
    return did_you_mean(path.name, siblings)


def _open(folder: Path, name: str, trust_remote_code: bool) -> ModelSource:
    raw = _raw_config(folder)
    _require_safetensors(folder)
    require_trust(folder, name, raw, trust_remote_code)
    from transformers import AutoConfig

    if "model_type" not in raw:
        raise FormatError(
            f"{folder / 'config.json'} has no model_type, so nobody can tell what network the weights belong to. "
            "Fetch the model's own config.json."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        import transformers

        raise FormatError(
            f"transformers {transformers.__version__} does not accept {folder / 'config.json'} (model_type "
            f"{raw['model_type']!r}): {str(error)[:400]}\nA newer transformers may know this model."
        ) from error
    return ModelSource(folder, name, config, trust_remote_code)


def _raw_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if path.exists():
        raw = read_json(path, "model configuration")
        if not isinstance(raw, dict):
            raise FormatError(f"{path}: a JSON object is wanted, got {type(raw).__name__}.")
        return raw
    names = sorted(entry.name for entry in folder.iterdir())
    if "adapter_config.json" in names:
        hint = "It is a LoRA adapter: merge it into its base model (peft: merge_and_unload, save_pretrained) first."
    elif any(name.endswith(".gguf") for name in names):
        hint = f"Pass the .gguf file itself: {folder / next(n for n in names if n.endswith('.gguf'))}"
    elif not names:
        hint = "The folder is empty."
    else:
        inside = [entry.name for entry in folder.iterdir() if (entry / "config.json").is_file()]
        hint = f"Did you mean {folder / inside[0]}?" if inside else f"It has: {', '.join(names[:8])}."
    raise FormatError(f"{folder} is no Hugging Face model: it has no config.json. {hint}")


def _require_safetensors(folder: Path) -> None:
    names = sorted(entry.name for entry in folder.iterdir())
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        raise FormatError(
            f"{folder} has its weights only as pickle ({', '.join(pickled[:3])}), which can run code while loading; "
            "Octavo does not read it. If you trust the file, convert it once: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), and pass NEW_FOLDER."
        )
    raise FormatError(
        f"{folder} has no .safetensors weights. It has: {', '.join(names[:8])}. Is the download complete?"
    )


def require_trust(folder: Path, name: str, raw: dict[str, Any], trust_remote_code: bool) -> None:
    """Refuse a model that only its own Python files can build, unless the user allowed them.

    Raises:
        UsageError: with the list of files.
    """
    auto_map = raw.get("auto_map")
    if trust_remote_code or not isinstance(auto_map, dict):
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if raw.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    references = [r for value in auto_map.values() for r in (value if isinstance(value, list) else [value]) if r]
    elsewhere = {str(r).split("--")[0] + " (another repository)" for r in references if "--" in str(r)}
    files = sorted({path.name for path in folder.glob("*.py")} | elsewhere)
    # The folder of a hub snapshot is named after its commit.
    commit = f" at revision {folder.name}" if folder.parent.name == "snapshots" else ""
    raise UsageError(
        f"{name}{commit} is not part of transformers and brings its own code, which would run on this machine: "
        f"{', '.join(files) or 'no Python file is in the folder'}. Read it; if you trust it, pass "
        "--trust-remote-code."
    )


def _download(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    """Fetch a hub model into the Hugging Face cache: small files first, so that refusals come before gigabytes."""
    from huggingface_hub import errors, snapshot_download

    ignored = ["*/*.json", "*/*.txt", "*/*.model", "*/*.py", "*/*.safetensors", "consolidated*", "README*"]
    local = _near_path(Path(name))
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_SMALL_FILES, ignore_patterns=ignored))
        require_trust(folder, name, _raw_config(folder), trust_remote_code)
        commit = folder.name if folder.parent.name == "snapshots" else revision
        snapshot_download(name, revision=commit, allow_patterns=["*.safetensors"], ignore_patterns=ignored)
        return folder
    except errors.GatedRepoError as error:
        raise UsageError(
            f"{name} is gated: accept its licence on its hub page, then set HF_TOKEN to a token of that account."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"{name!r} is neither a local folder nor a model on the hub.{local} A private model needs HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{name} has no revision {revision!r} on the hub.") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{name!r} is neither a local path nor a valid hub id: {error}") from error
    except (OSError, errors.EntryNotFoundError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise UsageError(
            f"{name!r} is no local folder,{local or ''} is not in the local Hugging Face cache, and {why}. "
            "Pass a folder that holds the model (config.json, *.safetensors, tokenizer files), or go online: unset "
            "HF_HUB_OFFLINE, and set HF_TOKEN if the model is gated or private. "
            f"Cause: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
