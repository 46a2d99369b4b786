"""Damaged and hostile VPTQ folders: one FormatError that names matrix and folder, before anything large is read."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from formats.checkpoints import edit_json
from formats.vptq_folders import Entry, make_entry, make_tensors, quantization, write_folder
from octavo import formats
from octavo._core.errors import FormatError
from octavo.formats.reader import CheckpointReader

Q, PLAIN = "model.layers.0.q_proj", "model.layers.0.o_proj"
ENTRIES: dict[str, Entry] = {
    # Every tensor that there is: 26 inputs = 2 outliers + 2 groups of 12; rows of 12 * 7 bits in 3 words.
    Q: make_entry(
        22, groups=(2, 12), residual=8, outliers=(2, 4, 32), norm=True, permuted=True, bias=True, vector_length=6
    ),
    PLAIN: make_entry(22, groups=(1, 26)),
}
#: Looked at before the rest is loaded; one number for every input or less.
SMALL = ("perm", "outlier_indices")
Tensors = dict[str, dict[str, Tensor]]


class Case:
    """A good folder in parts, to be damaged and then written; ``read`` lists the tensors that were loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read: list[str] = []
        self.config: dict[str, Any] = json.loads(json.dumps(quantization(ENTRIES)))
        self.tensors: Tensors = {module: make_tensors(entry, 1) for module, entry in ENTRIES.items()}

    @property
    def q(self) -> dict[str, Any]:
        """The entry of the richer matrix."""
        return self.config["config_for_layers"][Q]

    def write(self) -> Path:
        return write_folder(self.path, self.tensors, self.config)

    def refused(self, words: str, *, names: str | None = Q, shapes: formats.Shapes | None = None) -> None:
        """``formats.check`` raises one error with these words, the folder and the module, and loads nothing large."""
        self.write()
        tracemalloc.start()
        try:
            with pytest.raises(FormatError, match=words) as caught:
                formats.check(self.path, shapes=shapes)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        text = str(caught.value)
        assert str(self.path) in text and (names or "") in text, text
        assert "\n" not in text and len(text) < 700, text
        assert all(name.endswith(SMALL) for name in self.read), self.read
        assert peak < 2_000_000


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A folder that is good as it stands."""
    made = Case(tmp_path / "x")
    original = CheckpointReader.read

    def spy(self: CheckpointReader, name: str) -> Tensor:
        made.read.append(name)
        return original(self, name)

    monkeypatch.setattr(CheckpointReader, "read", spy)
    return made


def test_the_folder_is_good_and_its_check_reads_only_permutation_and_outliers(case: Case) -> None:
    folder = case.write()
    assert formats.check(folder).matrices.keys() == ENTRIES.keys()
    assert sorted(case.read) == [f"{Q}.outlier_indices", f"{Q}.perm"]
    assert len(list(formats.read_weights(folder))) == 2


# ------------------------------------------------------------------------------------------------ tensors


def cut(name: str, dimension: int) -> Callable[[dict[str, Tensor]], None]:
    """Take the last of a tensor away along one dimension."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].narrow(dimension, 0, tensors[name].shape[dimension] - 1).contiguous()

    return change


def cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    """Store the numbers of a tensor in another dtype."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    return change


def rows_too_many(tensors: dict[str, Tensor]) -> None:
    tensors["indices"] = torch.cat([tensors["indices"]] * 2, dim=1)


def flattened(tensors: dict[str, Tensor]) -> None:
    tensors["indices"] = tensors["indices"].reshape(-1, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut("indices", 2), r"\.indices wanted torch.int32 \(2, 4, 3\) .* got torch.int32 \(2, 4, 2\)"),
        (cut("indices", 1), r"\.indices wanted .* got torch.int32 \(2, 3, 3\)"),
        (cut("indices", 0), r"\.indices wanted .* got torch.int32 \(1, 4, 3\)"),
        (rows_too_many, r"\.indices wanted .* got torch.int32 \(2, 8, 3\)"),
        (flattened, r"\.indices wanted .* got torch.int32 \(8, 3\)"),
        (cut("centroids.weight", 1), r"\.centroids.weight wanted torch.float16 \(2, 96\) .* \(2, 95\)"),
        (cut("res_centroids.weight", 0), r"\.res_centroids.weight wanted .* \(1, 48\)"),
        (cut("outlier_indices", 2), r"\.outlier_indices wanted torch.int16 \(1, 6, 2\) .* \(1, 6, 1\)"),
        (cut("outlier_centroids.weight", 1), r"\.outlier_centroids.weight wanted .* \(1, 127\)"),
        (cut("perm", 0), r"\.perm wanted torch.int16 \(26,\) .* \(25,\)"),
        (cut("weight_scale", 0), r"\.weight_scale wanted torch.float16 \(26,\) .* \(25,\)"),
        (cut("weight_bias", 0), r"\.weight_bias wanted"),
        (cut("bias", 0), r"\.bias wanted torch.float16 \(22,\)"),
        (cast("indices", torch.int64), r"\.indices wanted torch.int32 .* got torch.int64"),
        (cast("indices", torch.int16), r"\.indices wanted torch.int32 .* got torch.int16"),
        (cast("indices", torch.float32), r"\.indices wanted torch.int32 .* got torch.float32"),
        (cast("centroids.weight", torch.float64), r"\.centroids.weight wanted torch.float16 .* got torch.float64"),
        (cast("centroids.weight", torch.int8), r"\.centroids.weight wanted .* got torch.int8"),
        (cast("weight_scale", torch.float8_e4m3fn), r"\.weight_scale wanted .* got torch.float8_e4m3fn"),
        (cast("perm", torch.float16), r"\.perm wanted torch.int16 .* got torch.float16"),
        (cast("outlier_indices", torch.float32), r"\.outlier_indices wanted .* got torch.float32"),
        (cast("outlier_indices", torch.int64), r"\.outlier_indices wanted .* got torch.int64"),
    ],
)
def test_truncated_words_wrong_shapes_and_wrong_dtypes(
    case: Case, change: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    change(case.tensors[Q])
    case.refused(words)
    assert case.read == [], "headers alone tell"


@pytest.mark.parametrize("name", sorted(make_tensors(ENTRIES[Q])))
def test_every_missing_tensor_is_named(case: Case, name: str) -> None:
    del case.tensors[Q][name]
    if name == "bias":
        case.refused(r"tensor model\.layers\.0\.q_proj\.bias is missing")
    elif name == "indices":
        case.refused(r"lists model\.layers\.0\.q_proj as quantized, but no tensor .*\.indices is there")
    else:
        case.refused(rf"tensor model\.layers\.0\.q_proj\.{name} is missing. The checkpoint is incomplete")


@pytest.mark.parametrize("name", ["res_indices", "weight", "perm2", "centroids.bias", "codebook_0"])
def test_tensors_that_do_not_belong_there_are_named(case: Case, name: str) -> None:
    case.tensors[Q][name] = torch.zeros(3)
    case.refused(rf"q_proj\.{name} is unknown: the layout of model\.layers\.0\.q_proj in config\.json has no {name}")


def test_tensors_of_what_an_entry_denies_are_named(case: Case) -> None:
    case.q["enable_perm"] = False
    case.refused(r"q_proj\.perm is unknown")


def test_outlier_indices_of_an_unknown_module_are_named(case: Case) -> None:
    case.tensors["model.layers.9.up"] = {"outlier_indices": torch.zeros(2, dtype=torch.int16)}
    case.refused(r"layers\.9\.up\.outlier_indices belongs to a quantized matrix that", names="layers.9.up")


# ------------------------------------------------------------------------------------------------ contents


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("value", [0, 26, -1, 30_000])
def test_a_permutation_that_is_none_is_refused(case: Case, value: int, dtype: torch.dtype) -> None:
    perm = torch.arange(26, dtype=dtype)
    perm[13] = value
    case.tensors[Q]["perm"] = perm
    case.refused(r"q_proj\.perm is no permutation of 0\.\.25")


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.float16, torch.uint16])
def test_an_outlier_index_past_its_book_is_refused(case: Case, dtype: torch.dtype) -> None:
    indices = case.tensors[Q]["outlier_indices"]
    indices[0, 5, 1] = 32
    case.tensors[Q]["outlier_indices"] = indices.int() if dtype == torch.int32 else indices.view(dtype)
    case.refused(r"q_proj\.outlier_indices holds 32, but its codebook has 32 centroids")


def test_a_negative_outlier_index_is_refused(case: Case) -> None:
    case.tensors[Q]["outlier_indices"] = case.tensors[Q]["outlier_indices"].int()
    case.tensors[Q]["outlier_indices"][0, 0, 0] = -5
    case.refused(r"q_proj\.outlier_indices holds -5, but")


def refused_when_read(folder: Path, words: str) -> None:
    """The check of the headers passes; the error of the reading names module and folder."""
    formats.check(folder)
    with pytest.raises(FormatError, match=words) as caught:
        list(formats.read_weights(folder))
    assert str(folder) in str(caught.value) and Q in str(caught.value)


@pytest.mark.parametrize(("name", "limit"), [("indices", 16), ("res_indices", 8)])
@pytest.mark.parametrize("value", [0, 100, -1])
def test_an_unpacked_index_past_the_book_is_refused(case: Case, name: str, limit: int, value: int) -> None:
    entry = make_entry(22, groups=(2, 12), residual=8, packed=False)
    case.config["config_for_layers"][Q], case.tensors[Q] = entry, make_tensors(entry)
    case.tensors[Q][name][1, 0, 3] = value or limit
    refused_when_read(case.write(), rf"q_proj\.{name} holds {(value or limit) & 0xFFFF}, but its codebook has {limit}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    ["centroids.weight", "res_centroids.weight", "outlier_centroids.weight", "weight_scale", "weight_bias", "bias"],
)
def test_numbers_that_are_not_finite_are_refused_when_they_are_read(case: Case, name: str, value: float) -> None:
    case.tensors[Q][name].view(-1)[-1] = value
    layouts_name = {
        "centroids.weight": "codebook_0",
        "res_centroids.weight": "codebook_1",
        "outlier_centroids.weight": "outlier_codebook",
        "weight_scale": "channel_scale",
        "weight_bias": "channel_offset",
    }
    refused_when_read(case.write(), f"q_proj: {layouts_name.get(name, name)} holds NaN or infinity")


# ------------------------------------------------------------------------------------------------ entries


def test_a_matrix_without_an_entry_is_refused(case: Case) -> None:
    del case.config["config_for_layers"][Q]
    case.refused(r"has no entry for model\.layers\.0\.q_proj, neither by its path .* nor as 'q_proj'")


def test_entries_without_tensors_are_counted(case: Case) -> None:
    case.config["config_for_layers"] |= {"model.layers.7.up": ENTRIES[PLAIN], "model.layers.8.up": ENTRIES[PLAIN]}
    case.refused(r"lists model\.layers\.7\.up as quantized, but .* \(and 1 more like it\)", names="layers.7.up.indices")


def test_a_folder_without_any_quantized_matrix_is_refused(case: Case) -> None:
    case.tensors = {"lm_head": {"weight": torch.zeros(2, 2)}}
    case.config = quantization({"q_proj": ENTRIES[Q]}, "shared")
    case.refused(r"says VPTQ, but no quantized matrix \(\*\.indices\) is there", names=None)


@pytest.mark.parametrize(
    "key", ["in_features", "out_features", "vector_lens", "num_centroids", "group_num", "group_size"]
)
def test_an_entry_without_a_geometry_is_refused(case: Case, key: str) -> None:
    del case.q[key]
    case.refused(rf"q_proj has no {key} in its entry")


NO_SIZE = (0, -1, 1 << 62, 1 << 64, 10**40, 1.0, "8", True, None, [8], {})
BAD_ENTRIES: list[tuple[str, Any, str]] = [
    *(("in_features", value, "in_features wanted a whole number") for value in NO_SIZE),
    *(("out_features", value, "out_features wanted a whole number") for value in NO_SIZE),
    *(("group_num", value, "group_num wanted a whole number") for value in NO_SIZE),
    *(("group_size", value, "group_size wanted a whole number") for value in NO_SIZE),
    *(("outlier_size", value, "outlier_size wanted a whole number") for value in NO_SIZE if value != 0),
    # Sizes that could be, but not of these tensors.
    ("out_features", 1 << 24, r"indices wanted torch.int32 \(2, 2796203, 3\)"),
    ("out_features", 28, r"indices wanted torch.int32 \(2, 5, 3\)"),
    ("out_features", 23, r"bias wanted torch.float16 \(23,\)"),
    ("in_features", 1 << 24, "wanted in_features 16777216"),
    ("group_num", 3, "outlier_size 2 [+] group_num 3 x group_size 12 wanted in_features 26"),
    ("group_size", 13, "outlier_size 2 [+] group_num 2 x group_size 13 wanted in_features 26"),
    ("outlier_size", 0, "outlier_size 0 [+] group_num 2 x group_size 12 wanted in_features 26"),
    ("outlier_size", 26, "outlier_size 26"),
    *(("num_centroids", [32, size], r"num_centroids\[1\] wanted a power of two") for size in (300, 0, -16, 1, 1 << 20)),
    *(("num_centroids", [size, 16], r"num_centroids\[0\] wanted a power of two") for size in (300, 1, 1 << 17, 3)),
    *(("num_centroids", [size, 16], "2 outlier columns have no codebook") for size in (0, -1, -(10**9))),
    *(
        ("num_centroids", value, "num_centroids wanted two integers")
        for value in (16, "16", None, [], [16], [16, 16, 16], [16, "16"], [16, True], [16, None], [16, 16.0], {"0": 1})
    ),
    ("num_centroids", [32, 32], r"centroids.weight wanted torch.float16 \(2, 192\)"),
    ("num_centroids", [64, 16], r"outlier_centroids.weight wanted torch.float16 \(1, 256\)"),
    *(("num_res_centroids", [-1, size], r"num_res_centroids\[1\] wanted a power of two") for size in (1, 3, 1 << 20)),
    ("num_res_centroids", [-1, 1 << 62], r"num_res_centroids\[1\] wanted a power of two"),
    ("num_res_centroids", [4, 8], r"num_res_centroids\[0\] is 4; outliers have no residual"),
    *(
        ("num_res_centroids", value, "num_res_centroids wanted two integers")
        for value in (8, None, [8], "ab", [8, "8"])
    ),
    ("num_res_centroids", [-1, -1], r"indices wanted torch.int32 \(2, 4, 2\)"),
    *(("vector_lens", [4, v], r"vector_lens wanted 1\.\.16, got") for v in (0, -1, 17, 1 << 62)),
    *(("vector_lens", [v, 6], r"vector_lens wanted 1\.\.16, got") for v in (17, 1 << 62)),
    *(("vector_lens", [v, 6], "2 outlier columns have no codebook") for v in (1, 0, -1)),
    *(
        ("vector_lens", v, "vector_lens wanted two integers")
        for v in (6, "46", None, [6], [4, 6.0], [4, True], [[4, 6]])
    ),
    ("vector_lens", [4, 12], r"indices wanted torch.int32 \(2, 2, 3\)"),
    *(("enable_norm", value, "enable_norm wanted true or false") for value in (1, "yes", [], 0.0)),
    *(("enable_perm", value, "enable_perm wanted true or false") for value in (1, "no")),
    *(("is_indice_packed", value, "is_indice_packed wanted true or false") for value in (2, "true")),
    ("is_indice_packed", False, r"indices wanted torch.int16 \(2, 4, 12\)"),
    *(("bias", value, "bias wanted true or false") for value in (1, "x", [])),
    *(("norm_dim", value, "norm_dim wanted a whole number 0..1") for value in (2, -1, True, "0", None)),
    ("norm_dim", 1, r"weight_scale wanted torch.float16 \(22,\)"),
    *(("vector_quant_dim", value, "vector_quant_dim is .*; only 'out' is defined") for value in ("in", None, 3, [])),
    ("in_features", "x" * 100_000, "in_features wanted a whole number"),
    ("vector_lens", [0] * 100_000, "vector_lens wanted two integers"),
]


@pytest.mark.parametrize(
    ("key", "value", "words"), BAD_ENTRIES, ids=[f"{key}-{str(value)[:24]}" for key, value, _ in BAD_ENTRIES]
)
def test_an_impossible_entry_is_refused(case: Case, key: str, value: Any, words: str) -> None:
    case.q[key] = value
    case.refused(words)
    assert case.read == []


def test_the_widest_elements_of_all_are_refused_in_a_file_of_narrower_ones(case: Case) -> None:
    case.q.update(num_centroids=[32, 1 << 16], num_res_centroids=[-1, 1 << 16])
    case.refused(r"indices wanted torch.int32 \(2, 4, 12\)")


def test_sizes_that_agree_with_each_other_but_not_with_the_file_take_no_memory(case: Case) -> None:
    case.q.update(in_features=(1 << 24) - 2, group_num=2, group_size=(1 << 23) - 2, out_features=1 << 24)
    case.refused(r"indices wanted torch.int32 \(2, 2796203, 1835008\)")
    assert case.read == []


# ------------------------------------------------------------------------------------------------ quantization_config


@pytest.mark.parametrize(
    "config", [{}, {"config_for_layers": {}}, {"config_for_layers": None, "shared_layer_config": {}}]
)
def test_an_empty_config_is_refused(case: Case, config: dict[str, Any]) -> None:
    case.config = {"quant_method": "vptq", **config}
    case.refused("has no layer in config_for_layers or shared_layer_config", names=None)


@pytest.mark.parametrize("key", ["config_for_layers", "shared_layer_config"])
@pytest.mark.parametrize("value", [[1], [{}], 7, "layers", {"m.q": 7}, {"m.q": [1]}, {"m.q": None}, True])
def test_a_table_of_entries_that_is_none_is_refused(case: Case, key: str, value: Any) -> None:
    case.config[key] = value
    case.refused(f"{key} wanted an object of objects, got", names=None)


@pytest.mark.parametrize("key", ["config_for_layers", "shared_layer_config"])
@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", "a..b", "a b", "a.b.", "q\n", "q\0", "\u00e4"])
def test_entries_for_what_is_no_module_path_are_refused(case: Case, key: str, name: str) -> None:
    case.config[key] = {**case.config.get(key, {}), name: ENTRIES[PLAIN]}
    case.refused(f"in {key} is no module path", names=repr(name))


@pytest.mark.parametrize("module", ["../x.q_proj", "", ".q_proj", "a b.q_proj", "a..q_proj"])
def test_matrices_of_what_is_no_module_path_are_refused(case: Case, module: str) -> None:
    # An entry by the last part of a name would take any other.
    case.tensors[module] = make_tensors(ENTRIES[PLAIN])
    case.config["shared_layer_config"] = {"q_proj": ENTRIES[PLAIN]}
    case.refused("is no module path", names=repr(module))


@pytest.mark.parametrize("method", ["aqlm", None, 7, [], {}, "VPTQ"])
def test_another_method_is_refused(case: Case, method: Any) -> None:
    case.config["quant_method"] = method
    case.refused("no quantized checkpoint that Octavo reads", names=None)


@pytest.mark.parametrize("value", [7, "x", [], None])
def test_a_quantization_config_that_is_no_object_is_none(case: Case, value: Any) -> None:
    edit_json(case.write() / "config.json", lambda config: config.update(quantization_config=value))
    with pytest.raises(FormatError, match="no quantized checkpoint that Octavo reads"):
        formats.check(case.path)


@pytest.mark.parametrize("record", [7, [], {"details": 7}, {"method": [1], "details": None}])
def test_a_record_of_ours_that_is_none_does_no_harm(case: Case, record: Any) -> None:
    case.config["octavo"] = record
    assert formats.check(case.write()).details == {}


# ------------------------------------------------------------------------------------------------ GPTQModel's dialect

DIALECT: dict[str, Any] = {
    "quant_method": "vptq",
    "vector_lens": [4, 6],
    "num_centroids": [32, 16],
    "num_res_centroids": [-1, 8],
    "npercent": 7,
    "group_num": 2,
    "enable_norm": True,
    "enable_perm": True,
}


def gptqmodel(case: Case, setting: dict[str, Any]) -> formats.Shapes:
    """The richer matrix alone under GPTQModel's setting."""
    case.config, case.tensors = DIALECT | setting, {Q: case.tensors[Q]}
    return lambda module: (22, 26)


def test_the_dialect_is_read(case: Case) -> None:
    shapes = gptqmodel(case, {})
    assert formats.check(case.write(), shapes=shapes).matrices.keys() == {Q}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"group_size": 12}, "group_size 12 and group_num 2 cannot both be set"),
        ({"group_num": 1 << 62}, "group_num wanted a whole number"),
        ({"group_num": None}, "group_num wanted a whole number"),
        ({"group_num": -1, "group_size": 1 << 62}, "group_size wanted a whole number"),
        ({"group_num": -1, "group_size": "12"}, "group_size wanted a whole number"),
        ({"group_num": -1, "group_size": 1 << 24}, r"indices wanted torch.int32 \(1, 4, 3670016\)"),
        ({"group_num": 25}, "no column is left for 25 groups"),
        ({"npercent": 100}, "no column is left"),
        *(({"npercent": value}, "npercent wanted a number 0..100") for value in (-1, 101, "7", True, None, 1e300)),
        ({"npercent": 0}, "outlier_centroids.weight is unknown"),
        ({"vector_lens": [4]}, "vector_lens wanted two integers"),
        ({"num_centroids": [32, 15]}, r"num_centroids\[1\] wanted a power of two"),
        ({"num_centroids": [33, 16]}, r"num_centroids\[0\] wanted a power of two"),
        ({"enable_perm": "yes"}, "enable_perm wanted true or false"),
        ({"norm_dim": 3}, "norm_dim wanted a whole number"),
    ],
)
def test_an_impossible_setting_is_refused(case: Case, setting: dict[str, Any], words: str) -> None:
    shapes = gptqmodel(case, setting)
    case.refused(words, shapes=shapes)
    assert case.read == []


def test_a_setting_that_is_not_a_number_is_refused(case: Case) -> None:
    # Python's JSON has NaN.
    case.refused("npercent wanted a number", shapes=gptqmodel(case, {"npercent": float("nan")}))


def test_a_matrix_that_the_model_does_not_have_is_refused(case: Case) -> None:
    gptqmodel(case, {})

    def shapes(module: str) -> tuple[int, int]:
        raise FormatError(f"{case.path}: {module} is quantized, but no linear layer of the model.")

    case.refused("no linear layer of the model", shapes=shapes)
