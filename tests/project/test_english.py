"""Phrases that mark translated text must not come back. Each has a suggestion of what to write instead."""

import ast
import bisect
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IDIOMS = "longer|more|matter|less|better|worse|larger|smaller|doubt|need|room|way|such"  # "is no longer"
PARAGRAPH = "¶"
END = rf"(?=[.,;:)\]{PARAGRAPH}]|$)"
PHRASES = {
    r"\b(go|goes|going|gone|went) on\b": "continue, resume",
    r"\b(is|are|was|were|be|being) none of\b": "is not one of",
    rf"(?<!there )\b(is|are|was|were) no (?!({IDIOMS})\b)[a-z]\w*": "is not a …",
    r"\b(tell|tells|telling) (whether|what|how|which|where|by)\b": "check whether, report, show",
    rf"((?<={PARAGRAPH} )|^)(Tell|Say|Look)\b": "Return, Check, Report, Log, Set",
    r"\b(lie|lies|lay) (here|there|on|beside|behind|below)\b": "is on, is next to",
    r"\blooks? whether\b": "check whether",
    r"\b(in|by) turns\b": "interleaved, alternating",
    r"\bin (the|whose|its|their) place\b": "instead of",
    r"\bmend(s|ed|ing)?\b": "fix, repair",
    r"\b(is|are|was|were|be) said\b": "is logged, is stated",
    r"\b(which|and) (say|says) so\b": "with a message",
    r"\b(says?|said|speaks?|speaking|spoke) of\b": "states, names",
    r"\bspeaks? for\b": "represents",
    r"\bfor ever\b": "indefinitely",
    r"\bput(s|ting)? up with\b": "tolerate",
    r"\b(leave|leaves|left|leaving) [^.,;:]{1,30} away\b": "omit, remove",
    rf"\band so (are|is|do|does) [^.,;:]{{1,40}}{END}": "start a new sentence",
    rf"\b(does|do|serves|serve) as well{END}": "start a new sentence",
    rf", too{END}": "also",
    r"\bas dear\b": "costs 2 × as much as",
    r"\bshall be\b": "is to be, will be",
    r"\b(let|lets|letting) go\b": "release, free",
    r"\b(gone|done|begun|made|tried|drawn|asked|started|taken|begins?|starts?) anew\b": "again, start over",
    r"\b(stands?|stood) (in(?! for)|at|behind|beside|below|above|there|before)\b": "is in, is next to, follows",
    r"\bwritten aside\b|\baside first\b": "written to a temporary file first",
    r"\bmeans the same by\b": "means",
    r"\b(what|all) there is\b": "name the thing",
    r"\bno (finite )?numbers?\b(?! of)": "not finite, NaN",
    r"\bof (ours|theirs)\b": "of this package",
    r"\bin vain\b": "without effect",
}
MARKS = re.compile(r"""^\s*[#*>]*|(?<!\w)[rf]{0,2}["']|["'`]""")  # comments, lists and quotes
COMPILED = {re.compile(phrase, re.IGNORECASE): advice for phrase, advice in PHRASES.items()}
PYTHON = sorted(
    path for folder in ("scalablevit_pl", "benchmarks", "checkpoints", "docs") for path in (ROOT / folder).rglob("*.py")
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PROSE = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "configs").rglob("*.yaml"),
        *(ROOT / "scalablevit_pl").rglob("*.txt"),
        *(ROOT / "scalablevit_pl").rglob("*.md"),
        ROOT / "checkpoints/README.md",
        ROOT / "docs/slurm.sbatch",
        ROOT / "Makefile",
        ROOT / "pyproject.toml",
    ]
)


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def problems(text: str, first: int = 1) -> list[str]:
    """List the phrases in a text whose first line has that number, however it is wrapped."""
    words, starts, lines, end = [], [], [], 0
    for number, line in enumerate(text.splitlines(), start=first):
        for word in MARKS.sub(" ", line).split() or [PARAGRAPH]:
            words.append(word)
            starts.append(end)
            lines.append(number)
            end += len(word) + 1
    joined = " ".join(words)
    found = {
        (lines[bisect.bisect_right(starts, match.start()) - 1], match[0], advice)
        for pattern, advice in COMPILED.items()
        for match in pattern.finditer(joined)
    }
    return [f"{line}: {phrase!r}: write {advice}" for line, phrase, advice in sorted(found)]


def check(path: Path, found: list[str]) -> None:
    assert not found, "".join(f"\n{page_name(path)}:{problem}" for problem in found)


def comments_and_strings(source: str) -> list[tuple[int, str]]:
    """Return each run of comments or strings in Python code, with the number of its first line."""
    parts_of_strings = ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")  # tokens of Python 3.12
    texts = {tokenize.COMMENT, tokenize.STRING, *(getattr(tokenize, name, -1) for name in parts_of_strings)}
    found: list[tuple[int, list[str]]] = []
    joins = False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in texts:
            if joins:
                line, parts = found[-1]
                parts.append("\n" * (token.start[0] - line - "".join(parts).count("\n")) + token.string)
            else:
                found.append((token.start[0], [token.string]))
        joins = token.type in texts or (joins and token.type == tokenize.NL)
    return [(line, " ".join(parts)) for line, parts in found]


@pytest.mark.parametrize("path", PROSE, ids=page_name)
def test_documents_are_plain_english(path: Path) -> None:
    check(path, problems(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", PYTHON, ids=page_name)
def test_docstrings_comments_and_messages_are_plain_english(path: Path) -> None:
    texts = comments_and_strings(path.read_text(encoding="utf-8"))
    check(path, [problem for line, text in texts for problem in problems(text, line)])


@pytest.mark.parametrize("path", TESTS, ids=page_name)
def test_names_of_tests_are_plain_english(path: Path) -> None:
    functions = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    names = [(node.lineno, node.name.replace("_", " ")) for node in functions]
    riddles = [
        f"{line}: {name!r}: name the behavior" for line, name in names if re.match("test (what|who|so many) ", name)
    ]
    check(path, [problem for line, name in names for problem in problems(name, line)] + riddles)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A\nrun goes\non with step 7.", 2),
        ("it is in the\n    # place of the other", 1),
        ("there is\n    no file", 0),
        ("It is no longer than that. There are no classes.", 0),
        ("It is no module.", 1),
        ("a\n\nTell it", 3),
        ("It works, too.", 1),
        ("too many, too few", 0),
    ],
)
def test_a_phrase_is_found_however_it_is_wrapped(text: str, line: int) -> None:
    assert [problem.split(":")[0] for problem in problems(text)] == ([str(line)] if line else [])
