"""Writes the numbers of docs/evidence.md, all of them from results/ablation.jsonl.

    python -m tools.ablate --table all          # makes the results; hours
    python -m tools.plot results/ablation.jsonl # draws the figures
    python -m tools.evidence                    # writes the numbers into the page
    python -m tools.evidence other.md --results runs/ablation-limit48/ablation.jsonl --fewer

The page is written by hand but for what stands between two comments, which says what belongs there:

    <!-- table 4b -->                       a table of tools/plan.py; "table 4b, equal time" too
    <!-- benchmarks 5 -->                   the same rows, by benchmark of the fine half
    <!-- paired -->                         differences seed by seed: PAIRS of tools/plan.py; a cell
                                            of it is "paired | ours - A.A.P | fine half"
    <!-- cell 4b | SELA | fine half -->     one cell of it, inside a sentence: table, row, column;
                                            "fine half, seed 1" is of that seed alone
    <!-- figure PATH: DESCRIPTION -->       a picture that tools.plot drew, if it is there
    <!-- runs -->                           how many runs, on what machine, of which seeds
    <!-- blind -->                          what models score that see a grey picture
    <!-- end -->                            ends each of them

So a number on the page is one of the results. tests/test_evidence.py holds the page to that.
"""
import argparse
import re
import statistics
import sys
from pathlib import Path

from benchmarks.answers import write
from tools import plan, tables

PAGE, RESULTS = Path("docs/evidence.md"), Path("results/ablation.jsonl")
KINDS = "table|benchmarks|paired|cell|figure|runs|blind"
BLOCK = re.compile(rf"<!-- ({KINDS})\b ?(.*?) ?-->(.*?)<!-- end -->", re.S)
NO_RUN = "*No run of this has been made yet.*"


def filled(text, results, folder):
    """The text of a page, with what stands between its comments as a file of results has it.

    folder: where the page lies, from which the paths of its figures start. Raises ValueError for a
    comment that asks for what is not there, or that nothing ends.
    """
    args = tables.latest(results)
    opened = len(re.findall(rf"<!-- (?:{KINDS})\b", text))
    if not opened == len(BLOCK.findall(text)) == text.count("<!-- end -->"):
        raise ValueError(f"each comment {KINDS.replace('|', ', ')} needs an <!-- end --> behind "
                         "it, before the next one begins")
    lines = {equal: tables.lines_of(args, equal) if args else {} for equal in (False, True)}
    return BLOCK.sub(lambda match: block(match, lines, args, folder), text)


def block(match, lines, args, folder):
    """A match of BLOCK -> the same comments, with what belongs between them.

    lines: {whether of equal time: what `tables.lines_of` gives}. args: of `tables.latest`, or None.
    """
    kind, what, _ = match.groups()
    begin = f"<!-- {kind} {what} -->" if what else f"<!-- {kind} -->"
    if kind == "cell":
        start = match.string.rfind("\n", 0, match.start()) + 1
        if start == match.start():
            raise ValueError(f"{begin} begins a line, where Markdown ends the paragraph: let a "
                             "word stand before it")
        return f"{begin}{cell(what, lines)}<!-- end -->"
    if kind in ("table", "benchmarks"):
        shown = table(kind, what, lines)
    elif kind == "paired":
        if what:
            raise ValueError(f"{begin}: it has no words behind it, equal steps alone are paired")
        shown = "\n".join(tables.paired_table(plan.PAIRS, lines[False])) if args else ""
    elif kind == "figure":
        shown = figure(what, args, folder)
    else:
        shown = runs(lines, args) if kind == "runs" else blind(lines)
    return f"{begin}\n\n{shown or NO_RUN}\n\n<!-- end -->"


def named(what, lines):
    """"4b" or "4b, equal time" -> (the rows of that table, the lines that it shows)."""
    name, _, equal = what.partition(", ")
    if name not in plan.TABLES or equal not in ("", tables.EQUAL_TIME):
        raise ValueError(f"<!-- table {what} -->: there are {', '.join(plan.TABLES)}, and each of "
                         f"them with \", {tables.EQUAL_TIME}\" behind its name")
    return plan.TABLES[name], lines[bool(equal)]


def table(kind, what, lines):
    """The tables of some rows, or "" where none of them has a line."""
    rows, mine = named(what, lines)
    if not any(tables.made_of(row, mine) for row in rows):
        return ""
    if kind == "benchmarks":
        return "\n".join(tables.benchmark_table(rows, mine))
    return "\n".join([*tables.result_table(rows, mine), "", *tables.group_table(rows, mine)])


def cell(what, lines):
    """"4b | SELA | fine half" -> what stands there in the table, or would with one seed alone."""
    parts = what.split(" | ")
    if len(parts) != 3:
        raise ValueError(f"<!-- cell {what} -->: write cell TABLE | ROW | COLUMN")
    name, label, column = parts
    if name == "paired":
        return difference(what, label, column, lines[False])
    rows, mine = named(name, lines)
    column, _, seed = column.partition(", seed ")
    if seed:
        seeds = sorted({line["seed"] for line in mine.values()})
        if mine and seed not in map(str, seeds):
            raise ValueError(f"<!-- cell {what} -->: there are lines of the seeds {seeds}")
        mine = {key: line for key, line in mine.items() if str(line["seed"]) == seed}
    labels = [row.label for row in rows]
    if label not in labels:
        raise ValueError(f"<!-- cell {what} -->: the rows of table {name} are {labels}")
    row = rows[labels.index(label)]
    makers = tables.result_table, tables.group_table, tables.benchmark_table
    return under(what, column, *(make([row], mine) for make in makers))


def difference(what, label, column, lines):
    """The cell of a pair's label under a column, of lines of equal steps."""
    if label not in plan.PAIRS:
        raise ValueError(f"<!-- cell {what} -->: the pairs are {list(plan.PAIRS)}")
    return under(what, column, tables.paired_table({label: plan.PAIRS[label]}, lines))


def under(what, column, *made):
    """The cell under a column of the first of these tables of one row that has it."""
    shown = {}
    for heads, _, cells in made:
        shown = dict(zip(cells_of(heads), cells_of(cells))) | shown
    if column not in shown:
        raise ValueError(f"<!-- cell {what} -->: the columns are {list(shown)}")
    return shown[column]


def cells_of(text):
    """A row of a Markdown table -> its cells."""
    return [cell.strip() for cell in text.strip("|").split("|")]


def figure(what, args, folder):
    """"PATH: DESCRIPTION" -> the picture, or "" where there are no results or it is not drawn."""
    path, _, description = what.partition(": ")
    return f"![{description}]({path})" if args and (folder / path).exists() else ""


def model_of(line):
    """What tells the model of a line from others."""
    return line["flags"], line["seed"], line["seconds"]["training"]


def distinct(lines):
    """Each asking once: that of a model which stands in both kinds of lines is the same."""
    every = [*lines[True].values(), *lines[False].values()]     # of two, the line of equal steps
    return {(model_of(line), line["ask"]): line for line in every}.values()


def runs(lines, args):
    """What was run, on what, and how long it took."""
    asked = distinct(lines)
    if not asked:
        return ""
    trained = {model_of(line) for line in asked}        # a model may be asked in several ways
    took = sum(seconds for _, _, seconds in trained)
    took += sum(line["seconds"]["evaluation"] for line in asked)
    of_steps = tables.note(args, list(lines[False].values()))
    return (f"{len(trained)} models, asked {len(asked)} times; {tables.minutes(took)} of "
            f"training and asking, on one thread each. {of_steps}\n\n{tables.LEGEND}")


def blind(lines):
    """Scores with a grey picture in the place of the right one, over all models that were asked."""
    rows = []
    for group in tables.COLUMNS:
        found = [line["blind"][group]["score"] for line in distinct(lines)
                 if line["blind"] and group in line["blind"]]
        if found:
            rows.append([group, str(len(found)), f"{statistics.mean(found):.1f}",
                         f"{max(found):.1f}"])
    heads = ["asked about a grey picture", "models", "mean", "highest"]
    return "\n".join(tables.as_table(heads, rows)) if rows else ""


def rows_of(page):
    """What stands on a page: {(what a comment asks for, label of a row or "", its cells): count}.

    The count is that of seeds or of models, where a row of a table or the block "runs" begins with
    one; else whether there is any result. So a page with "runs" on it notices each lost line.
    """
    found = {}
    for match in BLOCK.finditer(page):
        kind, what, inside = match.groups()
        for row in inside.strip().splitlines():
            label, *cells = cells_of(row) if row.startswith("|") else ("", row)
            results = [cell for cell in cells if re.match(r"-?\d", cell) and cell != "0"]
            counted = re.match(r"(\d+)( models\b|$)", cells[0]) if kind != "cell" else None
            count = int(counted[1]) if counted else bool(results)
            place = f"{kind} {what}".strip(), label, len(cells)
            found[place] = max(count, found.get(place, 0))
    return found


def main(argv=None):
    """The command line: see the top."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default {RESULTS}")
    parser.add_argument("--fewer", action="store_true",
                        help="write the page even where it then shows fewer seeds or results")
    args = parser.parse_args(argv)
    text = args.page.read_text(encoding="utf-8")
    tables.left_out(args.results)
    new = filled(text, args.results, args.page.parent)
    lost = new.count(NO_RUN) - text.count(NO_RUN)
    if lost > 0:
        if not args.results.exists():
            raise ValueError(f"{args.page} is left as it was: there is no file {args.results}")
        raise ValueError(f"{args.page} is left as it was: for {lost} blocks that it fills now, "
                         f"{args.results} has no line like its last one (limit, questions, world), "
                         "or tools.plot has drawn no figure")
    before = rows_of(text)
    fewer = [row[:2] for row, count in rows_of(new).items() if count < before.get(row, 0)]
    if fewer and not args.fewer:
        first = " | ".join(filter(None, fewer[0]))
        raise ValueError(f"{args.page} is left as it was: with {args.results} it would show fewer "
                         f"seeds or results in {len(fewer)} places, the first of them {first}. "
                         "--fewer writes it nevertheless")
    write(args.page, new)
    print(f"{args.page}: {'as it was' if new == text else 'written'}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tools.evidence: {error}")
