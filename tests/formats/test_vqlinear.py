"""VQLinear and kernel selection: right numbers in the input's dtype, codebooks that nothing casts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from formats.strategies import layouts, random_weight
from octavo import nn as octavo_nn
from octavo._core.clib import SlowPathWarning
from octavo._core.errors import FormatError, ResourceError, UsageError
from octavo.kernels import select
from octavo.kernels.select import Kernel, Row
from octavo.layout import BlockScale, Layout, Outliers
from octavo.nn import VQLinear
from octavo.weight import VQWeight

LAYOUT = Layout(
    shape=(10, 12),
    vector_length=4,
    stages=(3, 2),
    codebook_dtype="int8",
    side_dtype="bfloat16",
    block_scale=BlockScale(5, 3),
    outliers=Outliers(2, 3, 2),
    channel_norm="input",
    permuted=True,
    bias=True,
)


@pytest.fixture(autouse=True)
def chosen_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming the slow kernel is the way to say that it is meant."""
    monkeypatch.setenv(select.ENVIRONMENT, "reference")


@pytest.fixture
def weight() -> VQWeight:
    return random_weight(LAYOUT, 3)


def same_tensors(layer: VQLinear, weight: VQWeight) -> bool:
    state = layer.state_dict()
    return state.keys() == weight.tensors.keys() and all(
        state[n].dtype == t.dtype and torch.equal(state[n].view(torch.uint8), t.view(torch.uint8))
        for n, t in weight.tensors.items()
    )


# ------------------------------------------------------------------------------------------------ numbers


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=layouts(), seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
)
def test_forward_equals_a_dense_layer_with_the_decoded_matrix(layout: Layout, seed: int, dtype: torch.dtype) -> None:
    weight = random_weight(layout, seed)
    layer = VQLinear.from_weight(weight)
    x = torch.randn(2, 3, layout.shape[1], generator=torch.Generator().manual_seed(seed)).to(dtype)
    bias = None if weight.bias is None else weight.bias.to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (2, 3, layout.shape[0])
    assert torch.equal(y, functional.linear(x, weight.dequantize().to(dtype), bias))
    assert torch.equal(y, layer.densify(dtype)(x))


@pytest.mark.parametrize("shape", [(12,), (0, 12), (1, 12), (33, 12), (2, 0, 12), (2, 1, 7, 12)])
def test_any_leading_shape_is_kept(weight: VQWeight, shape: tuple[int, ...]) -> None:
    y = VQLinear.from_weight(weight)(torch.ones(shape))
    assert y.shape == (*shape[:-1], 10)


def test_strided_input_is_fine(weight: VQWeight) -> None:
    x = torch.randn(12, 5).t()
    # Products of matrices that lie otherwise in memory are rounded otherwise.
    wanted = VQLinear.from_weight(weight)(x.contiguous())
    torch.testing.assert_close(VQLinear.from_weight(weight)(x), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_input_and_nothing_else(weight: VQWeight) -> None:
    layer = VQLinear.from_weight(weight)
    x = torch.randn(3, 12, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, 12))
    assert list(layer.parameters()) == []


@pytest.mark.parametrize("x", [torch.ones(2, 11), torch.ones(2, 12, dtype=torch.int64)])
def test_wrong_inputs_are_refused(weight: VQWeight, x: Tensor) -> None:
    with pytest.raises(UsageError, match=r"wanted floats \[\.\., 12\], got"):
        VQLinear.from_weight(weight)(x)


def test_densify_is_an_independent_linear_layer(weight: VQWeight) -> None:
    layer = VQLinear.from_weight(weight).eval()
    dense = layer.densify(torch.bfloat16)
    assert type(dense) is nn.Linear
    assert not dense.training
    assert dense.weight.dtype == torch.bfloat16
    assert not dense.weight.requires_grad
    before = weight.tensors["bias"].clone()
    dense.bias.data.zero_()
    assert torch.equal(weight.tensors["bias"], before)
    assert torch.equal(dense.weight, weight.dequantize().bfloat16())


# ------------------------------------------------------------------------------------------------ buffers


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts())
def test_state_dict_is_exactly_the_layouts_tensors(layout: Layout) -> None:
    layer = VQLinear(layout)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in layer.state_dict().items()} == layout.tensors()
    assert layer.bias is None or layout.bias
    weight = random_weight(layout)
    layer.load_state_dict(dict(weight.tensors))
    assert same_tensors(layer, weight)
    assert torch.equal(layer.vq_weight().dequantize(), weight.dequantize())


CASTS: list[Callable[[nn.Module], object]] = [
    lambda m: m.to(torch.bfloat16),
    lambda m: m.to("cpu", torch.float16),
    lambda m: m.to(dtype=torch.float64),
    lambda m: m.half(),
    lambda m: m.float(),
    lambda m: m.double(),
    lambda m: m.bfloat16(),
    lambda m: m.type(torch.float16),
    lambda m: m.to(torch.empty(0, dtype=torch.bfloat16)),
    lambda m: m.cpu(),
    lambda m: m.share_memory(),
]


@pytest.mark.parametrize("cast", CASTS)
def test_casts_of_the_model_do_not_touch_codebooks_and_scales(
    weight: VQWeight, cast: Callable[[nn.Module], object]
) -> None:
    model = nn.Sequential(nn.Linear(12, 12), VQLinear.from_weight(weight))
    cast(model)
    assert same_tensors(model[1], weight)  # type: ignore[arg-type]


def test_the_dense_dtype_follows_casts_but_the_device_only_moves(weight: VQWeight) -> None:
    layer = VQLinear.from_weight(weight).to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    layer.to("meta")
    assert {tensor.device.type for tensor in layer.buffers()} == {"meta"}
    assert {n: (t.dtype, tuple(t.shape)) for n, t in layer.state_dict().items()} == LAYOUT.tensors()
    layer.to_empty(device="cpu")
    assert {tensor.device.type for tensor in layer.buffers()} == {"cpu"}


def test_copies_are_deep(weight: VQWeight) -> None:
    layer = VQLinear.from_weight(weight)
    other = copy.deepcopy(layer)
    other.indices.zero_()  # type: ignore[operator, union-attr]
    assert same_tensors(layer, weight)
    assert other.layout == layer.layout
    assert not torch.equal(other(torch.ones(12)), layer(torch.ones(12)))


def test_a_buffer_of_another_dtype_is_noticed(weight: VQWeight) -> None:
    layer = VQLinear.from_weight(weight)
    layer.bias = layer.bias.float()  # type: ignore[union-attr, operator]
    with pytest.raises(FormatError, match="bias wanted torch.bfloat16"):
        layer(torch.ones(12))


def test_repr_shows_true_bits_beside_nominal_ones(weight: VQWeight) -> None:
    text = repr(VQLinear.from_weight(weight))
    assert "in_features=12, out_features=10, bias=True" in text
    assert f"bits_per_weight={LAYOUT.bits_per_weight:.3f} (indices 1.250)" in text


# ------------------------------------------------------------------------------------------------ .weight


def test_asking_for_the_weights_dtype_decodes_nothing(weight: VQWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = VQLinear.from_weight(weight)
    monkeypatch.setattr(VQWeight, "dequantize", lambda *_: pytest.fail("decoded"))
    assert layer.weight.dtype == torch.float32
    assert layer.weight.shape == (10, 12)
    assert layer.weight.device == torch.device("cpu")
    assert isinstance(layer.weight, Tensor)
    assert layer.weight.is_floating_point()
    assert "not decoded" in repr(layer.weight)
    assert VQLinear(LAYOUT, device="meta").weight.device.type == "meta"


def test_using_the_weight_gives_the_decoded_matrix(weight: VQWeight) -> None:
    layer = VQLinear.from_weight(weight)
    matrix, x = weight.dequantize(), torch.randn(4, 12)
    assert torch.equal(layer.weight + 0, matrix)
    assert torch.equal(functional.linear(x, layer.weight), functional.linear(x, matrix))
    assert torch.equal(x @ layer.weight.t(), x @ matrix.t())
    assert torch.equal(layer.weight.float(), matrix)
    layer.to(torch.bfloat16)
    assert torch.equal(layer.weight.clone(), matrix.bfloat16())


def test_initialising_the_weight_changes_nothing(weight: VQWeight) -> None:
    layer = VQLinear.from_weight(weight)
    nn.init.normal_(layer.weight)
    assert same_tensors(layer, weight)


# ------------------------------------------------------------------------------------------------ selection


class Fast(Kernel):
    """A kernel for row layouts on machines with wings."""

    rank = 5

    @staticmethod
    def missing() -> str:
        return ""

    @staticmethod
    def why_not(layout: Layout, device: torch.device) -> str:
        return "" if layout.direction == "row" else "it reads row vectors only"

    @staticmethod
    def linear(x: Tensor, weight: VQWeight) -> Tensor:
        return torch.full((*x.shape[:-1], weight.layout.shape[0]), 7.0)


class Absent(Fast):
    """A kernel that this machine cannot run."""

    rank = 9

    @staticmethod
    def missing() -> str:
        return "no wings; install wings"


@pytest.fixture
def three_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    select.registry.names()
    for name in ("lookup", "gather"):
        monkeypatch.delitem(select.registry._table, name)
    monkeypatch.setitem(select.registry._table, "fast", Fast)
    monkeypatch.setitem(select.registry._table, "absent", Absent)
    monkeypatch.delenv(select.ENVIRONMENT)
    octavo_nn._warn_once.cache_clear()
    yield
    octavo_nn._warn_once.cache_clear()


CPU = torch.device("cpu")
ROW = replace(LAYOUT, direction="row")


@pytest.mark.usefixtures("three_kernels")
def test_the_fastest_kernel_that_can_run_is_chosen_and_the_reason_names_the_others() -> None:
    assert select.choose(ROW, CPU) == ("fast", "no faster kernel can run (absent: no wings; install wings)")
    name, reason = select.choose(LAYOUT, CPU)
    assert name == "reference"
    assert "absent: no wings" in reason
    assert "fast: it reads row vectors only" in reason


@pytest.mark.usefixtures("three_kernels")
def test_the_layer_runs_the_chosen_kernel() -> None:
    assert torch.equal(VQLinear(ROW)(torch.ones(2, 12)), torch.full((2, 10), 7.0))


@pytest.mark.usefixtures("three_kernels")
def test_the_slow_kernel_warns_once_and_says_what_to_do(weight: VQWeight) -> None:
    layer = VQLinear.from_weight(weight)
    with pytest.warns(SlowPathWarning, match=r"decodes its whole matrix.*decode='dense'"):
        layer(torch.ones(12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.ones(12))


@pytest.mark.usefixtures("three_kernels")
def test_the_warning_on_a_cpu_says_what_would_be_faster(weight: VQWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(select.registry._table, "fast")
    with pytest.warns(SlowPathWarning, match=r"decodes its whole matrix.* The kernel absent: no wings; install wings"):
        VQLinear.from_weight(random_weight(ROW, 3))(torch.ones(12))


@pytest.mark.usefixtures("three_kernels")
def test_what_a_gpu_lacks_is_an_error_unless_the_slow_path_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert select.choose(ROW, gpu)[0] == "fast"  # Nothing is slow here, whatever else is missing.
    monkeypatch.delitem(select.registry._table, "fast")
    message = "the kernel absent would run this matrix on cuda:0, but no wings; install wings. OCTAVO_ALLOW_SLOW=1"
    with pytest.raises(ResourceError, match=message):
        select.choose(ROW, gpu)
    assert select.choose(LAYOUT, gpu)[0] == "reference"  # No kernel for it, so there is nothing to install.
    assert select.choose(ROW, CPU)[0] == "reference"
    monkeypatch.setenv(select.ALLOW_SLOW, "1")
    assert select.choose(ROW, gpu)[0] == "reference"
    monkeypatch.delenv(select.ALLOW_SLOW)
    monkeypatch.setenv(select.ENVIRONMENT, "reference")
    assert select.choose(ROW, gpu) == ("reference", "OCTAVO_KERNEL is set")


@pytest.mark.usefixtures("three_kernels")
@pytest.mark.parametrize("known", [(), (80, 86)])
def test_cuda_kernels_say_the_command_that_mends_them(monkeypatch: pytest.MonkeyPatch, known: tuple[int, ...]) -> None:
    """A GPU of sm_90, and no NVRTC or one that is too old."""

    def why(architecture: int = 0) -> str:
        return "" if known and not architecture else "NVRTC is not there; pip install nvidia-cuda-nvrtc"

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("octavo._core.cuda.why_no_compiler", why)
    monkeypatch.setattr(select.registry.get("cuda_lookup"), "rank", 20)
    monkeypatch.delitem(select.registry._table, "fast")
    monkeypatch.delitem(select.registry._table, "absent")
    layout = Layout((16, 64), 8, (8, 8), "row", "universal", codebook="gaussian-v8-k256-256")
    with pytest.raises(ResourceError, match="cuda_lookup would run .* pip install nvidia-cuda-nvrtc"):
        select.choose(layout, torch.device("cuda", 0))
    assert select.choose(LAYOUT, torch.device("cuda", 0))[0] == "reference"
    assert select.choose(layout, CPU)[0] == "reference"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 0))
    assert select.choose(layout, torch.device("cuda", 0))[0] == "reference"  # Too old, whatever is installed.


@pytest.mark.usefixtures("three_kernels")
@pytest.mark.parametrize(
    ("forced", "layout", "message"),
    [
        ("refrence", LAYOUT, "OCTAVO_KERNEL=refrence: no such kernel; known: .*reference"),
        ("fast", LAYOUT, "OCTAVO_KERNEL=fast cannot run here: it reads row vectors only"),
        ("absent", ROW, "OCTAVO_KERNEL=absent cannot run here: no wings"),
    ],
)
def test_an_impossible_choice_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, forced: str, layout: Layout, message: str
) -> None:
    monkeypatch.setenv(select.ENVIRONMENT, forced)
    with pytest.raises(UsageError, match=message):
        select.choose(layout, CPU)


@pytest.mark.usefixtures("three_kernels")
def test_the_environment_overrides_the_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(select.ENVIRONMENT, "reference")
    assert select.choose(ROW, CPU) == ("reference", "OCTAVO_KERNEL is set")


@pytest.mark.usefixtures("three_kernels")
def test_the_table_for_doctor_is_sorted_and_says_what_is_missing() -> None:
    rows = [row for row in select.table() if row.name in ("fast", "absent", "reference")]
    assert rows == [
        Row("absent", "A kernel that this machine cannot run.", 9, False, "no wings; install wings"),
        Row("fast", "A kernel for row layouts on machines with wings.", 5, True, "ready"),
        Row(
            "reference",
            "Pure torch, any device, any layout; every call pays for decoding the matrix.",
            0,
            True,
            "ready",
        ),
    ]


def test_every_kernel_agrees_with_the_reference_where_it_can_run(weight: VQWeight) -> None:
    x = torch.randn(5, 12)
    wanted = functional.linear(x.double(), weight.dequantize(torch.float64), weight.tensors["bias"].double())
    for name in select.registry:
        kernel = select.registry.get(name)
        if not kernel.missing() and not kernel.why_not(LAYOUT, CPU):
            y = kernel.linear(x, kernel.prepare(weight))
            torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-3)
