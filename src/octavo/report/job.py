"""What all studies share: a job of rows, checked before it starts, saved after every row, and resumable."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import octavo
from octavo._core import io
from octavo._core.errors import FormatError, Interrupted, UsageError
from octavo.report.measure import Row

Document = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What one kind of study has of its own.

    Attributes:
        name: of the study, as on the command line. stem: of its three files.
        valid: whether the content of a JSON file has the rows of this study.
        markdown, plot: the document as text, and as SVG.
    """

    name: str
    stem: str
    valid: Callable[[Document], bool]
    markdown: Callable[[Mapping[str, Any]], str]
    plot: Callable[[Mapping[str, Any]], bytes]

    @property
    def json(self) -> str:
        """The name of the file that everything else is drawn from."""
        return f"{self.stem}.json"

    def stored(self, out: Path, resume: bool) -> Document:
        """The document of an earlier run in ``out`` that is to be continued; empty without one.

        Raises:
            UsageError: a study that is not to be continued, or a folder with something else in it.
            FormatError: a file of that name that is no result of this study.
        """
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out} is no folder; choose another --out.")
        names = {path.name for path in out.iterdir()} if out.exists() else set()
        if self.json in names and not resume:
            raise UsageError(f"{out} holds a study already. Continue it with --resume, or choose another --out.")
        strangers = names - {f"{self.stem}.{end}" for end in ("json", "md", "svg")} - {"models", "LOCK"}
        if self.json not in names and strangers:
            raise UsageError(f"{out} holds other files ({', '.join(sorted(strangers)[:3])}); choose a new --out.")
        return self.read(out / self.json) if self.json in names else {}

    def read(self, path: Path) -> Document:
        """The document of a JSON file.

        Raises:
            FormatError: it is no result of this study.
        """
        document = io.read_json(path, "study")
        if not isinstance(document, dict) or document.get("study") != self.name or not self.valid(document):
            raise FormatError(f"{path} is no result of `octavo study {self.name}`.")
        return document

    def check_same(self, out: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """All rows of a part are measured in one way.

        Raises:
            UsageError: settings that differ from those of the rows that are there.
        """
        different = [
            f"{part} {name}: {stored[part].get(name)!r}, now {value!r}"
            for part in sorted(wanted.keys() & stored.keys())
            for name, value in wanted[part].items()
            if stored[part].get(name) != value
        ]
        if different:
            raise UsageError(
                f"{out / self.json} was made with other settings ({'; '.join(different)}). Resume with the same ones, "
                "or choose another --out."
            )

    def document(
        self,
        stored: Mapping[str, Any],
        settings: Mapping[str, Any],
        rows: Any,
        model: str | None,
        facts: Mapping[str, Any] | None,
    ) -> Document:
        """The document to fill: who measured what with which settings; ``facts`` as for the studies' ``run``."""
        return {
            "study": self.name,
            "octavo": octavo.__version__,
            "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
            **{"command": [], "machine": {}, **(facts or {})},
            "model": model or stored.get("model"),
            "settings": {**stored.get("settings", {}), **settings},
            "rows": rows,
        }

    def redraw(self, path: str | Path, out: str | Path | None = None) -> Document:
        """Write tables and plot of a JSON file again, next to it or to the folder ``out``; returns its document.

        Raises:
            FormatError: it is no such file.
        """
        document, folder = self.read(Path(path)), Path(out if out is not None else Path(path).parent)
        folder.mkdir(parents=True, exist_ok=True)
        return document | {"notes": self.write(document, folder)}

    def write(self, document: Mapping[str, Any], folder: Path) -> list[str]:
        """Write tables and plot; returns what a person should know: that there is no plot, and why."""
        io.write_bytes(folder / f"{self.stem}.md", self.markdown(document).encode())
        try:
            picture = self.plot(document)
        except ImportError as error:
            return [f'no plot, because matplotlib is missing ({error}); install it with: pip install "octavo[report]"']
        io.write_bytes(folder / f"{self.stem}.svg", picture)
        return []


@dataclass(frozen=True, kw_only=True)
class Task:
    """A row to be measured.

    Attributes:
        key: what tells the row from the others among ``rows``; its first entries.
        rows: the list of the document that it belongs to.
        label: how a message calls it.
        measure: gives the rest of the row.
        line: the row in one line.
        models: folders of models that it writes or needs, which go when no later row needs them.
    """

    key: Row
    rows: list[Row]
    label: str
    measure: Callable[[], Row]
    line: Callable[[Row], str]
    models: tuple[Path, ...] = ()

    @property
    def done(self) -> bool:
        """Whether the row is there."""
        return any(all(row[name] == value for name, value in self.key.items()) for row in self.rows)


def run(
    study: Study,
    out: Path,
    document: Document,
    tasks: Sequence[Task],
    *,
    spent: float = 0.0,
    order: Callable[[Row], Any] | None = None,
    keep: bool = False,
    say: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
) -> Document:
    """Measure the rows that are missing, in order; save after each, and write everything at the end.

    Args:
        spent: seconds of earlier runs.
        order: rows are sorted by it.
        keep: keep the models.

    Returns:
        The document that the JSON file holds, and ``notes``.

    Raises:
        Interrupted: ``stop`` said so; all finished rows are saved.
    """
    began = perf_counter()

    def save(complete: bool = False) -> None:
        document["complete"] = complete
        document["seconds"] = spent + perf_counter() - began
        io.write_json(out / study.json, document)

    out.mkdir(parents=True, exist_ok=True)
    with io.disk_errors(out), io.FolderLock(out):
        save()
        for number, task in enumerate(tasks):
            if task.done:
                continue
            if stop():
                raise Interrupted(f"stopped before {task.label}; the rows before are done.")
            start = perf_counter()
            row = {**task.key, **task.measure()}
            row["seconds"] = perf_counter() - start
            task.rows.append(row)
            say(task.line(row))
            if order is not None:
                task.rows.sort(key=order)
            save()
            # Only now: a row that is not saved needs its model again.
            needed = {folder for later in tasks[number + 1 :] if not later.done for folder in later.models}
            for folder in () if keep else task.models:
                if folder not in needed:
                    for path in (folder, folder.with_name(folder.name + ".work")):
                        shutil.rmtree(path, ignore_errors=True)
        save(complete=True)
        notes = study.write(document, out)
        if (out / "models").is_dir() and not any((out / "models").iterdir()):
            (out / "models").rmdir()
        (out / "LOCK").unlink()
    return document | {"notes": notes}
