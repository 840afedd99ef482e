"""What an evaluation left out, and why: counted and named, or refused."""

from collections import Counter
from collections.abc import Iterable

NAMED = 3  # examples kept of each reason


class Skips:
    """Reasons with the number of things left out for each, and the names of the first.

    Args:
        strict: Leave nothing out: raise instead.
    """

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count one more, called `name`.

        Raises:
            ValueError: if strict; names it and the reason.
        """
        if self.strict:
            raise ValueError(f"{name}: {reason} (without --strict it would be left out and counted)")
        self.note(reason, name)

    def note(self, reason: str, name: str) -> None:
        """Count one more that is no fault, so that nothing stops at it."""
        self.merge({reason: {"count": 1, "such_as": [name]}})

    def merge(self, record: dict) -> None:
        """Add what another evaluation's `record` says."""
        for reason, entry in record.items():
            self.counts[reason] += entry["count"]
            self.names[reason] = [*self.names.get(reason, []), *entry["such_as"]][:NAMED]

    def record(self) -> dict[str, dict]:
        """For JSON: `{reason: {"count": ..., "such_as": [...]}}`."""
        return {
            reason: {"count": self.counts[reason], "such_as": self.names[reason]} for reason in sorted(self.counts)
        }

    @classmethod
    def of(cls, records: Iterable[dict]) -> "Skips":
        """All of these records together."""
        skips = cls()
        for record in records:
            skips.merge(record)
        return skips
