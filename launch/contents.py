"""``everstep checkpoints inspect | compare | export``: what is in checkpoints. torch is imported here, and only when asked for."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from launch.choosing import Chosen
from launch.tables import columns, finite, number, print_json
from supervisor.checkpoint.manifest import Key
from supervisor.wording import size

if TYPE_CHECKING:
    from supervisor.training.contents.compare import Change
    from supervisor.training.contents.opened import Contents, Item

_SHOWN = 20  # changed items, unless all are wanted
_STOCK = "no everstep.json, so nothing was verified"


def inspect(chosen: Chosen, *, only: str | None, json: bool) -> int:
    """The items of a checkpoint, by key."""
    from supervisor.training.contents.selection import under

    with _opened(chosen) as contents:
        items = under(contents, only)
        if json:
            verified = None if contents.manifest is None else "everything" if chosen.verified else "index"
            print_json({**_about(contents), "verified": verified, "items": [_plain(item) for item in items]})
            return 0
        for line in _heading(contents):
            print(line)
        print(
            _STOCK
            if contents.manifest is None
            else "verified"
            if chosen.verified
            else "verified: the index only"
        )
        print()
        rows = [("key", "shape", "dtype", "size", "parts")]
        rows += [
            (
                item.key,
                _shape(item),
                _dtype(item),
                size(_bytes(item)),
                str(item.parts) if item.is_tensor else "",
            )
            for item in items
        ]
        for line in columns(rows, right=(3, 4)):
            print(line)
        print()
        for line in columns(_summary(items), right=(1, 3)):
            print(line)
    return 0


def compare(
    a: Chosen,
    b: Chosen,
    *,
    only: str | None,
    weights_only: bool,
    every: bool,
    json: bool,
    shape_of_metric: str | None = None,
) -> int:
    """What changed from A to B: metrics, then items, those that changed most first. ``shape_of_metric`` is a plot's line."""
    from supervisor.training.contents.compare import compare as changes_of
    from supervisor.training.contents.selection import found_weights, under, weights

    with _opened(a) as left, _opened(b) as right:
        chosen = []
        for contents in (left, right):
            items = under(contents, only)
            if weights_only:
                allowed = {item.key for item in weights(contents)}
                items = [item for item in items if item.key in allowed]
            chosen.append(items)
        for contents, items, one in zip((left, right), chosen, (a, b), strict=True):
            if not one.verified:
                contents.verify(items)
        changes = list(changes_of(left, right, *chosen))
        if json:
            names = sorted({*_metrics(left), *_metrics(right)})
            print_json(
                {
                    "a": _about(left),
                    "b": _about(right),
                    "metrics": {
                        name: {"a": _metrics(left).get(name), "b": _metrics(right).get(name)}
                        for name in names
                    },
                    "items": [_plain_change(change) for change in changes],
                    "summary": dict(Counter(change.kind for change in changes)),
                }
            )
            return 0
        for letter, contents in (("A", left), ("B", right)):
            lines = [*_heading(contents), *([_STOCK] if contents.manifest is None else [])]
            print(f"{letter}  " + "\n   ".join(lines))
        _print_metrics(left, right)
        if shape_of_metric is not None:
            print(f"\n{shape_of_metric}")
        _print_changes(changes, {item.key for one in (left, right) for item in found_weights(one)}, every)
    return 0


def export(
    chosen: Chosen,
    target: Path,
    *,
    weights_only: bool,
    only: str | None,
    max_shard_size: str | None,
    json: bool,
) -> int:
    """Write ``target``; a line on what, and one on what was left out."""
    from supervisor.training.contents import export as exports

    limit = None if max_shard_size is None else exports.parse_size(max_shard_size)
    exports.check_target(target, limit)
    with _opened(chosen) as contents:
        done = exports.export(
            contents,
            target,
            weights_only=weights_only,
            only=only,
            max_shard_size=limit,
            verified=chosen.verified,
        )
        if json:
            print_json(
                {
                    **_about(contents),
                    "verified": contents.manifest is not None,
                    "files": [str(file) for file in done.files],
                    "tensors": done.tensors,
                    "bytes": done.bytes,
                    "left_out": [*done.objects, *done.other_ranks],
                }
            )
            return 0
        what = "weights" if weights_only else "tensors"
        files = f" ({len(done.files)} files)" if len(done.files) > 1 else ""
        print(f"{done.tensors} {what}, {size(done.bytes)}, of {_name(contents)} are in {target}{files}")
        if contents.manifest is None:
            print(_STOCK)
        if done.objects:
            print(f"left out, for they are no tensors: {_some(done.objects)}")
        if done.other_ranks:
            print(f"left out, for a lower rank has its own: {_some(done.other_ranks)}")
    return 0


def _opened(chosen: Chosen) -> Contents:
    from supervisor.training.contents.opened import Contents

    return Contents(chosen.path, Key.from_environment(), manifest=chosen.manifest, name=str(chosen.where))


# --------------------------------------------------------------------------- words


def _name(contents: Contents) -> str:
    return contents.name if contents.manifest is None else f"step {contents.manifest.step}"


def _heading(contents: Contents) -> list[str]:
    if contents.manifest is None:
        return [contents.name]
    origin = contents.manifest.origin
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(origin.created))
    ranks = f"{origin.world_size} rank" + ("s" if origin.world_size != 1 else "")
    torch = f", torch {origin.versions['torch']}" if "torch" in origin.versions else ""
    return [
        f"step {origin.step}  {contents.name}",
        f"made {made} in attempt {origin.attempt} by {ranks}{torch}",
    ]


def _summary(items: list[Item]) -> list[tuple[str, str, str, str]]:
    """For each object of the state: how many tensors and bytes."""
    rows = []
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(str(item.path[0]).partition(".")[0], []).append(item)
    for name, group in [*groups.items(), ("together", items)]:
        tensors = [item for item in group if item.is_tensor]
        others = len(group) - len(tensors)
        counts = f"{len(tensors)} tensors" + (f", {others} other values" if others else "")
        rows.append(
            (
                name,
                f"{sum(item.elements for item in tensors):,} elements",
                counts,
                size(sum(map(_bytes, group))),
            )
        )
    return rows


def _print_metrics(a: Contents, b: Contents) -> None:
    one, other = _metrics(a), _metrics(b)
    if not one and not other:
        return
    rows = [("metric", "A", "B", "B - A")]
    for name in sorted({*one, *other}):
        both = name in one and name in other
        rows.append(
            (
                name,
                _value(one.get(name)),
                _value(other.get(name)),
                f"{other[name] - one[name]:+.4g}" if both else "",
            )
        )
    print()
    for line in columns(rows, right=(1, 2, 3)):
        print(line)


def _print_changes(changes: list[Change], firsts: set[str], every: bool) -> None:
    """The ``firsts``, weights, before all else: an optimizer's state changes more, and matters less."""
    different = [change for change in changes if change.kind != "same"]
    different.sort(key=lambda change: (change.kind == "changed", change.key not in firsts, -_amount(change)))
    shown = changes if every else different[:_SHOWN]
    print()
    if shown:
        rows: list[tuple[str, ...]] = [
            ("item", "", "shape", "|A|", "|B|", "|B-A|/|A|", "max |B-A|", "differ")
        ]
        rows += [_row(change) for change in shown]
        for line in columns(rows, right=(3, 4, 5, 6, 7)):
            print(line)
        if len(shown) < len(different):
            print(f"… and {len(different) - len(shown)} more that differ (--all shows every item)")
        print()
    groups: dict[str, list[Change]] = {}
    for change in changes:
        item = change.a or change.b
        assert item is not None
        groups.setdefault(str(item.path[0]).partition(".")[0], []).append(change)
    for line in columns([_total(name, group) for name, group in groups.items()]):
        print(line)


def _total(name: str, changes: list[Change]) -> tuple[str, ...]:
    """One object of the state: how many items of each kind, and the change of its tensors together."""
    counts = Counter(change.kind for change in changes)
    told = ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts, key=lambda kind: -counts[kind]))
    pairs = [(change.norm_a or 0.0, change.difference) for change in changes if change.difference is not None]
    whole = math.hypot(*(norm for norm, _ in pairs))
    moved = math.hypot(*(difference for _, difference in pairs))
    return name, told, f"|B-A|/|A| {moved / whole:.4g}" if whole else ""


def _amount(change: Change) -> float:
    """How much a change matters, for the order."""
    if change.relative is None or math.isnan(change.relative):
        return math.inf if change.elements else -1.0
    return change.relative


def _row(change: Change) -> tuple[str, ...]:
    item = change.b if change.a is None else change.a
    assert item is not None
    shape = _shape(item)
    if change.a is not None and change.b is not None:
        if change.kind == "reshaped":
            shape = f"{_shape(change.a)} → {_shape(change.b)}"
        elif change.kind == "retyped":
            shape = f"{_dtype(change.a)} → {_dtype(change.b)}"
    if change.value_a is not None and change.value_b is not None and change.kind != "same":
        shape = f"{change.value_a} → {change.value_b}"
    share = f"{change.elements / item.elements:.1%}" if change.elements and item.elements else ""
    same = change.kind == "same"
    return (
        change.key,
        str(change.kind),
        shape,
        _value(change.norm_a),
        _value(change.norm_b),
        "" if same else _value(change.relative),
        "" if same else _value(change.largest),
        share,
    )


def _shape(item: Item) -> str:
    if item.shape is None:
        return "object"
    return "×".join(map(str, item.shape)) or "scalar"


def _dtype(item: Item) -> str:
    return "" if item.dtype is None else str(item.dtype).removeprefix("torch.")


def _bytes(item: Item) -> int:
    """Of a tensor's elements; of anything else, as stored."""
    return item.bytes if item.dtype is None else item.elements * item.dtype.itemsize


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more


# --------------------------------------------------------------------------- for programs


def _metrics(contents: Contents) -> dict[str, float]:
    return {} if contents.manifest is None else finite(contents.manifest.origin.metrics)


def _about(contents: Contents) -> dict[str, object]:
    about: dict[str, object] = {"path": contents.name, "step": None, "metrics": _metrics(contents)}
    if contents.manifest is not None:
        origin = contents.manifest.origin
        about |= {
            "step": origin.step,
            "attempt": origin.attempt,
            "world_size": origin.world_size,
            "created": origin.created,
            "versions": dict(origin.versions),
        }
    return about


def _plain(item: Item) -> dict[str, object]:
    return {
        "key": item.key,
        "rank": item.owner,
        "shape": None if item.shape is None else list(item.shape),
        "dtype": _dtype(item) or None,
        "bytes": _bytes(item),
        "bytes_stored": item.bytes,
        "parts": item.parts,
        "files": sorted(item.files),
    }


def _plain_change(change: Change) -> dict[str, object]:
    return {
        "key": change.key,
        "kind": str(change.kind),
        "shape_a": None if change.a is None or change.a.shape is None else list(change.a.shape),
        "shape_b": None if change.b is None or change.b.shape is None else list(change.b.shape),
        "dtype_a": None if change.a is None else _dtype(change.a) or None,
        "dtype_b": None if change.b is None else _dtype(change.b) or None,
        "norm_a": number(change.norm_a),
        "norm_b": number(change.norm_b),
        "difference": number(change.difference),
        "relative": number(change.relative),
        "largest": number(change.largest),
        "elements": change.elements,
        "value_a": change.value_a,
        "value_b": change.value_b,
    }
