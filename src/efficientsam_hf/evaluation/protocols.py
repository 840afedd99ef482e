"""The protocols by which masks are asked for, as their authors have them; no figure is worth anything without its own.

name       first click                         next click                                  counts
box        the mask's tightest box             -                                           1
paper      anywhere on the object              anywhere on the object                      1, 3
sam        deepest in the object               deepest in the error                        1, 2, 3, 5, 9
ritm       deepest in the object               deepest in the larger of missed and false   up to 20
                                               where no click was yet
centroid   centre of mass, if on the object    anywhere in the error                       1, 2, 3

Of three masks the one with the highest predicted IoU counts; "oracle" is the mask nearest to the truth instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .clicks import Click, anywhere, centroid, deepest, errors

Labelled = tuple[Click, int]  # 1 on the object, 0 on the background
NextClick = Callable[[np.ndarray, np.ndarray, bool, Sequence[Click], np.random.Generator], Labelled | None]


@dataclass(frozen=True)
class Protocol:
    """How prompts follow from the true mask and from the answers.

    Args:
        name: Goes beside every figure.
        first: The object (H, W), booleans, and a generator -> a click. None asks by the box.
        next: What was missed and what was covered falsely (H, W), whether background clicks may be given, the clicks
            so far, a generator -> a click, or None where none can be given. None draws all clicks by `first`, whatever
            the answers are.
        prompts: Numbers of clicks after which the IoU is told.
        wanted: IoU for which clicks are counted (NoC); an object that has the highest gets no more clicks than
            `prompts` ask for.
        most: Clicks that an object gets at most.
        ignoring: Whether the first click is on what counts, if anything of the object does.
    """

    name: str
    first: Callable[[np.ndarray, np.random.Generator], Click] | None
    next: NextClick | None
    prompts: tuple[int, ...]
    wanted: tuple[float, ...] = ()
    most: int = 0
    ignoring: bool = False

    def __post_init__(self) -> None:
        if not self.prompts or min(self.prompts) < 1 or (self.first is None and self.prompts != (1,)):
            wanted = "the box alone, (1,)" if self.first is None else "numbers of clicks from 1 on"
            raise ValueError(f"protocol {self.name!r}: prompts must be {wanted}, got {self.prompts}")

    @property
    def rounds(self) -> int:
        """How often an object may be asked for."""
        return max(self.most, *self.prompts)


def deepest_first(truth: np.ndarray, generator: np.random.Generator) -> Click:
    """Kirillov et al., 2023, D.1: the point farthest from the object's edge."""
    return deepest(truth)[0]


def deepest_error(
    missed: np.ndarray,
    false: np.ndarray,
    background: bool,
    clicked: Sequence[Click],
    generator: np.random.Generator,
) -> Labelled | None:
    """Kirillov et al., 2023, D.1: the point farthest from the edge of the error, missed and false together."""
    region = missed | false if background else missed
    if not region.any():
        return None
    (x, y), _ = deepest(region)
    return (x, y), int(missed[y, x])


def deepest_of_larger(
    missed: np.ndarray,
    false: np.ndarray,
    background: bool,
    clicked: Sequence[Click],
    generator: np.random.Generator,
) -> Labelled | None:
    """Sofiiuk et al., 2021: the deepest point of what is false, or of what was missed if that is deeper.

    No point is clicked twice (`not_clicked_map` of their `Clicker`), and if all were, there is none.
    """
    found = [(deepest(region, clicked), label) for region, label in ((missed, 1), (false, 0)) if region.any()]
    allowed = [(click, depth, label) for (click, depth), label in found if depth > 0 and (label or background)]
    if not allowed:
        return None
    click, _, label = max(allowed, key=lambda item: (item[1], -item[2]))
    return click, label


def random_error(
    missed: np.ndarray,
    false: np.ndarray,
    background: bool,
    clicked: Sequence[Click],
    generator: np.random.Generator,
) -> Labelled | None:
    """Zhou et al., 2023 (EdgeSAM): any point of the error."""
    region = missed | false if background else missed
    if not region.any():
        return None
    x, y = anywhere(region, generator)
    return (x, y), int(missed[y, x])


#: The protocols by their names.
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("box", None, None, (1,)),
        Protocol("paper", anywhere, None, (1, 3)),
        Protocol("sam", deepest_first, deepest_error, (1, 2, 3, 5, 9)),
        Protocol("ritm", deepest_first, deepest_of_larger, (1, 3, 5), wanted=(0.85, 0.90), most=20, ignoring=True),
        Protocol("centroid", lambda truth, generator: centroid(truth), random_error, (1, 2, 3)),
    )
}


def find_protocol(name: str, prompts: tuple[int, ...] | None = None) -> Protocol:
    """The protocol of this name, told after other numbers of clicks if `prompts` says so.

    Raises:
        ValueError: for an unknown name, or numbers that the protocol does not have.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}, wanted one of {', '.join(PROTOCOLS)}")
    return replace(PROTOCOLS[name], prompts=tuple(prompts)) if prompts else PROTOCOLS[name]


__all__ = ["PROTOCOLS", "Protocol", "errors", "find_protocol"]
