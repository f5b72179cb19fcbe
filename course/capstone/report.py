"""What a run found, for three readers: a terminal, a program, and somebody who gets a link."""

import html
import json
from pathlib import Path

from course.lab.meters import show_bytes


def write(result: dict, out: Path) -> None:
    """``report.json`` and ``report.html`` into ``out``; never half a file."""
    for name, text in (("report.json", json.dumps(result, indent=1) + "\n"), ("report.html", page(result))):
        partial = out / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / name)


def number(value: float, unit: str) -> str:
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.3f}"


def difference(change: dict) -> str:
    """After less before, with its interval, in the measure's own direction: a loss that falls is negative, a share that rises positive."""
    sign = 1 if change["unit"] == "nats" else -1
    ends = sorted(sign * change["lost"][key] for key in ("low", "high"))
    scale, digits = (1, 3) if change["unit"] == "nats" else (100, 1)
    middle, low, high = (f"{round(scale * value, digits) + 0.0:+.{digits}f}" for value in (sign * change["lost"]["estimate"], *ends))
    return f"{middle} ({low} to {high})"


def sentence(change: dict) -> str:
    unit = " nats" if change["unit"] == "nats" else " points"
    before, after = (number(change[key], change["unit"]) for key in ("before", "after"))
    return f"{change['name']}: {before} → {after}, {difference(change)}{unit}: {change['verdict']}"


def merge_sentence(merge: dict) -> str:
    others = "".join(f"; {way}: {error:.1e}" for way, error in merge["others"].items())
    return (
        f"{merge['way']}: error {merge['error']:.1e} of the trained weight, {merge['update_lost']:.1e} of the update"
        f"{' (other ways' + others + ')' if others else ''}"
    )


def export_sentence(each: dict) -> str:
    if each["logits"] is None:
        return f"{each['kind']}: missing; {each['words']}"
    lost, changed = each["lost"], each["changed"]
    told = f"{each['kind']}: {show_bytes(each['bytes'])}, {f'{100 * changed:.1f} % of answers' if changed else 'no answer'} changed, "
    if each["logits"] == 0:
        told += "logits equal to the bit"
    else:
        told += f"logits within {each['logits']:.1e}, loss by {lost['estimate']:+.1e} nats ({lost['low']:+.1e} to {lost['high']:+.1e})"
    return told + (f"; {each['words']}" if each["words"] else "")


def judgement(verdict: dict) -> str:
    """In a few words."""
    if not verdict["ready"]:
        return "Not ready."
    return "Ready, if you accept this." if verdict["decide"] else "Ready."


def card(result: dict) -> str:
    """The adapter's README: what it is, on what, how well, and under which terms."""
    plan = result["plan"]
    rows = "\n".join(
        f"| {c['name']} | {number(c['before'], c['unit'])} | {number(c['after'], c['unit'])} | {difference(c)} |"
        for c in result["learned"] + result["forgotten"]
    )
    return f"""---
base_model: {result["base"]["name"]}
library_name: peft
license: {plan["licence"] or "unknown"}
---
{plan["method"]}, r = {plan["r"]}, alpha = {plan["lora_alpha"]:g}, targets {plan["targets"]}; {plan["steps"]} steps of
{plan["batch"]} rows at {plan["lr"]:g}, {100 * plan["replay"]:g} % replay; {result["data"]["train"]} rows.
The base's weights have SHA-256 {result["base"]["sha256"]}.

| measure | before | after | difference (95 %) |
|---|---|---|---|
{rows}
"""


def table(result: dict):
    """For a terminal, of rich."""
    from rich.table import Table

    made = Table("measure", "before", "after", "difference (95 %)", "", box=None, header_style="bold", padding=(0, 2, 0, 0))
    colours, short = {"better": "green", "worse": "red"}, {"no difference shown": "not shown"}  # 80 columns hold it
    for change in result["learned"] + result["forgotten"]:
        colour = colours.get(change["verdict"], "yellow")
        before, after = (number(change[key], change["unit"]) for key in ("before", "after"))
        made.add_row(
            change["name"], before, after, difference(change), f"[{colour}]{short.get(change['verdict'], change['verdict'])}[/{colour}]"
        )
    return made


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; background: #fff }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #ccc; vertical-align: top }
td { font-variant-numeric: tabular-nums }
h1 { line-height: 1.2 }
pre, .wide { overflow-x: auto }
svg { max-width: 100%; height: auto }
.good { color: #0a5c2b }
.bad { color: #9b1c1c }
.open { color: #6b4e00 }
.verdict ul { list-style: none; padding: 0 }
.verdict { padding: .8rem 1rem; border-left: .4rem solid; background: #f5f5f5 }
"""
CLASSES = {"better": "good", "worse": "bad", "passed": "good", "failed": "bad"}


def page(result: dict) -> str:
    """One HTML file without anything from outside."""
    e, verdict = html.escape, result["verdict"]
    changes = [
        (
            e(c["name"]),
            number(c["before"], c["unit"]),
            number(c["after"], c["unit"]),
            f"{difference(c)} {'nats' if c['unit'] == 'nats' else 'points'}",
            f'<span class="{CLASSES.get(c["verdict"], "open")}">{c["verdict"]}</span>',
        )
        for c in result["learned"] + result["forgotten"]
    ]
    there = sorted(result["memory"]["there"].items(), key=lambda pair: -pair[1])
    said = [tuple(e(str(each[key])) for key in ("asked", "right", "before", "after")) for each in result["samples"]]
    exports = [(e(each["kind"]), e(export_sentence(each).partition(": ")[2])) for each in result["exports"]]
    colour = "bad" if not verdict["ready"] else "open" if verdict["decide"] else "good"
    reasons = "".join(
        f'<li class="{kind}">{mark} {e(words)}</li>'
        for mark, kind, found in (("✗", "bad", verdict["against"]), ("?", "open", verdict["decide"]))
        for words in found
    )
    body = f"""<h1>{e(result["memory"]["title"])}</h1>
<div class="verdict {colour}"><strong>{judgement(verdict)}</strong>{f"<ul>{reasons}</ul>" if reasons else ""}</div>
<h2>Before and after, on the same items</h2>{rows(("measure", "before", "after", "difference (95 %)", ""), changes)}
<h2>Training</h2>{curve(result["training"]["losses"])}
<p>{len(result["training"]["losses"])} steps, {result["training"]["seconds"]:.0f} s; {result["training"]["trained"]:,} numbers trained of
{result["base"]["parameters"]:,} in the base. {e(result["device"])}.</p>
<h2>What it says</h2>{rows(("asked", "right", "before", "after"), said)}
<h2>Merge and exports</h2><p>Merged {e(merge_sentence(result["merge"]))}.</p>{rows(("export", "loaded again"), exports)}
<h2>Memory, as predicted</h2>
<p>{result["memory"]["peak"] / 1e9:.3g} GB at the fullest moment of a step, {e(result["memory"]["moment"])}.</p>
{rows(("kind", "bytes"), [(e(kind), show_bytes(size)) for kind, size in there])}
<h2>Data</h2><ul>{"".join(f"<li>{e(words)}</li>" for words in result["data"]["words"] + result["base"]["words"])}</ul>
<h2>Plan</h2><pre><code>{e(toml(result["plan"]))}</code></pre>"""
    return document(f"Run: {result['memory']['title']}", body)


def document(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )


def rows(heads: tuple[str, ...], lines: list[tuple]) -> str:
    """A table; its cells are HTML already."""
    head = "".join(f'<th scope="col">{each}</th>' for each in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def curve(losses: list[float], width: int = 640, height: int = 180) -> str:
    """The loss of each step as an SVG line."""
    top, left = max(losses), 45
    places = [
        f"{left + (width - left) * i / max(1, len(losses) - 1):.1f},{height - 25 - (height - 40) * loss / top:.1f}"
        for i, loss in enumerate(losses)
    ]
    words = f"Loss in nats over the steps, from {losses[0]:.2f} to {losses[-1]:.2f}"
    line = f'<polyline fill="none" stroke="#0072b2" stroke-width="1.5" points="{" ".join(places)}"/>'
    marks = [(0, 20, "start", f"{top:.2f}"), (0, height - 25, "start", "0"), (left, height - 5, "start", "step 1")]
    marks.append((width, height - 5, "end", f"step {len(losses)}"))
    texts = "".join(f'<text x="{x}" y="{y}" font-size="12" text-anchor="{anchor}">{text}</text>' for x, y, anchor, text in marks)
    drawn = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{words}">{line}{texts}</svg>'
    return f"{drawn}<p>Loss in nats per target.</p>"


def toml(plan: dict) -> str:
    """A plan as it can be given again."""
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in plan.items() if value is not None)


def audit_page(found: dict) -> str:
    """The findings of an audit as one HTML file."""
    e = html.escape
    lines = [
        (e(each["name"]), f'<span class="{CLASSES.get(each["state"], "open")}">{each["state"]}</span>', e(each["found"]), e(each["remedy"]))
        for each in found["findings"]
    ]
    failed, heads = found["counts"]["failed"], ("check", "", "found", "what to do")
    told = ", ".join(f"{count} {state}" for state, count in found["counts"].items() if count)
    if not any(each["remedy"] for each in found["findings"]):
        heads, lines = heads[:-1], [line[:-1] for line in lines]
    verdict = f'<div class="verdict {"bad" if failed else "good"}"><strong>{told}</strong></div>'
    where = f"<p>Adapter <code>{e(found['adapter'])}</code> on base <code>{e(found['base'])}</code>.</p>"
    body = f"<h1>Audit of an adapter</h1>{where}{verdict}{rows(heads, lines)}"
    return document("Audit of an adapter", body)
