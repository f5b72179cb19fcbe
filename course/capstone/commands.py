"""The command line of the capstone; everything heavy is imported inside the functions."""

from pathlib import Path
from typing import Annotated

import typer


def capstone(
    run_file: Annotated[Path | None, typer.Argument(metavar="[RUN.toml]", help="The plan; options go before it.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="tiny, gemma-3-270m, a hub name, a folder or a .gguf file.", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="JSONL of conversations; 'course' for the tiny model's.", show_default=False)] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the run.", show_default=False)] = None,
    method: Annotated[str | None, typer.Option(help="auto, lora, qlora or full.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Of training.", show_default=False)] = None,
    memory_gb: Annotated[float | None, typer.Option(help="The budget; what is free if not given.", show_default=False)] = None,
    licence: Annotated[str | None, typer.Option(help="Of the adapter, for its card.", show_default=False)] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Predict the memory and stop.")] = False,
) -> None:
    """Adapt a model from data to deployment: memory first, then training, evaluation, merge and exports. Run it again after a kill: it goes on."""
    from rich.console import Console
    from rich.markup import escape

    from course.capstone import plan as plans

    console = Console(highlight=False)
    given = {"base": base, "data": data, "out": out, "method": method, "steps": steps, "memory_gb": memory_gb, "licence": licence}
    plan = plans.read(run_file, **given)
    if dry:
        from transformers import AutoConfig

        from course.lab import models

        source = str(models.TINY) if plan.base == "tiny" else plan.base
        chosen, memory = plans.choose(plan, plans.shape_of(AutoConfig.from_pretrained(source)))
        console.print(escape(str(memory)))
        console.print(f"method = {chosen.method}, checkpointing = {chosen.checkpointing}")
        return
    from course.capstone import report, run

    result = run.run(plan, lambda words: console.print(escape(words), soft_wrap=True), console.is_terminal)
    console.print(report.table(result))
    for words in result["verdict"]["against"]:
        console.print(f"[yellow]–[/yellow] {escape(words)}", soft_wrap=True)
    console.print("[green]Ready.[/green]" if result["verdict"]["ready"] else "[yellow]Not ready: see – above.[/yellow]")
    console.print(f"{plan.path('out') / 'report.html'}  ({result['seconds']:.0f} s, {result['peak'] / 1e9:.1f} GB)")
