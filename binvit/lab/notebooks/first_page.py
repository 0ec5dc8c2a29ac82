"""The README's table of results: what the papers claim, and what came of it on each kind of images."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from binvit.files import atomic_write, require_writable
from binvit.images import require_regular
from binvit.lab.analysis.claims import Claim

BEGIN, END = "<!-- results: written by make figures -->", "<!-- end of results -->"
NOT_RUN = "not run"

# What a row says, the notebook that checks it, and how the sentence of its claim begins.
ROWS = (
    (
        "**GSB**: a 1-bit attention map costs more than a 1-bit query, key, weight or input",
        "03",
        "After training with it, a 1-bit attention map",
    ),
    ("a 1-bit value costs more than each of those", "03", "After training with it, a 1-bit value"),
    ("CNN binarizers all lose more than 5 points", "04", "Schemes made for convolutional networks"),
    ("three groups beat one, no bias of the map", "04", "Three groups are more accurate than one."),
    ("superposition of the attention map alone helps", "05", "Superposition of the attention map alone helps."),
    ("superposition of the value alone helps", "05", "Superposition of the value alone helps."),
    ("the gradient of GSB helps", "05", "The released gradient is more accurate than the masked one."),
    ("distillation helps", "05", "Hard distillation helps."),
    ("soft distillation helps (exploratory)", "05", "Soft distillation helps."),
    (
        "a hard teacher helps GSB, no limit of activations (exploratory)",
        "05",
        "On equal terms, a hard teacher helps GSB.",
    ),
    ("a hard teacher helps one group (exploratory)", "05", "On equal terms, a hard teacher helps elastic"),
    ("GSB beats every other 1-bit scheme", "04", "GSB is more accurate than every other 1-bit scheme"),
    ("GSB with its bias of the map beats float", "05", "With its bias, GSB is more accurate than float."),
    ("few images: the gap to training is smaller than float's", "06", r"With \d+ images per class, the gap"),
    ("fewer images favour GSB over float (exploratory)", "06", r"From \d+ to \d+ images per class"),
    (
        "**Sato et al.**: factors help if both components are 1-bit",
        "02",
        "Factors of weights and inputs help both 1-bit.",
    ),
    ("factors help a 1-bit patch embedding", "02", "Factors of weights and inputs help the 1-bit patch embedding."),
    ("a 1-bit MLP alone is 5 points above both", "02", "With factors of weights and inputs, a 1-bit MLP alone"),
    ("a 1-bit MHSA alone is 5 points above both", "02", "With factors of weights and inputs, a 1-bit MHSA alone"),
)
# Heading -> the titles of its images.
COLUMNS = {
    "digits": r"digits",
    "CIFAR-100": r"cifar100(, \d+ per class)?",
    "Flowers-102": r"flowers102",
    "Flowers-102, pretrained": r"flowers102, pretrained",
}


def by_images(names: Mapping[str, Any]) -> dict[str, list[Claim]]:
    """Return the claims of a notebook by the title of their images, their sentences without it.

    Args:
        names: what the notebook's cells have left: the claims as ``found``, the trials as ``table``.
    """
    titles = list(dict.fromkeys(names["table"]["data"]))
    if len(titles) == 1:
        return {titles[0]: names["found"]}
    return {
        title: [
            _without(claim, f"On {title}: ") for claim in names["found"] if claim.sentence.startswith(f"On {title}: ")
        ]
        for title in titles
    }


def _without(claim: Claim, beginning: str) -> Claim:
    return dataclasses.replace(claim, sentence=claim.sentence.removeprefix(beginning))


def says(claim: Claim, beginning: str) -> bool:
    """Say whether a claim is that of a row, whose sentence begins so; full stops stand for themselves."""
    return re.match(beginning.replace(".", r"\."), claim.sentence) is not None


def cell(claim: Claim | None) -> str:
    """Return the verdict on a claim with the difference, its corrected interval and the number of seeds.

    Args:
        claim: what was checked; None if nothing was.
    """
    if claim is None or claim.is_not_run:
        return NOT_RUN
    if claim.estimate is None:  # several differences
        failing = r"fails?( before correction)?(, \d+ undecided)?"
        part = re.match(rf"\d+ of \d+ ({failing}|is undecided|are undecided)", claim.evidence)
        counted = re.search(r"\d+ seeds?", claim.evidence)
        told = [part[0].replace("is ", "").replace("are ", "")] if part else []
        weak = re.match(r"[^:;]+ below \d times chance: [\d.]+ %", claim.evidence)
        told += [weak[0]] if weak else []
        told += [before] if (before := _before(claim)) and "before correction" not in claim.evidence else []
        told += ["not all schemes run"] if re.search(r"that w(as|ere) run", claim.sentence) else []
        return f"**{claim.verdict}**: " + "; ".join([*told, *([counted[0]] if counted else [])])
    estimate, factor, spec = claim.estimate, *((100, "+.1f") if claim.percent else (1, "+.3g"))
    low, high = claim.corrected or (estimate.low, estimate.high)
    if claim.percent:  # no difference of two shares is beyond 100 points
        low, high = max(low, -1.0), min(high, 1.0)
    spread = "" if math.isnan(low) else f" ({factor * low:{spec}} to {factor * high:{spec}})"
    seeds = f"{estimate.n} seed{'s' * (estimate.n > 1)}"
    if estimate.n > 1 and estimate.mean == estimate.low == estimate.high == 0:
        return f"**{claim.verdict}**: both sides train alike; {seeds}"
    lost = re.findall(r"\d+ of \d+ .+? below \d times chance", claim.evidence)
    counts = re.findall(r"\d+ to \d+(?= images per class)", claim.sentence)
    told = [f"{factor * estimate.mean:{spec}}{spread}", *(f"{count} of a class" for count in counts), seeds, *lost]
    return f"**{claim.verdict}**: " + "; ".join([*told, *([before] if (before := _before(claim)) else [])])


def _before(claim: Claim) -> str:
    """Return the verdict that the correction has changed."""
    return "" if claim.plain in (None, claim.verdict) else f"{claim.plain} before correction"


def results_table(notebooks: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of results as Markdown.

    Args:
        notebooks: number of a notebook -> what its cells have left.
    """
    found = {number: by_images(names) for number, names in notebooks.items()}
    lines = [f"| claim | notebook | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for label, number, beginning in ROWS:
        cells = []
        for pattern in COLUMNS.values():
            claims = [
                claim
                for title, claims in found.get(number, {}).items()
                if re.fullmatch(pattern, title)
                for claim in claims
                if says(claim, beginning)
            ]
            cells.append(cell(claims[0] if claims else None))
        lines.append(f"| {label} | {number} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_results(readme: Path, table: str) -> None:
    """Write the table of results between its two markers.

    Args:
        readme: the file.
        table: the result of `results_table`.

    Raises:
        FileNotFoundError, ValueError, OSError: as `around_results` does.
    """
    before, after = around_results(readme)
    atomic_write(readme, f"{before}{BEGIN}\n{table}\n{END}{after}")


def around_results(readme: Path) -> tuple[str, str]:
    """Return what stands before and after the table of results in a file that can be written.

    Args:
        readme: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text in UTF-8, or has no such markers.
        OSError: it cannot be written.
    """
    require_writable(require_regular(readme, "file of the results"))
    try:
        text = readme.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{readme} is no text in UTF-8 ({error}).") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no lines {BEGIN!r} and {END!r} to write the results between.")
    return before, after
