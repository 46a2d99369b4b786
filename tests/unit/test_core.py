"""The foundation: registries, options, errors, seeds, import hooks. Files and locks are in test_core_io."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from octavo._core import errors, on_import, seeds
from octavo._core.config import from_dict, to_dict
from octavo._core.errors import UsageError, did_you_mean
from octavo._core.registry import Registry

# ---------------------------------------------------------------- registry, options, errors, seeds


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package ``plugins_of_test`` on the path, with a registry in ``_table``."""
    folder = tmp_path / "plugins_of_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "_table.py").write_text(
        "from octavo._core.registry import Registry\ntable = Registry('gadget', 'plugins_of_test')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.startswith("plugins_of_test")]:
        del sys.modules[name]


def _plugin(name: str) -> str:
    return f"from plugins_of_test._table import table\n\n@table.register({name!r})\nclass Plugin:\n    pass\n"


def _table() -> Registry[type]:
    return importlib.import_module("plugins_of_test._table").table


def test_a_new_file_is_all_that_a_new_entry_needs(package: Path) -> None:
    (package / "hammer.py").write_text(_plugin("hammer"))
    (package / "saw.py").write_text(_plugin("saw"))
    (package / "_private.py").write_text("raise RuntimeError('not to be imported')")
    table = _table()
    assert "plugins_of_test.hammer" not in sys.modules, "nothing is imported before the first question"
    assert table.names() == list(table) == ["hammer", "saw"]
    assert table.get("saw").__module__ == "plugins_of_test.saw"
    with pytest.raises(UsageError, match=r"unknown gadget 'hamer'; known: hammer, saw\. Did you mean 'hammer'\?"):
        table.get("hamer")
    with pytest.raises(ValueError, match="octavo bug: gadget 'saw' is registered twice"):
        table.register("saw")(int)


def test_a_plugin_that_cannot_be_imported_is_not_forgotten(package: Path) -> None:
    (package / "broken.py").write_text("raise ImportError('needs a library')")
    (package / "hammer.py").write_text(_plugin("hammer"))
    for _ in range(2):
        with pytest.raises(ImportError, match="needs a library"):
            _table().get("hammer")


@dataclass(frozen=True)
class _Options:
    size: int
    colour: str = "red"

    def __post_init__(self) -> None:
        if self.size < 0:
            raise UsageError("size wanted >= 0")


def test_options_go_to_dictionaries_and_back_and_unknown_ones_are_refused() -> None:
    options = from_dict(_Options, {"size": 3}, "the box")
    assert options == _Options(3, "red")
    assert from_dict(_Options, to_dict(options), "the box") == options
    with pytest.raises(
        UsageError, match=r"the box: unknown option 'color'\. Did you mean 'colour'\? Known: size, colour"
    ):
        from_dict(_Options, {"size": 3, "color": "blue"}, "the box")
    for bad in ({}, {"size": "3"}):
        with pytest.raises(UsageError, match="the box: "):
            from_dict(_Options, bad, "the box")
    with pytest.raises(UsageError, match="size wanted >= 0"):
        from_dict(_Options, {"size": -1}, "the box")


def test_every_kind_of_error_has_its_exit_code() -> None:
    codes = {kind.__name__: kind.exit_code for kind in errors.OctavoError.__subclasses__()}
    assert codes == {"UsageError": 2, "FormatError": 3, "NumericalError": 4, "ResourceError": 5, "Interrupted": 130}
    assert did_you_mean("gtpq", ["gptq", "rtn"]) == " Did you mean 'gptq'?"
    assert did_you_mean("zzz", ["gptq", "rtn"]) == did_you_mean("a", []) == ""


def test_seeds_depend_on_run_seed_and_name_alone_and_never_change() -> None:
    def draw(seed: int, name: str) -> list[int]:
        return torch.randint(0, 1 << 30, (3,), generator=seeds.generator(seed, name)).tolist()

    first = draw(0, "layers.0.q_proj")
    torch.manual_seed(123)
    draw(0, "something else")
    assert draw(0, "layers.0.q_proj") == first
    streams = {tuple(draw(seed, name)) for seed in (0, 1, -1, 10) for name in ("", "a", "layers.0", "layers.00", "1:a")}
    assert len(streams) == 20
    # Results of older runs must stay reproducible.
    assert seeds.generator(0, "layers.0.q_proj").initial_seed() == 759803634776031504


# ---------------------------------------------------------------- import hook


@pytest.fixture
def hooked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[str]]]:
    """Write a module ``late_of_test`` with the given source and hook it; the list fills when the callback runs."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before, calls = list(sys.meta_path), []

    def hook(source: str = "VALUE = 1") -> list[str]:
        (tmp_path / "late_of_test.py").write_text(source)
        importlib.invalidate_caches()
        on_import.on_import("late_of_test", lambda: calls.append(getattr(sys.modules["late_of_test"], "VALUE", "?")))
        return calls

    yield hook
    sys.meta_path[:] = before
    sys.modules.pop("late_of_test", None)


def test_the_callback_runs_once_right_after_the_first_import(hooked: Callable[..., list[str]]) -> None:
    before = len(sys.meta_path)
    calls = hooked("VALUE = 'loaded'")
    import wave  # noqa: F401 - another module, not imported before

    assert calls == []
    module = importlib.import_module("late_of_test")
    assert calls == ["loaded"]
    importlib.reload(module)
    importlib.import_module("late_of_test")
    assert calls == ["loaded"]
    assert len(sys.meta_path) == before
    assert type(module.__loader__).__module__ != on_import.__name__
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__


def test_the_callback_runs_at_once_for_a_module_that_is_there() -> None:
    calls: list[int] = []
    on_import.on_import("json", lambda: calls.append(1))
    assert calls == [1]


def test_asking_whether_the_module_exists_does_not_use_up_the_hook(hooked: Callable[..., list[str]]) -> None:
    calls = hooked()
    assert isinstance(importlib.util.find_spec("late_of_test"), ModuleSpec)
    assert calls == []
    importlib.import_module("late_of_test")
    assert calls == [1]


def test_a_first_import_that_fails_does_not_use_up_the_hook(hooked: Callable[..., list[str]], tmp_path: Path) -> None:
    calls = hooked("raise ImportError('not today')")
    with pytest.raises(ImportError, match="not today"):
        importlib.import_module("late_of_test")
    (tmp_path / "late_of_test.py").write_text("VALUE = 22222")
    importlib.invalidate_caches()
    importlib.import_module("late_of_test")
    assert calls == [22222]


def test_modules_from_other_finders_are_hooked_too(hooked: Callable[..., list[str]], tmp_path: Path) -> None:
    """Editable installs bring a finder of their own, which the search along sys.path knows nothing of."""
    calls = hooked()
    source = tmp_path / "elsewhere" / "source.py"
    source.parent.mkdir()
    (tmp_path / "late_of_test.py").rename(source)

    class Finder:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            return importlib.util.spec_from_file_location(name, source) if name == "late_of_test" else None

    sys.meta_path.append(Finder)  # type: ignore[arg-type]
    importlib.import_module("late_of_test")
    assert calls == [1]
