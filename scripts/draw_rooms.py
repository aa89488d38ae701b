"""Writes docs/architecture.svg, the rooms and who imports whom, and docs/api.md, the public names by room.

    python scripts/draw_rooms.py

Both are read off the source, so that they stay true; a test holds that they are up to date.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, PICTURE, API = ROOT / "subtuning_lab", ROOT / "docs" / "architecture.svg", ROOT / "docs" / "api.md"
#: what the house calls its floors, from the top, and the rooms on each
FLOORS = {
    "command line": ("cli",),
    "notebooks": ("notebook", "report"),
    "pictures": ("plots",),
    "questions": ("experiments",),
    "rivals, theory": ("baselines", "theory", "criteria"),
    "lab": ("study", "search"),
    "engine": ("engine", "inference"),
    "ground": ("nets", "data"),
    "floor": ("utils",),
}
ROOMS = [room for rooms in reversed(FLOORS.values()) for room in rooms]
_WIDTH, _FLOOR, _BOX, _TALL = 960, 84, 270, 50
_STYLE = """text{font-family:system-ui,sans-serif;fill:#1b1f24}.name{font-weight:600;font-size:15px}
.says{font-size:10.5px;fill:#4a5560}.floor{font-size:12px;fill:#4a5560;font-style:italic}
rect{fill:#eef4f9;stroke:#0072B2}path{fill:none;stroke:#888;stroke-width:1.3;marker-end:url(#tip)}"""


def imports() -> dict[str, set[str]]:
    """Room -> the rooms whose modules it imports, wherever in the file."""
    return {
        room: {other for path in (PACKAGE / room).rglob("*.py") for other in _rooms_in(path)} - {room} for room in ROOMS
    }


def arrows(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that no others imply: without those of a room that another imported one imports itself."""
    return [
        (room, other)
        for room in ROOMS
        for other in sorted(graph[room], key=ROOMS.index)
        if not any(other in _below(graph, third) for third in graph[room] - {other})
    ]


def picture() -> str:
    """The rooms, floor by floor, as SVG."""
    places = dict(_places())
    paths = [_arrow(places[room], places[other]) for room, other in arrows(imports())]
    boxes = [_box(room, *place) for room, place in places.items()]
    names = [
        f'<text class="floor" x="8" y="{number * _FLOOR + 40}">{escape(name)}</text>'
        for number, name in enumerate(FLOORS)
    ]
    height = len(FLOORS) * _FLOOR + 8
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img"'
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    return "\n".join(
        [
            f'{head} aria-label="The rooms of the package; arrows say who imports whom">',
            f'<style>{_STYLE}</style><defs>{tip}<path d="M0,0L8,4L0,8" style="marker-end:none"/></marker></defs>',
            f'<rect width="{_WIDTH}" height="{height}" style="fill:white;stroke:none"/>',
            *names,
            *paths,
            *boxes,
            "</svg>\n",
        ]
    )


def api() -> str:
    """The public names by room, each with the first line of its docstring, as Markdown."""
    import subtuning_lab as lab

    parts = [
        "# Public names",
        "Written by `python scripts/draw_rooms.py`. An example of each is in [examples.md](examples.md).",
    ]
    for room in ROOMS:
        names = getattr(importlib.import_module(f"subtuning_lab.{room}"), "__all__", [])
        if room == "cli" or not names:
            continue
        module, below = getattr(lab, room), room in FLOORS["notebooks"]
        rows = [f"| `{name}` | {_first_line(getattr(module, name))} |" for name in sorted(names, key=str.lower)]
        title = f"## {room}: `lab.{room}.NAME`" if below else f"## {room}: `lab.NAME`"
        parts.append("\n".join([title, "", (module.__doc__ or "").strip(), "", "| name | |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _rooms_in(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("subtuning_lab."):
            yield node.module.split(".")[1]


def _below(graph: dict[str, set[str]], room: str) -> set[str]:
    """All rooms that a room imports, directly or through others."""
    return set().union(*({other} | _below(graph, other) for other in graph[room]))


def _places() -> Iterator[tuple[str, tuple[float, float]]]:
    for number, rooms in enumerate(FLOORS.values()):
        gap = (_WIDTH - 110 - len(rooms) * _BOX) / (len(rooms) + 1)
        for place, room in enumerate(rooms):
            yield room, (110 + gap + place * (_BOX + gap), 8 + number * _FLOOR)


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    if start[1] == end[1]:  # neighbours on one floor
        left, right = (start[0] + _BOX, end[0]) if start[0] < end[0] else (start[0], end[0] + _BOX)
        return f'<path d="M{left:.0f},{start[1] + _TALL / 2:.0f} L{right:.0f},{end[1] + _TALL / 2:.0f}"/>'
    shift = 0.25 * (end[0] - start[0])
    x1, x2 = start[0] + _BOX / 2 + shift, end[0] + _BOX / 2 - shift
    return f'<path d="M{x1:.0f},{start[1] + _TALL:.0f} L{x2:.0f},{end[1]:.0f}"/>'


def _box(room: str, x: float, y: float) -> str:
    says = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    says = says.splitlines()[0].rstrip(".")
    says = says if len(says) < 50 else f"{says[:47]}..."
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{_BOX}" height="{_TALL}" rx="7"/>'
        f'<text class="name" x="{x + 12:.0f}" y="{y + 21:.0f}">{room}/</text>'
        f'<text class="says" x="{x + 12:.0f}" y="{y + 38:.0f}">{escape(says)}</text>'
    )


def _first_line(thing: object) -> str:
    text = thing.__doc__ if callable(thing) else f"`{thing!r}`" if isinstance(thing, str) else "constant"
    return (text or "").strip().splitlines()[0].replace("|", "\\|")


if __name__ == "__main__":
    for path, text in ((PICTURE, picture()), (API, api())):
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
