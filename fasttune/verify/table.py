"""The results as a table that fits the terminal, failures last, with every fix to be copied."""

from collections import Counter

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fasttune.verify import Result, Status

STYLES: dict[Status, str] = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def show(results: list[Result], stack_name: str, console: Console) -> None:
    """The table, failures last; below it every fix in full, unwrapped, to be copied."""
    order: tuple[Status, ...] = ("skip", "pass", "warn", "fail")
    rules = [result for result in results if result.name.startswith("rule:") and result.status == "pass"]
    rows = [result for result in results if result not in rules]
    if rules:
        rows.append(Result("rules", "pass", f"{len(rules)} version rules hold"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True, justify="right")
    for result in sorted(rows, key=lambda row: order.index(row.status)):
        took = f"{result.seconds:.1f} s" if result.seconds >= 0.05 else ""
        table.add_row(
            Text(result.status, STYLES[result.status]), Text(result.name), Text(result.detail), Text(took, "dim")
        )
    console.print(table)
    for result in sorted(results, key=lambda row: order.index(row.status)):
        if result.fix and result.status in ("warn", "fail"):
            console.print(
                Text.assemble("\n", (f"{result.status} {result.name}: ", STYLES[result.status]), "mend it with")
            )
            console.print(Text(f"  {result.fix}"), soft_wrap=True)
    count = Counter(result.status for result in results)
    summary = ", ".join(f"{count[status]} {status}" for status in reversed(order) if count[status])
    ok = not count["fail"]
    verdict = ("This environment works" if ok else "This environment is broken", "bold green" if ok else "bold red")
    console.print(Text.assemble("\n", verdict, f" (stack {stack_name}): {summary}"))
