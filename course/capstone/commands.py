"""The command line of the capstone; everything heavy is imported inside the functions."""

from pathlib import Path
from typing import Annotated

import typer


def capstone(
    run_file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.toml]", help="The plan; options go before it.", show_default=False)
    ] = None,
    base: Annotated[str | None, typer.Option(help="tiny, gemma-3-270m, a hub name, a folder or a .gguf file.", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="JSONL of conversations; 'course' for the tiny model's.", show_default=False)] = None,
    held_out: Annotated[str | None, typer.Option(help="JSONL that is asked; a part of the data if not given.", show_default=False)] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the run.", show_default=False)] = None,
    method: Annotated[str | None, typer.Option(help="auto, lora, qlora or full.", show_default=False)] = None,
    r: Annotated[int | None, typer.Option("--rank", help="Of the adapter.", show_default=False)] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Of training.", show_default=False)] = None,
    memory_gb: Annotated[float | None, typer.Option(help="The budget; what is free if not given.", show_default=False)] = None,
    licence: Annotated[str | None, typer.Option(help="Of the adapter, for its card.", show_default=False)] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Predict the memory and stop.")] = False,
) -> None:
    """Adapt a model from data to deployment, memory first. Given again after a kill, it goes on where it was."""
    from rich.console import Console
    from rich.markup import escape

    from course.capstone import plan as plans

    console = Console(highlight=False)
    files = {"base": base, "data": data, "held_out": held_out, "out": out}
    plan = plans.read(run_file, **files, method=method, r=r, lr=lr, steps=steps, memory_gb=memory_gb, licence=licence)
    if dry:
        from course.capstone import base as bases

        chosen, memory = plans.choose(plan, plans.shape_of(bases.config(plan.base), plan.base))
        console.print(escape(str(memory)))
        console.print(f"method = {chosen.method}, checkpointing = {chosen.checkpointing}")
        return
    from transformers.utils import logging

    from course.capstone import report, run

    logging.disable_progress_bar()
    in_one_piece = not console.is_terminal  # a terminal would break lines inside words
    result = run.run(plan, lambda words: console.print(escape(words), soft_wrap=in_one_piece), console.is_terminal)
    console.print(report.table(result))
    verdict = result["verdict"]
    for mark, colour, kind in (("✗", "red", "against"), ("?", "yellow", "decide")):
        for words in verdict[kind]:
            console.print(f"[{colour}]{mark}[/{colour}] {escape(words)}", soft_wrap=in_one_piece)
    colour = "red" if not verdict["ready"] else "yellow" if verdict["decide"] else "green"
    console.print(f"[{colour}]{report.judgement(verdict)}[/{colour}]")
    console.print(f"{plan.path('out') / 'report.html'}  ({result['seconds']:.0f} s, {result['peak'] / 1e9:.1f} GB)")


def audit(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder, such as capstone/adapter.")],
    base: Annotated[str, typer.Option(help="What it will be served on: tiny, a hub name, a folder; after a capstone its base/.")],
    max_rank: Annotated[int, typer.Option(help="The largest rank that the server takes.")] = 64,
    adapters: Annotated[int, typer.Option(help="Adapters that are resident at once.")] = 8,
    rows: Annotated[int, typer.Option(help="Rows of a batch, for the latency.")] = 8,
    factors_only: Annotated[
        bool, typer.Option("--factors-only", help="The server loads no rows of embeddings and no whole modules.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the findings there.", show_default=False)] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Also write a page there.", show_default=False)] = None,
) -> None:
    """The production checklist over an adapter; the exit status is 1 if a check fails."""
    import json

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from transformers.utils import logging

    from course.capstone import audit as auditing
    from course.capstone import report

    console = Console(highlight=False)
    logging.disable_progress_bar()
    done = auditing.audit(adapter, base, auditing.Server(max_rank, adapters, rows, not factors_only))
    marks = {"passed": "[green]✓[/green]", "failed": "[red]✗[/red]", "unknown": "[yellow]?[/yellow]", "skipped": "[yellow]–[/yellow]"}
    table = Table("", "check", box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("found", overflow="fold")  # names of files and of hub models are longer than a column
    for each in done.findings:
        table.add_row(marks[each.state], each.name, escape(each.found + f"\n→ {each.remedy}" * bool(each.remedy)))
    console.print(table)
    if json_file:
        json_file.write_text(json.dumps(done.as_dict(), indent=1) + "\n", encoding="utf-8")
    if html_file:
        html_file.write_text(report.audit_page(done.as_dict()), encoding="utf-8")
    counts = done.as_dict()["counts"]
    console.print(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    if done.failed:
        raise typer.Exit(1)


def rule(
    base: Annotated[str, typer.Option(help="tiny, gemma-3-270m, a hub name, a folder or a .gguf file.")] = "tiny",
    adapter: Annotated[Path | None, typer.Option(help="Merged into the base first.", show_default=False)] = None,
    items: Annotated[Path | None, typer.Option(help="JSONL of your own questions: context, choices, gold.", show_default=False)] = None,
    rows: Annotated[int, typer.Option(help="Of old text.")] = 400,
    tolerance: Annotated[float, typer.Option(help="The share that may be lost.")] = 0.02,
) -> None:
    """The 2 % rule: 16 against 8 and 4 bits on the same items; the exit status is 1 where even 4 bits can't be shown to be within."""
    from rich.console import Console
    from rich.markup import escape
    from transformers.utils import logging

    from course.capstone import rule as ruling

    logging.disable_progress_bar()
    console = Console(highlight=False)
    with console.status(f"measuring {escape(base)} in 16, 8 and 4 bits"):
        verdict = ruling.rule(base, adapter, items, rows, tolerance)
    words = str(verdict)
    console.print(
        f"What {escape(base)} loses against 16 bits, with its 95 % interval; below zero something is gained. Unknown: not enough data."
    )
    if "certain words" in words:
        console.print("Certain words: those where only one can follow, a fact or a sum; the share that is right.")
    console.print(escape(words), soft_wrap=True)
    if verdict.choice != "4-bit":
        raise typer.Exit(1)
