"""torch.compile and torch.export of models with VQLinear: no graph breaks, the numbers of eager mode, nothing stale."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from formats.strategies import random_weight
from formats.tiny_models import MODELS, STYLES, VOCABULARY
from octavo import compiled
from octavo._core import clib
from octavo._core.errors import UsageError
from octavo.kernels import select
from octavo.layout import BlockScale, Layout, Transform
from octavo.nn import TiedEmbedding, VQEmbedding, VQLinear

COLUMNS = Layout(shape=(48, 64), vector_length=4, stages=(10,), permuted=True, channel_norm="input")
KERNELS = [
    pytest.param(
        name, marks=pytest.mark.skipif(name != "reference" and clib.library() is None, reason="no C++ library")
    )
    for name in ("lookup", "gather", "reference")
]


def universal(shape: tuple[int, int], *, bias: bool = False) -> Layout:
    return Layout(
        shape=shape,
        vector_length=8,
        stages=(8, 8),
        direction="row",
        codebook_dtype="universal",
        codebook="gaussian-v8-k256-256",
        block_scale=BlockScale(shape[1], 0, 8),
        bias=bias,
        transform=Transform(16),
    )


def layout_of(kernel: str, shape: tuple[int, int], *, bias: bool = False) -> Layout:
    """A layout that the kernel takes; for the reference one that no other does."""
    if kernel == "lookup":
        return universal(shape, bias=bias)
    return replace(COLUMNS if kernel == "gather" else STYLES[4], shape=shape, bias=bias)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_of(kernel: str, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> VQLinear:
    monkeypatch.setenv(select.ENVIRONMENT, kernel)
    return VQLinear.from_weight(random_weight(layout_of(kernel, (48, 64), bias=True), seed, scale=0.1)).eval()


def llama(kernel: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Llama of which everything is quantized: layers, and a head that is the embedding as well."""
    monkeypatch.setenv(select.ENVIRONMENT, kernel)
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    for name, old in list(model.named_modules()):
        if isinstance(old, nn.Linear):
            shape = (old.out_features, old.in_features)
            layout = layout_of(kernel, shape)
            if layout.why_no_rows() and name == "lm_head":
                layout = replace(STYLES[1], shape=shape, block_scale=None)
            model.set_submodule(name, VQLinear.from_weight(random_weight(layout, len(name), scale=0.1)))
    model.set_submodule("model.embed_tokens", TiedEmbedding(model.lm_head))
    return model


def ids(count: int = 9) -> Tensor:
    return torch.randint(2, VOCABULARY, (2, count), generator=torch.Generator().manual_seed(1))


def compile_whole(function: Any, backend: str = "eager") -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend)


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_llama_compiles_as_one_graph_and_computes_what_it_does_without(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(kernel, monkeypatch)
    with torch.no_grad():
        for count in (9, 1):
            assert torch.equal(compile_whole(model)(ids(count)).logits, model(ids(count)).logits)


@pytest.mark.parametrize("kernel", KERNELS)
def test_static_caches_generate_the_same_tokens_compiled_or_not(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(kernel, monkeypatch)
    options: Any = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 9), "pad_token_id": 0}
    wanted = model.generate(ids(), **options)
    assert torch.equal(model.generate(ids(), cache_implementation="static", **options), wanted)
    model.forward = compile_whole(model.forward)
    assert torch.equal(model.generate(ids(), cache_implementation="static", **options), wanted)


def test_inductor_makes_code_around_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of("reference", monkeypatch)

    def block(x: Tensor) -> Tensor:
        return layer(x.transpose(0, 1) * 2).relu() + 1

    x = torch.randn(5, 3, 64)
    with torch.no_grad():
        torch.testing.assert_close(compile_whole(block, "inductor")(x), block(x))


# ------------------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize("kernel", KERNELS)
def test_tensors_that_are_replaced_or_written_to_are_noticed(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, other = layer_of(kernel, monkeypatch), layer_of(kernel, monkeypatch, seed=1)
    traced, x = compile_whole(layer), torch.randn(3, 64)
    with torch.no_grad():
        before = traced(x)
        layer.indices = other.indices
        assert torch.equal(traced(x), layer(x))
        assert not torch.equal(traced(x), before)
        layer.bias.add_(1)  # type: ignore[union-attr, operator]
        after = traced(x)
        assert torch.equal(after, layer(x))
        layer.load_state_dict(other.state_dict())
        assert torch.equal(traced(x), other(x))
        layer.to(torch.bfloat16)
        assert torch.equal(traced(x.bfloat16()), layer(x.bfloat16()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_matrix_is_packed_before_the_graph_runs_and_only_once(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, packed = layer_of(kernel, monkeypatch), torch.randn(3, 64), []
    made = select.registry.get(kernel).prepare
    monkeypatch.setattr(select.registry.get(kernel), "prepare", staticmethod(lambda w: packed.append(w) or made(w)))

    def backend(graph: Any, _: Any) -> Any:
        assert len(packed) == 1
        return graph

    with torch.no_grad():
        traced = torch.compile(layer, fullgraph=True, backend=backend)
        assert torch.equal(traced(x), traced(x))
    if select.registry.get(kernel).prepares:
        assert len(packed) == 1


def test_a_copy_is_another_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of("reference", monkeypatch), torch.randn(3, 64)
    with torch.no_grad():
        before = compile_whole(layer)(x)
        other = copy.deepcopy(layer)
        other.indices.zero_()  # type: ignore[union-attr, operator]
        assert torch.equal(compile_whole(other)(x), other(x))
        assert torch.equal(compile_whole(layer)(x), before)


def test_a_layer_that_was_freed_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"layer -1 of this graph was freed\. Compile the model that is in use"):
        compiled.linear(torch.ones(1, 8), -1, 8, False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_reach_the_input_of_a_graph(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(kernel, monkeypatch)
    inputs = [torch.randn(2, 3, 64).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0])
    outputs = [function(x) for function, x in zip((layer, compile_whole(layer)), inputs, strict=True)]
    assert torch.equal(outputs[0], outputs[1])
    for y in outputs:
        (y * y).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_operators_are_what_torch_wants(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(kernel, monkeypatch)
    number = compiled.number_of(layer, packed=True)
    for shape in ((3, 64), (2, 1, 64), (0, 64), (64,)):
        torch.library.opcheck(compiled.linear, (torch.randn(shape), number, 48, False))
    torch.library.opcheck(compiled.linear, (torch.randn(3, 64, requires_grad=True), number, 48, True))
    table = VQEmbedding.from_weight(random_weight(replace(STYLES[1], shape=(48, 64)), scale=0.1))
    index = torch.tensor([[1, 47, 1]])
    torch.library.opcheck(compiled.rows, (index, compiled.number_of(table, packed=False), 64, torch.float16))


@pytest.mark.parametrize("style", [*STYLES, universal((48, 64))])
def test_exported_programs_hold_their_tensors_and_need_no_layer(style: Layout) -> None:
    weight = random_weight(replace(style, shape=(48, 64)), scale=0.1)
    layer, x = VQLinear.from_weight(weight), torch.randn(3, 64)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
        wanted = nn.functional.linear(torch.cat([x, x]), weight.dequantize(), None)
        wanted = wanted if weight.bias is None else wanted + weight.bias
        torch.testing.assert_close(program.module()(torch.cat([x, x])), wanted)
    assert "octavo" not in str(program.graph)
    if not style.why_no_rows():
        table = VQEmbedding.from_weight(weight)
        index = torch.tensor([[3, 47, 3]])
        assert torch.equal(torch.export.export(table, (index,)).module()(index), weight.dequantize()[index])


# ------------------------------------------------------------------------------------------------ steady state


class Spy(TorchDispatchMode):
    """Notes what a CUDA graph could not record: values read by the host, and copies from device to device."""

    _READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "unique", "allclose")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.offences: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        self.calls.append(name)
        if any(name.startswith(read) for read in self._READS):
            self.offences.append(name)
        if name in ("_to_copy", "copy_") and "device" in kwargs and kwargs["device"] != args[0].device:
            self.offences.append(f"{name} to {kwargs['device']}")
        return func(*args, **kwargs)


def test_the_spy_sees_what_it_is_there_for() -> None:
    with Spy() as spy:
        torch.ones(2).sum().item()
        torch.ones(2).to("meta")
        torch.equal(torch.ones(1), torch.ones(1))
    assert spy.offences == ["_local_scalar_dense", "_to_copy to meta", "equal"]


@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("kernel", KERNELS)
def test_steady_state_asks_the_host_nothing_and_prepares_nothing(
    kernel: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layer_of(kernel, monkeypatch), torch.randn(tokens, 64)
    with torch.no_grad():
        wanted = layer(x)
        before = layer.prepared()
        if select.registry.get(kernel).prepares:
            monkeypatch.setattr(select.registry.get(kernel), "prepare", lambda *_: pytest.fail("packed again"))
        with Spy() as spy:
            y = layer(x)
    assert torch.equal(y, wanted)
    assert spy.calls
    assert spy.offences == []
    if select.registry.get(kernel).prepares:
        assert layer.prepared() is before
