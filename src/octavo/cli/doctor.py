"""``octavo doctor``: what this installation has, what it lacks, and how to get it."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any

import typer

import octavo
from octavo._core.errors import OctavoError
from octavo.cli._layouts import in_words
from octavo.cli._output import JsonOption, Output, quiet_libraries, size

if TYPE_CHECKING:
    from octavo.layout import Layout

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "accelerate", "huggingface_hub", "gguf", "sentencepiece")
#: extra of the package -> (module's distribution, what it is for).
EXTRAS = {
    "eval": ("lm-eval", "octavo eval --lm-eval TASKS"),
    "data": ("datasets", "octavo quantize --calib datasets:NAME"),
    "report": ("matplotlib", "octavo study dimension"),
}


def command(
    model: Annotated[
        str | None, typer.Argument(help="A quantized folder: which kernel runs each of its matrices, and why.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show versions, the C++ library and the CPU features it uses, kernels, methods and extras. Touches no network.

    With a quantized folder also which kernel runs each of its matrices on every device of this machine, and why.
    """
    with Output(as_json) as output:
        layers: list[dict[str, Any]] = []
        if model is not None:
            from octavo.models import quantized

            quiet_libraries()
            layers = kernels_of(quantized.check(model).layouts)
        report = examine()
        if model is not None:
            report |= {"path": model, "layers": layers}
            report["problems"] += dict.fromkeys(text for layer in layers for text in layer["problems"])
        output.document(report)
        output.facts({"octavo": f"{report['octavo']} (Python {report['python']}, {report['platform']})"})
        output.facts({name: found or "missing" for name, found in report["packages"].items()})
        output.say()
        _machine(output, report)
        output.say()
        kernels = [[k["name"], "yes" if k["usable"] else "no", k["note"], k["about"]] for k in report["kernels"]]
        output.table(("kernel", "usable", "note", "about"), kernels)
        output.say()
        if model is not None:
            rows = [[x["device"], str(x["count"]), x["kernel"] or "none", x["why"], x["layout"]] for x in layers]
            output.table(("device", "matrices", "kernel", "why", "layout"), rows, title=f"{model}: what runs it")
            output.say()
        output.facts({"methods": ", ".join(report["methods"])})
        for extra in report["extras"]:
            state = extra["version"] or f"missing; install it with: {extra['install']}"
            output.say(f"extra {extra['extra']} ({extra['use']}): {extra['package']} {state}")
        for problem in report["problems"]:
            output.warn(problem)


def examine() -> dict[str, Any]:
    """Everything that ``octavo doctor`` shows, JSON-able."""
    import torch

    from octavo import algorithms
    from octavo._core import clib
    from octavo.kernels import select

    has_library = clib.library() is not None
    packages = {name: _version(name) for name in PACKAGES}
    problems = [f"{name} is missing; install it with: pip install {name}" for name, v in packages.items() if v is None]
    if not has_library:
        problems.append(f"the C++ library is not in use: {clib.why_missing()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.get_num_threads() > cores:
        problems.append(f"torch uses {torch.get_num_threads()} threads on {cores} cores; try --threads {cores}")
    return {
        "octavo": octavo.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "packages": packages,
        "clib": {
            "loaded": has_library,
            "version": clib.version(),
            "instructions": clib.cpu_features(),
            "missing": clib.why_missing(),
        },
        "threads": {
            "torch": torch.get_num_threads(),
            "cores": cores,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "memory_bytes": _memory(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "kernels": [
            {"name": row.name, "usable": row.usable, "note": row.note, "about": row.about, "rank": row.rank}
            for row in select.table()
        ],
        "kernel_override": os.environ.get(select.ENVIRONMENT),
        "methods": algorithms.names(),
        "extras": [
            {
                "extra": extra,
                "package": package,
                "version": _version(package),
                "use": use,
                "install": f'pip install "octavo[{extra}]"',
            }
            for extra, (package, use) in EXTRAS.items()
        ],
        "problems": problems,
    }


def kernels_of(layouts: dict[str, Layout]) -> list[dict[str, Any]]:
    """The kernel that runs each matrix on each device, JSON-able; matrices of one layout and one reason share a row.

    A device that a matrix cannot run on has no ``kernel``, and ``why`` is the error; ``problems`` says what is missing
    on a GPU (the report on this machine says it of the CPU).
    """
    import torch

    from octavo.kernels import select

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for device in devices:
        for module, layout in layouts.items():
            try:
                kernel, why = select.choose(layout, device)
                lacking = {} if device.type == "cpu" else select.remedies(kernel, layout, device)
                problems = [f"{name} on {device}: {lacks}" for name, lacks in lacking.items()]
            except OctavoError as error:
                kernel, why, problems = "", str(error), [str(error)]
            key = str(device), kernel, why, in_words(layout)
            row = rows.setdefault(key, {"device": key[0], "kernel": kernel, "why": why, "layout": key[3]})
            row.setdefault("matrices", []).append(module)
            row["count"], row["problems"] = len(row["matrices"]), problems
    return list(rows.values())


def _machine(output: Output, report: dict[str, Any]) -> None:
    library = report["clib"]
    loaded = f"{library['version']}, using {library['instructions']} instructions"
    threads = report["threads"]
    override = f" ({report['kernel_override']} is forced by OCTAVO_KERNEL)" if report["kernel_override"] else ""
    output.facts(
        {
            "C++ library": loaded if library["loaded"] else f"not in use: {library['missing']}",
            "threads": f"{threads['torch']} on {threads['cores']} cores",
            "memory": size(report["memory_bytes"]) if report["memory_bytes"] else "unknown",
            "accelerators": (", ".join(report["devices"]) or "none; everything runs on the CPU") + override,
        }
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
