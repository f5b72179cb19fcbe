"""Pages of what the benchmarks gave: every file under ``benchmarks/recorded`` as tables that can be sorted, with where they are from."""

import html
import json
from pathlib import Path
from typing import Any

from course.bench import abouts
from course.bench import results as measured_by
from course.website.texts import raw, table

ROWS, COLUMNS = 200, 60  # of one table; the file has them all, and what is wider is shown entry by entry


def pages(root: Path) -> dict[str, str]:
    """Name -> page, for each benchmark that has a result, and ``index``."""
    results: dict[str, list[tuple[Path, dict]]] = {}
    for path in sorted((root / "benchmarks" / "recorded").glob("*/*.json")):
        results.setdefault(path.stem, []).append((path, json.loads(path.read_text(encoding="utf-8"))))
    if not results:
        return {}
    about, by, made, rows = abouts(root), measured_by(root), {}, []
    for name, found in sorted(results.items()):
        said = about.get(by[name], "")
        made[name] = "\n\n".join([f"# {_words(name)}", html.escape(said), *(_device(path, entry, root) for path, entry in found)]) + "\n"
        rows += [
            (
                f'<a href="{name}.html#{_slug(entry["device"])}">{_words(name)}</a>',
                html.escape(said),
                entry["device"],
                f"<time>{entry['day']}</time>",
            )
            for _, entry in found
        ]
    body = (f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    entries = "\n".join(made)
    said = "What `course bench` recorded: each figure of the course that needs a GPU, or minutes, comes from here."
    listed = raw(table(("measured", "what", "on", "day"), body, "", "Measurements"))
    made["index"] = f"# Measurements\n\n{said}\n\n{listed}\n\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n"
    return made


def _slug(words: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in words.lower()).split())


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _device(path: Path, entry: dict, root: Path) -> str:
    versions = " · ".join(f"{package} {version}" for package, version in entry.get("versions", {}).items())
    file = f'<a href="{path.relative_to(root / "benchmarks").as_posix()}" download>{path.name}</a>'
    where = f'<p class="provenance">Recorded on {entry["day"]} with {html.escape(versions)} · {file}</p>'
    tables = _shown(entry["result"], f"{_words(entry['name'])} on {entry['device']}")
    return f"## {entry['device']}\n\n{raw(where + tables)}"


def _shown(value: Any, title: str) -> str:
    """A result as tables: single values together, rows of one kind as one table, and what is deeper under a name of its own."""
    if not isinstance(value, dict):
        value = {"": value}
    single = {key: each for key, each in value.items() if _is_single(each)}
    parts = [_table([{"setting": _words(key), "value": each} for key, each in single.items()], title)] if single else []
    for key, each in value.items():
        if key in single or each in ([], {}):
            continue
        name = f"{title}: {_words(key)}" if key else title
        rows = _rows(each)
        inside = _table(rows, name) if rows else _shown(dict(enumerate(each)) if isinstance(each, list) else each, name)
        parts.append(f'<p class="tablename">{html.escape(_words(key))}</p>{inside}' if key != "" else inside)
    return "\n".join(parts)


def _is_single(value: Any) -> bool:
    return not isinstance(value, (dict, list)) or (isinstance(value, list) and not any(isinstance(each, (dict, list)) for each in value))


def _rows(value: Any) -> list[dict] | None:
    """``value`` as rows of a table, or None if it is none: a list or a dictionary of dictionaries that are not deep."""
    if isinstance(value, dict):
        named = {_words(key): each for key, each in value.items()}
        entries = [{"": key, **each} if isinstance(each, dict) else {"": key, "value": each} for key, each in named.items()]
        alike = all(isinstance(each, dict) for each in value.values()) or all(map(_is_single, value.values()))
    else:
        entries = [each if isinstance(each, dict) else {"value": each} for each in value]
        alike = all(isinstance(each, dict) for each in value) or all(map(_is_single, value))
    rows = [_flat(entry) for entry in entries]
    columns = {column for row in rows for column in row}
    return rows if alike and len(columns) <= COLUMNS else None


def _flat(entry: dict, before: str = "") -> dict:
    found = {}
    for key, value in entry.items():
        found |= _flat(value, f"{before}{key} · ") if isinstance(value, dict) else {f"{before}{key}": value}
    return found


def _table(rows: list[dict], name: str) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    heads = [html.escape(_words(column)) or "name" for column in columns]
    body = (f"<tr>{''.join(_cell(row.get(column)) for column in columns)}</tr>" for row in rows[:ROWS])
    more = f'<p class="provenance">{len(rows) - ROWS:,} more rows are in the file.</p>' if len(rows) > ROWS else ""
    return table(heads, body, "recorded", name) + more


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return f"<td>{ {True: 'yes', False: 'no', None: ''}[value] }</td>"
    if value == []:
        return "<td>none</td>"
    if isinstance(value, (int, float)):
        return f'<td class="number" data-value="{value!r}" title="{value!r}">{_number(value)}</td>'
    if isinstance(value, list):
        words = ", ".join(_number(each) if isinstance(each, (int, float)) else str(each) for each in value[:12])
        return f"<td>{html.escape(words)}{f', … ({len(value)} in all)' if len(value) > 12 else ''}</td>"
    text = str(value)
    return f"<td>{html.escape(text if len(text) <= 300 else text[:300] + ' …')}</td>"


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
