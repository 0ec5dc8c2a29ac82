"""Claims as records: a sentence with its verdict, and the correction of several verdicts together."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from binvit.lab.analysis.statistics import CONFIDENCE, Estimate

Verdict = Literal["yes", "no", "undecided"]
Kind = Literal["confirmatory", "exploratory"]
LEVEL = 1 - CONFIDENCE  # of two-sided tests

_GSB, _SATO = "Gao et al. 2024, abstract: ", "Sato et al. 2023, abstract: "
LOSS_IS_ATTENTION = _GSB + "accuracy declines mainly by the information lost in the attention module and the value."
CNN_DO_NOT_TRANSFER = _GSB + "binarizers made for convolutional networks do not transfer well to vision transformers."
SUPERPOSITION_HELPS = _GSB + "group superposition makes up for the lost information."
GRADIENT_HELPS = _GSB + "gradients derived for the superposition improve it further."
DISTILLATION_HELPS = _GSB + "knowledge distillation alleviates what binarization costs."
BEST = _GSB + "GSB is the best of the binary schemes, and exceeds its full-precision counterpart on some indicators."
FEW_SAMPLES = _GSB + "binarization limits the search space of parameters, which helps with few training samples."
FACTORS_HELP = _SATO + "scaling factors help vision transformers as they help convolutional networks."
ONE_COMPONENT = _SATO + "a model with only its MLPs or only its MHSA in 1-bit is much better than one with both."


@dataclass(frozen=True)
class Claim:
    """A sentence, whether the evidence bears it out, and that evidence in words.

    Args:
        sentence: what is claimed.
        verdict: "yes", "no" or "undecided".
        evidence: the numbers behind the verdict.
        kind: "confirmatory" for the sentences of the papers, whose verdicts `correct` corrects together, "exploratory"
            for our own.
        source: who claims it.
        p: one-sided p-values against the claim ("yes" needs the first below half the level) and for it ("no" needs the
            second); None where the verdict follows from no sample.
        estimate: the mean or difference behind the evidence, with its interval; None if there is none or are several.
        corrected: the interval at the level that Holm's procedure leaves to the claim; None before `correct`.
        plain: the verdict before `correct`.
        percent: tell the estimate in percent, a difference in percentage points.
        is_share: the estimate is a mean of shares, whose intervals are shown from 0 to 1.
        is_not_run: whether nothing is known of it, since the trials that it compares were not run.
    """

    sentence: str
    verdict: Verdict
    evidence: str
    kind: Kind = "exploratory"
    source: str = ""
    p: tuple[float, float] | None = None
    estimate: Estimate | None = None
    corrected: tuple[float, float] | None = None
    plain: Verdict | None = None
    percent: bool = False
    is_share: bool = False
    is_not_run: bool = False

    def __post_init__(self) -> None:
        if self.verdict not in ("yes", "no", "undecided"):
            raise ValueError(f"A verdict is 'yes', 'no' or 'undecided', and {self.verdict!r} came.")
        if not self.sentence.strip() or "\n" in self.sentence:
            raise ValueError(f"A claim is one sentence on one line, and {self.sentence!r} came.")


def not_run(sentence: str, evidence: str = "not run") -> Claim:
    """Return a claim of which nothing is known, since the trials that it compares were not run.

    Args:
        sentence: what is claimed.
        evidence: what is lacking.
    """
    return Claim(sentence, "undecided", evidence, is_not_run=True)


def confirm(source: str, *claims: Claim) -> list[Claim]:
    """Mark claims as confirmatory: sentences of a paper, which were written down before anything was trained.

    Args:
        source: the paper's sentence, or where it stands.
        claims: what was checked.
    """
    return [dataclasses.replace(claim, kind="confirmatory", source=source) for claim in claims]


def correct(claims: Sequence[Claim]) -> list[Claim]:
    """Correct the verdicts of the confirmatory claims of one notebook together, by Holm's step-down procedure.

    The k-th smallest of m two-sided p-values is compared with LEVEL / (m - k + 1), and nothing after the first that
    is not below it is decided. The corrected interval of a claim is the one at its step's level, or at that of the step
    which ended the procedure.

    Args:
        claims: all claims of a notebook, in the order to show. Exploratory ones and exact ones, which follow from no
            sample, stay as they are.

    Returns:
        The claims in the same order.

    References:
        Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    tested = [i for i, claim in enumerate(claims) if claim.kind == "confirmatory" and claim.p is not None]
    found, level, still = list(claims), LEVEL, True
    for step, i in enumerate(sorted(tested, key=lambda i: min(claims[i].p or (1.0, 1.0)))):
        claim, level = claims[i], LEVEL / (len(tested) - step) if still else level
        verdict = verdict_of(claim.p, level) if still else "undecided"
        still = verdict != "undecided"
        interval = None if claim.estimate is None else claim.estimate.interval(1 - level)
        found[i] = dataclasses.replace(claim, verdict=verdict, corrected=interval, plain=claim.verdict)
    return found


def verdict_of(p: tuple[float, float] | None, level: float = LEVEL) -> Verdict:
    """Return what one-sided p-values against a claim and for it say at a level of two-sided tests."""
    if p is None or min(p) >= level / 2:
        return "undecided"
    return "yes" if p[0] < p[1] else "no"


def all_of(sentence: str, parts: Sequence[Claim]) -> Claim:
    """Check the claim that several claims hold at once.

    It holds if each part holds (an intersection-union test: the largest p-value counts), and fails if one part fails
    after Bonferroni's correction for the choice among the parts. Parts that follow from no sample count as they are.

    Args:
        sentence: what is claimed.
        parts: the single claims.

    Returns:
        "no" if one of them fails, else "undecided" if one of them is, or fails before the correction only, else "yes";
        the evidence names those that decide.
    """
    if not parts:
        return not_run(sentence, "nothing to compare was run")
    known = [part.p for part in parts if part.p is not None]
    p = (max(yes for yes, _ in known), min(1.0, len(parts) * min(no for _, no in known))) if known else None
    if p is not None and any(part.p is None and part.verdict == "undecided" for part in parts):
        p = (1.0, p[1])  # a part that was not run cannot be borne out
    worst = lambda part: part.p[1] if part.p else 1.0  # noqa: E731
    failing, open_ = (sorted((q for q in parts if q.verdict == v), key=worst) for v in ("no", "undecided"))
    exact = any(part.p is None for part in failing)  # which no correction counts
    count = f"{len(failing)} of {len(parts)} fail{'s' * (len(failing) == 1)}"
    if failing and (exact or verdict_of(p) == "no"):
        return Claim(sentence, "no", f"{count}: {failing[0].evidence}", p=None if exact else p)
    if failing:
        more = f", {len(open_)} undecided" if open_ else ""
        return Claim(sentence, "undecided", f"{count} before correction{more}: {failing[0].evidence}", p=p)
    if open_:
        word = "is" if len(open_) == 1 else "are"
        lacking = all(part.is_not_run for part in parts)
        evidence = f"{len(open_)} of {len(parts)} {word} undecided: {open_[0].evidence}"
        return Claim(sentence, "undecided", evidence, p=p, is_not_run=lacking)
    return Claim(sentence, "yes", "; ".join(part.evidence for part in parts), p=p)
