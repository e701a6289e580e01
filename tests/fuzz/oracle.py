# SPDX-License-Identifier: MIT
"""A second reading of a data folder, written for plainness, to tell when the script has read something else.

It raises Bad where a file cannot be right. `doubts` lists what may be refused or read, as the script likes.
"""

import ast
import itertools
import json
import os
import re
from pathlib import Path

from .common import EXTRA, SPLITS

RESERVED = "<next>", "<start>"


class Bad(Exception):
    doubts = ()  # of what was read before

    def __init__(self, file, why, lines=()):
        super().__init__(f"{file}, line {'-'.join(map(str, lines))}: {why}" if lines else f"{file}: {why}")
        self.file, self.lines = file, lines


class Reading:
    def __init__(self, folder, max_history):
        self.folder, self.H, self.doubts, self.tables, self.orders = Path(folder), max_history, [], {}, {}
        self.source = next((x for x in ("index.json", "catalogue.json") if (self.folder / x).is_file()), None)
        if not self.source:
            raise Bad("", "no catalogue")
        self.csv = self.source == "index.json"
        self.ending = ".csv" if self.csv else ".jsonl"
        self.sids = self.read_catalogue()
        self.items = {self.joined(sid): i for i, sid in enumerate(self.sids)}
        endings = [kind + packed for kind in (".csv", ".tsv", ".json", ".jsonl") for packed in ("", ".gz")]
        for found in sorted(os.listdir(self.folder)):
            for name, ending in itertools.product(EXTRA, endings):
                if found.lower() == name + ending and found != name + self.ending:
                    raise Bad(found, f"of another layout than {self.source}")
        for name in [*SPLITS, *EXTRA]:
            path = self.folder / (name + self.ending)
            if name in SPLITS or path.is_symlink() or path.exists():
                rows = (self.csv_rows if self.csv else self.jsonl_rows)(path.name, name == "log")
                try:
                    self.tables[name] = list(rows)
                except Bad as error:
                    error.doubts = self.doubts
                    raise
                if not self.tables[name]:
                    raise Bad(path.name, "no rows")
        clicks = [any(click) for _, _, click, _ in self.tables.get("log", ())]
        if clicks and not any(clicks):
            raise Bad("log" + self.ending, "no click")
        if clicks and not any(clicks[: len(clicks) // 2]):
            self.doubts.append("no click in what is not held out")

    def joined(self, sid):
        return "".join(sid) if self.csv and all(isinstance(x, str) for x in sid) else repr(list(sid))

    def text(self, name):
        try:
            text = (self.folder / name).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Bad(name, str(error)) from None
        text = text[1:] if text.startswith("\ufeff") else text
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def json(self, file, text, lines=()):
        twice = []

        def pairs(found):
            keys = [key for key, _ in found]
            twice.extend(key for key in set(keys) if keys.count(key) > 1)
            return dict(found)

        depth = longest = 0
        for c in re.findall(r"[\[{}\]]", text):
            depth += 1 if c in "[{" else -1
            longest = max(longest, depth)
        if longest > 200:
            self.doubts.append("deep nesting")
        try:
            found = json.loads(text, object_pairs_hook=pairs)
        except (ValueError, RecursionError) as error:
            raise Bad(file, f"not JSON: {str(error)[:80]}", lines) from None
        if twice:
            self.doubts.append("a key twice, of which the last one counts")
        return found

    def read_catalogue(self):
        file, found = self.source, []
        entries = self.json(file, self.text(file))
        if not isinstance(entries, list | dict) or not entries:
            raise Bad(file, "no items")
        for sid in entries.values() if isinstance(entries, dict) else entries:
            if not isinstance(sid, list) or not sid or any(type(x) not in (int, str) for x in sid):
                raise Bad(file, "not a list of tokens")
            if found and [*map(type, sid)] != [*map(type, found[0])]:
                raise Bad(file, "tokens of various sorts")
            if any(isinstance(x, str) and (x in RESERVED or not x.isprintable()) for x in sid):
                raise Bad(file, "reserved, or not printable")
            if any(re.search(r"><(._|(next|start)\b)", str(x)) for x in sid):
                raise Bad(file, "a token that would be two words")
            if file == "index.json" and not all(re.fullmatch("<[^<>]+>", str(x)) for x in sid):
                raise Bad(file, "a token that a cell could not hold")
            if any(x == "" for x in sid):
                self.doubts.append("an empty token")
            if sid not in found:
                found.append(sid)
        return found

    def item(self, file, sid, lines):
        key = sid if self.csv and isinstance(sid, str) else None
        key = self.joined(sid) if not self.csv and isinstance(sid, list) else key
        if not self.csv and isinstance(sid, list) and any(type(x) not in (int, str) for x in sid):
            raise Bad(file, "not a Semantic ID", lines)
        if key not in self.items:
            raise Bad(file, "not a Semantic ID of the catalogue", lines)
        return self.items[key]

    def row(self, file, row, lines, log):
        """{field: value} -> (history, target), or (history, shown, click, order) of a log."""
        history = row.get("history")
        if not isinstance(history, list) or (not history and not log):
            raise Bad(file, "no history", lines)
        history = [self.item(file, sid, lines) for sid in history][-self.H :]
        if not log:
            return history, self.item(file, row.get("target"), lines)
        shown, click, order = row.get("shown"), row.get("click"), row.get("order")
        if not isinstance(shown, list) or not shown:
            raise Bad(file, "nothing shown", lines)
        shown = [self.item(file, sid, lines) for sid in shown]
        for x in (click,) if order is None else (click, order):
            if not isinstance(x, list) or len(x) != len(shown) or any(type(y) not in (int, bool) for y in x):
                raise Bad(file, "clicks or orders that do not fit", lines)
            if any(y not in (0, 1) for y in x):
                raise Bad(file, "clicks or orders that are not 0 or 1", lines)
        if order is not None and any(o > c for o, c in zip(order, click, strict=True)):
            raise Bad(file, "an order without a click", lines)
        if (order is None) != (self.orders.setdefault(file, order is None)):
            raise Bad(file, "orders in some rows only", lines)
        return history, shown, [*map(int, click)], None if order is None else [*map(int, order)]

    def jsonl_rows(self, file, log):
        text = self.text(file).rstrip()
        for line, text_of_row in enumerate(text.split("\n") if text else (), 1):
            row = self.json(file, text_of_row, [line])
            if not isinstance(row, dict):
                raise Bad(file, "not a dictionary", [line])
            yield self.row(file, row, [line], log)

    def csv_rows(self, file, log):
        records = self.records(file, self.text(file).rstrip())
        fields = dict(history="history_item_sid", target="item_sid")
        if log:
            fields = dict(history="history_item_sid", shown="shown_item_sid", click="click", order="order")
        lines, header = next(records, ([1], []))
        for field, column in fields.items():
            if header.count(column) != 1 and (field != "order" or column in header):
                raise Bad(file, f"not one column {column}", [1, *lines])
        for lines, cells in records:
            if not cells:
                continue
            if len(cells) != len(header):
                self.doubts.append(f"{file}, line {lines}: more or fewer cells than columns")
            named = dict(zip(header, cells, strict=False))
            row = {field: named.get(column) for field, column in fields.items()}
            row = {field: x if field == "target" or x is None else self.literal(file, x, lines, field)
                   for field, x in row.items()}
            yield self.row(file, row, lines, log)

    def literal(self, file, cell, lines, field):
        """A list as Python or JSON writes it. Other spellings than these two may be refused as well."""
        if field in ("click", "order") and cell.lower() != cell:
            cell = re.sub(r"\b(true|false)\b", lambda x: x[0].title(), cell.lower())
        found = []
        for read in (ast.literal_eval, json.loads):
            try:
                found.append(read(cell))
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                continue
        if not found:
            raise Bad(file, f"not a list: {cell[:40]!r}", lines)
        if repr(found[0]) != cell and json.dumps(found[0]) != cell:
            self.doubts.append(f"{file}, line {lines}: another spelling of a list")
        if any(x != found[0] for x in found):
            self.doubts.append("two meanings")
        return found[-1]

    def records(self, file, text):
        """(lines, cells) of each record, by the rules of RFC 4180; quotes that do not match are Bad."""
        cells, cell, state, line, first = [], "", "start", 1, 1
        for c in [*text, "\n"] if text else ():
            if state == "quoted":
                if c == '"':
                    state = "closed"
                else:
                    cell, line = cell + c, line + (c == "\n")
            elif c == '"' and state == "closed":  # two quotes within quotes are one
                cell, state = cell + c, "quoted"
            elif c == '"' and state == "start":
                state = "quoted"
            elif c in ",\n":
                if c == "," or cells or state != "start":
                    cells.append(cell)
                cell, state = "", "start"
                if c == "\n":
                    yield [*range(first, line + 1)], cells
                    cells, line = [], line + 1
                    first = line
            elif state == "closed":
                raise Bad(file, f"{c!r} behind a closing quote", [*range(first, line + 1)])
            else:
                cell, state = cell + c, "plain"
        if state != "start" or cells:
            raise Bad(file, "a quote that is never closed", [*range(first, line + 1)])
