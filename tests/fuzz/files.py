# SPDX-License-Identifier: MIT
"""Kind 1: a data folder with something wrong. It is read right, or refused in a line that says where."""

import contextlib
import csv
import io
import json
import os
import signal
import socket
import warnings

import nanoadagrpo as nano

from .common import Result, make_draw, make_shop, not_one_line, ordinary_user, remove
from .oracle import Bad, Reading

# -- damage to bytes and lines -------------------------------------------------------------------------------

ODD_BYTES = [b"\0", b"\x1b[31m", b"\xe2\x80\xa8", b"\xc2\x85", b"\x0b", b"\x1c", b"\x1a", b"\x7f",
             b"\xed\xa0\x80", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b'"', b"'", b",", b"\\", b"[",
             b"]", b"{", b"}", b"<", b">", b"\t", b" ", b"\xc2\xa0", b"\xf0\x9f\x98\x80", b"\xd9\xa3", b"-",
             b"0", b"\\ud800", b"\xe2\x80\xae"]


def flip(draw, raw):
    raw = bytearray(raw or b"\0")
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return bytes(raw)


def insert(draw, raw):
    at = draw.randint(0, len(raw))
    return raw[:at] + draw.choice(ODD_BYTES) * draw.choice([1, 1, 1, 2, 50]) + raw[at:]


def replace(draw, raw):
    at = draw.randrange(len(raw) or 1)
    return raw[:at] + draw.choice(ODD_BYTES) + raw[at + 1 :]


def cut(draw, raw):
    return raw[: draw.randint(0, len(raw))]


def cut_head(draw, raw):
    return raw[draw.randint(0, len(raw)) :]


def cut_middle(draw, raw):
    a, b = sorted(draw.randint(0, len(raw)) for _ in range(2))
    return raw[:a] + raw[min(b, a + 30) :]


def double(draw, raw):
    a, b = sorted(draw.randint(0, len(raw)) for _ in range(2))
    return raw[:b] + raw[a:]


def lines(change):
    def act(draw, raw):
        found = raw.splitlines(keepends=True) or [b""]
        return b"".join(change(draw, found, draw.randrange(len(found)), draw.randrange(len(found))))

    act.__name__ = change.__name__
    return act


@lines
def swap_lines(draw, x, i, j):
    x[i], x[j] = x[j], x[i]
    return x


@lines
def double_line(draw, x, i, j):
    return [*x[:i], x[i], *x[i:]]


@lines
def drop_line(draw, x, i, j):
    return x[:i] + x[i + 1 :]


@lines
def blank_line(draw, x, i, j):
    return [*x[:i], draw.choice([b"\n", b"\r\n", b"  \n", b"\t\n", b"\n\n\n", b",\n", b"\0\n",
                                 b"\xc2\x85\n"]), *x[i:]]


@lines
def join_lines(draw, x, i, j):
    return [*x[:i], x[i].rstrip(b"\r\n"), *x[i + 1 :]]


def ends(draw, raw):
    return raw.replace(b"\r\n", b"\n").replace(b"\n", draw.choice([b"\r\n", b"\r", b"\n\n", b"\xe2\x80\xa8",
                                                                   b"\x0c\n", b" \n", b"\0\n", b"\n\r"]))


def mark(draw, raw):
    return draw.choice([b"\xef\xbb\xbf", b"\xef\xbb\xbf" * 2, b"\xff\xfe", b"\xfe\xff", b"\n", b" ",
                        b"#"]) + raw


def tail(draw, raw):
    return raw + draw.choice([b"\n\n\n", b"\0", b"\x1a", b" ", b"\xe2\x80\xa8", b'"', b",", b"x", b"\xff",
                              b"\r", b"{}", b"[]", b"\xc2\xa0\n", b"\n \t\n", b"\0" * 4096, b"\n{", b"null",
                              b"\nnull"])


def encode(draw, raw):
    text = raw.decode("utf-8", "replace")
    return text.encode(draw.choice(["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7", "cp037",
                                    "gbk"]),
                       "replace")


def whole(draw, raw):
    deep = draw.choice([300, draw.randint(900, 1000), draw.randint(900, 1000), 5000, 100_000])
    return draw.choice([b"", b" \n", b"\n", b"null", b"7", b"[]", b"{}", b'""', b"[[]]", b"{}\n{}",
                        b"\0" * 100, b"\x1f\x8b\x08\0", b"PK\x03\x04", b"\xef\xbb\xbf", b"[" * deep,
                        b"[" * deep + b"]" * deep, b'{"a":' * deep + b"1" + b"}" * deep, b"x" * 100_000, b'"',
                        b"<html></html>", raw + raw, b"," * 5000,
                        b"version https://git-lfs.github.com/spec/v1\n"])


def quotes(draw, raw):
    """One quote less, more, or of another sort."""
    places = [i for i, c in enumerate(raw) if c in b"\"'"] or [0]
    at = draw.choice(places)
    new = draw.choice([b"", b"", b'"', b"'", b'""', b"`", b"\xe2\x80\x9c", b'\\"'])
    return raw[:at] + new + raw[at + 1 :]


# -- damage to values ----------------------------------------------------------------------------------------


def odd(draw):
    """A value that hardly belongs there, and text that stands for what json.dumps would not write."""
    n = draw.choice([1, 20, 350, draw.randint(900, 1000), 3000])
    raw = draw.choice(["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "1" + "0" * 400, "01", "0x1",
                       "-0", "1.0", "1E0", "'a'", "1_0", "+1", "True", "None", "undefined", "[" * n + "]" * n,
                       "[" * n, '{"a":' * n + "0" + "}" * n, '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"',
                       '"\\x41"', '"a\nb"', "", "[,]", "[0,]", "// x", "1e-400", "0.1e1", "-1e0",
                       "99999999999999999999"])
    return draw.choice([None, True, False, 0, 1, -1, 2, 1.5, 0.0, 1.0, 10**30, 2**31, 2**63, 2**64, "", " ",
                        "0", "1", "\0", "\u2028", "\ud800", "\x1b[31m", "<next>", "<start>", "<a_0>",
                        "x" * 3000, "ü", "日本", "a\u0301", "\u202e", "\u200b", "\ufeff", [], {}, [[]],
                        [[[0]]],
                        [None], [True], {"a": 1}, [0], [0, 0, 0], "[0]", "<>", "<<a>>", "<a b>", "nan",
                        ("raw", raw), ("raw", raw), ("raw", raw)])


def written(value, draw):
    """JSON, with raw text where ("raw", text) stands."""
    raws = []

    def plain(x):
        if isinstance(x, tuple):
            raws.append(x[1])
            return f"@{len(raws) - 1}@"
        if isinstance(x, list):
            return [plain(y) for y in x]
        return {key: plain(y) for key, y in x.items()} if isinstance(x, dict) else x

    text = json.dumps(plain(value), ensure_ascii=draw.random() < 0.7)
    for i, raw in enumerate(raws):
        text = text.replace(f'"@{i}@"', raw)
    return text.encode("utf-8", "surrogatepass")


def places_in(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, x in inner:
        yield from places_in(x, (*path, key))


def edit(draw, value):
    """Change one place of a JSON value."""
    path = draw.choice([*places_in(value)])
    if not path:
        return draw.choice([[value], {"a": value}, odd(draw), value])
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    key, how = path[-1], draw.randrange(8)
    if how == 0:
        del inner[key]
    elif how == 1 and isinstance(inner, list):
        inner.insert(key, odd(draw))
    elif how == 2:
        inner[key] = [inner[key]]
    elif how == 3:
        inner[key] = str(inner[key])
    elif how == 4 and isinstance(inner, list):
        draw.shuffle(inner)
    elif how == 5 and isinstance(inner, list):
        inner.insert(key, inner[key])
    elif how == 5:
        inner[draw.choice([key.upper(), key + " ", "x" * 2000, "", "\x1b", "target", "history", "click",
                           "order"])] = (
            inner.pop(key) if draw.random() < 0.5 else inner[key])
    elif how == 6 and isinstance(inner[key], list) and inner[key]:
        inner[key] = inner[key][0] if draw.random() < 0.5 else inner[key] * draw.choice([2, 100])
    else:
        inner[key] = odd(draw)
    return value


def edit_json(draw, raw):
    try:
        return written(edit(draw, json.loads(raw)), draw)
    except (ValueError, RecursionError):
        return insert(draw, raw)


def edit_json_line(draw, raw):
    found = raw.split(b"\n")
    i = draw.randrange(len(found))
    try:
        found[i] = written(edit(draw, json.loads(found[i])), draw)
    except (ValueError, RecursionError):
        return flip(draw, raw)
    return b"\n".join(found)


def key_twice(draw, raw):
    """The same key again, with another value."""
    places = [i for i in range(len(raw)) if raw[i : i + 1] == b"{"] or [0]
    at = draw.choice(places) + 1
    key = draw.choice([b'"history"', b'"target"', b'"shown"', b'"click"', b'"0"', b'"1"', b'"title"'])
    return raw[:at] + key + b": " + draw.choice([b"0", b"[]", b"[0, 0, 0]", b"null",
                                                 b'"x"']) + b", " + raw[at:]


def odd_literal(draw, cell):
    """A cell of MiniOneRec's layout, changed."""
    n = draw.choice([1, 50, draw.randint(80, 110), draw.randint(900, 1000), 20_000])
    sid = draw.choice(["<a_0>", "<a_0><b_0>", "<a_0><b_0><c_0>", "<a_1><b_1><c_1><d_1>"])
    return draw.choice(["", " ", "[]", "[''", "None", "nan", "[None]", "0", "[0]", "[1, 0]", "{}", sid,
                        f"'{sid}'", f"('{sid}',)", f"['{sid}' '{sid}']", f"['{sid}',]", f'["{sid}"]',
                        f"[['{sid}']]", f"['{sid}'] # x", f"['{sid}', {n}]", "[" * n + "]" * n, "[" * n,
                        "-" * n + "1", "(" * n + ")" * n, "9" * 5000, f"[{'9' * 5000}]", "x" * n * 10,
                        "__import__('os')", f"[b'{sid}']", f"[r'{sid}']", f"[f'{sid}']", r"['\x3ca_0>']",
                        r"['\u003ca_0>']", r"['\ud800']", "['\0']", cell + cell, cell.replace("'", '"'),
                        cell.replace(", ", " "), cell.replace("<", "< "), cell.replace(",", ";"),
                        cell.replace("><", "> <"), cell + " ", " " + cell, "\n" + cell, cell.upper(),
                        cell.replace("_", "-"), cell.replace("1", "١"), cell[:-1], cell[1:], cell + "\0",
                        "\ufeff" + cell, "<>" * n, "<" * n, "<a_0>" * n, "[True]", "[true, false]", "[1.0]",
                        "['1']", "[2]", "[-1]", "[[1]]", "1", "array([1])", cell.replace("[", "[\t"),
                        "[" + ", ".join([cell.strip("[]")] * 300) + "]", cell.replace("0", "00")])


def edit_csv(draw, raw):
    """Change cells, columns or the way in which the table is written."""
    try:
        table = list(csv.reader(io.StringIO(raw.decode(), newline="")))
    except (ValueError, csv.Error):
        return flip(draw, raw)
    if not table or not all(table):
        return flip(draw, raw)
    i, width, how, form = draw.randrange(len(table)), len(table[0]), draw.randrange(12), {}
    wanted = [j for j, name in enumerate(table[0]) if name.endswith("_sid") or name in ("click", "order")]
    j = draw.choice(wanted or [0]) if draw.random() < 0.8 else draw.randrange(width)
    table = [[*row, *[""] * (width - len(row))] for row in table]
    if how <= 4:
        table[i][j] = odd_literal(draw, table[i][j])
    elif how == 5:
        table[0][j] = draw.choice(["", " " + table[0][j], table[0][j].upper(), "x" * 3000, "\x1b\n",
                                   "item_sid", "history_item_sid", "order", "click", "shown_item_sid",
                                   table[0][j] + "\0", "ü"])
    elif how == 6:
        table = [row[:j] + row[j + 1 :] for row in table]
    elif how == 7:
        table = [[*row, row[j] if draw.random() < 0.9 else "x"] for row in table]
    elif how == 8:
        table[i] = draw.choice([table[i][:j], [*table[i], "more"], [], [""], table[i][j:], ["x", *table[i]]])
    elif how == 9:
        form = dict(delimiter=draw.choice(";\t|: "))
    elif how == 10:
        form = draw.choice([dict(quoting=csv.QUOTE_ALL), dict(quotechar="'"),
                            dict(doublequote=False, escapechar="\\"),
                            dict(quoting=csv.QUOTE_NONE, escapechar="\\"), dict(lineterminator="\r")])
    else:
        order = draw.sample(range(width), width)
        table = [[row[k] for k in order] for row in table]
    out = io.StringIO()
    try:
        csv.writer(out, **{"lineterminator": "\n", **form}).writerows(table)
    except csv.Error:
        return flip(draw, raw)
    return out.getvalue().encode("utf-8", "surrogatepass")


# -- damage to files and folders -----------------------------------------------------------------------------


def instead(make):
    def act(draw, path):
        remove(path)
        make(draw, path)

    act.__name__ = make.__name__
    return act


def missing(draw, path):
    remove(path)


@instead
def a_folder(draw, path):
    path.mkdir()


@instead
def dangling_link(draw, path):
    path.symlink_to("nowhere")


@instead
def looping_link(draw, path):
    path.symlink_to(path.name)


@instead
def a_socket(draw, path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")  # its own path has to be short
        os.rename("socket", path)


@instead
def link_to_null(draw, path):
    path.symlink_to(os.devnull)


def link_to_another(draw, path):
    others = sorted(x for x in path.parent.iterdir() if x != path)
    remove(path)
    path.symlink_to(draw.choice(others).name)


def unreadable(draw, path):
    path.chmod(0)


def unreadable_folder(draw, path):
    path.parent.chmod(draw.choice([0, 0o444, 0o111]))


def swapped(draw, path):
    other = draw.choice(sorted(path.parent.iterdir()))
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)


def another_shop(draw, path):
    """A file of another shop, perhaps of the other layout, lies there instead of this one or beside it."""
    other = make_shop(draw)
    name = path.name if path.name in other.files and draw.random() < 0.7 else draw.choice(sorted(other.files))
    (path.parent / name).write_bytes(other.files[name])


def another_name(draw, path):
    path.rename(path.with_name(draw.choice([path.name.upper(), path.name.capitalize(), path.stem, path.stem + ".json",
                                            path.stem + ".tsv", path.stem + ".csv", path.stem + ".jsonl",
                                            " " + path.name, path.name + ".gz", "index.json", "catalogue.json",
                                            "log.csv", "log.jsonl", "rl.csv", "rl.jsonl"])))


RAW = [flip, insert, replace, cut, cut_head, cut_middle, double, swap_lines, double_line, drop_line,
       blank_line, join_lines, ends, mark, tail, encode, whole, quotes]
VALUES = {".json": [*[edit_json] * 19, key_twice], ".jsonl": [*[edit_json_line] * 19, key_twice],
          ".csv": [edit_csv]}
FILES = [missing, a_folder, dangling_link, looping_link, a_socket, link_to_null, link_to_another, unreadable,
         unreadable_folder, swapped, another_shop, another_name]


def spoil(draw, folder):
    """Do something to one file; returns what, in words. Half of the time it is done to values."""
    path = draw.choice(sorted(folder.iterdir()))
    act = draw.choice(VALUES[path.suffix] if (how := draw.random()) < 0.5 else RAW if how < 0.9 else FILES)
    if act in FILES:
        act(draw, path)
    else:
        raw = path.read_bytes()
        for _ in range(draw.choice([1, 1, 1, 1, 2, 3])):
            raw = act(draw, raw)
        path.write_bytes(raw)
    return act.__name__, path.name


# -- the script reads it -------------------------------------------------------------------------------------


class Hung(BaseException):
    pass


def alarm(number, frame):
    raise Hung


@contextlib.contextmanager
def only_loading(folder, cfg, found):
    """main() as it is, but that it reads the data and no more."""
    names = "parse", "run"
    before = [getattr(nano, name) for name in names]
    nano.parse, nano.run = lambda argv: cfg, lambda cfg: found.append(nano.load_data(str(folder), cfg))
    try:
        yield
    finally:
        for name, function in zip(names, before, strict=True):
            setattr(nano, name, function)


def load(folder, cfg):
    """(data or None, stderr, warnings, exit code); what is not one of these comes as an exception."""
    found, err, out = [], io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, alarm)
    with (warnings.catch_warnings(record=True) as warned, contextlib.redirect_stderr(err),
          contextlib.redirect_stdout(out), only_loading(folder, cfg, found), ordinary_user()):
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # Python does not show these to users
        signal.alarm(10)
        try:
            nano.main([])
            code = 0
        except SystemExit as end:
            code = end.code
            if code not in (0, 2):  # someone stops the fuzzer
                raise KeyboardInterrupt from None
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    said = [str(x.message) for x in warned] + ([out.getvalue()] if out.getvalue() else [])
    return found[0] if found else None, err.getvalue(), said, code


def same(data, reading, cfg):
    """What was loaded that is not what is written; "" if nothing is."""
    if [*map(list, data.catalogue.row)] != reading.sids:
        return "the catalogue"
    tables = dict(train=data.sft, valid=data.valid, test=data.test, rl=data.rl)
    for name, prompts in tables.items():
        rows = reading.tables.get(name, reading.tables["train"])
        order = prompts.user.argsort()
        history = [[i for i in x if i >= 0] for x in prompts.history[order].tolist()]
        if (loaded := list(zip(history, prompts.target[order].tolist(), strict=True))) != rows:
            return f"the rows of {name}: {loaded!r:.100} instead of {rows!r:.100}"
        padded = zip(prompts.history[order].tolist(), history, strict=True)
        if any(-1 in x[len(x) - len(y) :] for x, y in padded):
            return f"histories of {name} that are not padded on the left"
    if "log" not in reading.tables:
        return ""
    logs = [x for x in (data.log, data.holdout) if x is not None]
    found = []
    for log in logs:
        for i in range(len(log.item)):
            n = int((log.item[i] >= 0).sum())
            order = None if log.order is None else log.order[i, :n].int().tolist()
            found.append(([x for x in log.history[i].tolist() if x >= 0], log.item[i, :n].tolist(),
                          log.click[i, :n].int().tolist(), order))
            if log.click[i, n:].any() or (order is not None and log.order[i, n:].any()):
                return "clicks on nothing"
    if len(logs) > 1 and len(data.holdout.item) != int(len(found) * cfg.log_holdout):
        return "the share of the log that is held out"
    return "" if found == reading.tables["log"] else "the rows of log"


def check(folder, cfg, deep):
    """What came out, and what is wrong with that."""
    try:
        data, err, said, code = load(folder, cfg)
    except Hung:
        return "hung", "hangs: for more than 10 s"
    except Exception as error:  # this is what is looked for
        last = error.__traceback__
        while last.tb_next:
            last = last.tb_next
        place = f"{os.path.basename(last.tb_frame.f_code.co_filename)}, line {last.tb_lineno}"
        return "crashed", f"{type(error).__name__} in {place}: {str(error)[:150]!r}"
    if said:
        return "warned", f"prints: {said[0][:150]!r}"
    bad = reading = None
    try:
        with ordinary_user():
            reading = Reading(folder, cfg.max_history)
    except Bad as error:
        bad = error
    except PermissionError:
        bad = Bad("", "not to be read")
    if code:
        fault = f"exit code {code}" if code != 2 else not_one_line(err)
        if not fault and bad is None and not reading.doubts:
            fault = f"refuses what is right: {err[:250]!r}"
        if not fault and bad and bad.file and f"{folder}/{bad.file}" not in err:
            fault = f"does not name the file: {bad!s:.80}; it says {err[:200]!r}"
        sure = bad and bad.lines and not bad.doubts  # or else a line before may be refused
        if not fault and sure and not any(f"line {n}:" in err for n in bad.lines):
            fault = f"does not name the line: {bad!s:.80}; it says {err[:200]!r}"
        return "refused", fault
    if err:
        return "loaded", f"loads and complains: {err[:200]!r}"
    if bad:
        return "loaded", f"accepts what cannot be right: {bad}"
    fault = same(data, reading, cfg)
    if fault:
        return "loaded", f"reads something else: {fault}"
    if deep:  # and a policy can be made of it
        try:
            policy = nano.tiny_policy(data.catalogue, cfg, width=16, layers=1)
            for i, word in enumerate(data.catalogue.words):
                if policy.tokenizer.convert_tokens_to_ids(word) != i or policy.tokenizer.decode([i]) != word:
                    return "loaded", f"its tokenizer does not give back a word: {word[:60]!r}"
            sids = data.catalogue.tokens[:20]
            if policy.catalogue.item(sids).tolist() != [*range(len(sids))]:
                return "loaded", "the catalogue does not find its own items:"
        except Exception as error:
            return "loaded", f"loads, but no policy can be made of it: {error!r:.200}"
    return "loaded", ""


def attempt(seed, number, place):
    draw = make_draw(seed, "files", number)
    long = "/".join(["a folder of a name that is rather long"] * draw.randint(2, 5))
    folder = long if draw.random() < 0.02 else "shop"
    shop = make_shop(draw)
    path = shop.write(place / folder)
    cfg = nano.Settings(data=folder, device="cpu", max_history=draw.choice([1, 3, 10]),
                        log_holdout=draw.choice([0.0, 0.1, 0.5]))
    try:
        what, name = ("nothing", "") if draw.random() < 0.03 else spoil(draw, path)
        outcome, fault = check(folder, cfg, deep=draw.random() < 0.1)
    finally:
        path.chmod(0o755)
        if not KEEP:
            remove(place / folder.split("/")[0])
    return Result(outcome, f"{fault} [{what} of {name}]" if fault else "")


KEEP = False  # leave the folder, to look at it
