"""EleutherAI's lm-evaluation-harness on a model object (extra ``eval``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from octavo._core.errors import UsageError

MISSING = 'lm-eval is not installed; the harness tasks need it. Install it with: pip install "octavo[eval]"'
_LABELS = ("alias", "name")


def require() -> None:
    """Check that lm-eval is there, before a model is loaded for it.

    Raises:
        UsageError: it is not; says how to install it.
    """
    try:
        import lm_eval  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(f"{MISSING} ({error})") from error


def run(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Run lm-eval ``tasks`` on ``model``; the first ``limit`` documents of each if given.

    Returns:
        task -> {metric: value, metric + "_stderr": value, "version": .., "num_fewshot": ..}, numbers as lm-eval gives
        them.

    Raises:
        UsageError: lm-eval is not installed, or does not know a task.
    """
    require()
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager()
    unknown = sorted(set(tasks) - set(manager.match_tasks(list(tasks))))
    if unknown:
        raise UsageError(f"lm-eval does not know {', '.join(unknown)}; `lm-eval ls tasks` lists what it knows.")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    report = lm_eval.simple_evaluate(
        model=wrapped, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
    )
    assert report is not None
    results: dict[str, dict[str, Any]] = {}
    for task, values in report["results"].items():
        results[task] = {key.removesuffix(",none"): value for key, value in values.items() if key not in _LABELS}
        results[task]["version"] = report.get("versions", {}).get(task)
        results[task]["num_fewshot"] = report.get("n-shot", {}).get(task)
    return results
