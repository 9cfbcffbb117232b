"""One fault to plant in the code, and the tests that must notice it."""

from dataclasses import dataclass


class StaleMutantError(ValueError):
    """A mutant's text is not in its file exactly once: the code has changed, and the list must follow."""


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: what is wrong, in a few words.
        file: path in the repository.
        before: text that the file holds exactly once.
        after: what replaces it.
        tests: pytest node ids of the nearest tests.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def apply(self, text: str) -> str:
        """The file's text with the fault.

        Raises:
            StaleMutantError: the text to replace is there never or more than once, or nothing would change.
        """
        count = text.count(self.before)
        if count != 1 or self.before == self.after:
            raise StaleMutantError(
                f"mutant '{self.name}': its text is {count} times in {self.file} and must be there once, and another "
                f"after the change; bring tools/mutation/ up to date with the code:\n{self.before}"
            )
        return text.replace(self.before, self.after)


def mutants_of(file: str, default_tests: tuple[str, ...], *faults: tuple[str, ...]) -> tuple[Mutant, ...]:
    """Mutants of one file from (name, before, after, tests ...); without tests of its own a fault has the default."""
    return tuple(Mutant(f[0], file, f[1], f[2], tuple(f[3:]) or default_tests) for f in faults)
