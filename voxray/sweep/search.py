"""How a sweep chooses: every combination, at random, or as Optuna proposes. No choice comes twice."""

import importlib.util
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from voxray.config.search_space import Choice, Domain, choice_key
from voxray.core.errors import SettingsError

MAX_REPEATS = 100
"""Times in a row that Optuna may propose what was tried already before the search counts as exhausted."""
MAX_DRAWS = 20_000
"""The same for draws at random, which take no time."""


class Search:
    """Choices one after the other.

    Those of a grid and of a random search depend on the space, the seed and how many were drawn alone, so that a sweep
    that goes on draws on where it was.

    Args:
        method: grid, random or optuna.
        mode: min or max.
        known: Choices made before with the values that came of them, None where none did.
    """

    def __init__(
        self,
        domains: Mapping[str, Domain],
        method: str,
        *,
        seed: int,
        mode: str,
        known: Iterable[tuple[Choice, float | None]] = (),
    ) -> None:
        known = list(known)
        self._seen = {choice_key(choice) for choice, _ in known}
        self._optuna = Proposals(domains, seed=seed, mode=mode, known=known) if method == "optuna" else None
        self._rest = (_grid if method == "grid" else _drawn)(domains, seed)
        self._size = math.prod(domain.size for domain in domains.values())

    def ask(self) -> Choice | None:
        """The next choice; None when there is no other left."""
        if len(self._seen) >= self._size:
            return None
        for choice in self._optuna or itertools.islice(self._rest, MAX_DRAWS):
            if choice_key(choice) not in self._seen:
                self._seen.add(choice_key(choice))
                return choice
        return None

    def tell(self, choice: Choice, value: float | None) -> None:
        """What came of a choice; None if nothing did."""
        if self._optuna:
            self._optuna.tell(choice, value)


def _grid(domains: Mapping[str, Domain], seed: int) -> Iterator[Choice]:
    for values in itertools.product(*(domain.all() for domain in domains.values())):
        yield dict(zip(domains, values, strict=True))


def _drawn(domains: Mapping[str, Domain], seed: int) -> Iterator[Choice]:
    rng = random.Random(seed)
    while True:
        yield {name: domain.draw(rng) for name, domain in domains.items()}


class Proposals:
    """What Optuna's TPE proposes; an endless iterator but for ``MAX_REPEATS``.

    Optuna is asked and told directly, not by Ray Tune's wrapper: what it knows is rebuilt from the trials on disk.
    """

    def __init__(
        self, domains: Mapping[str, Domain], *, seed: int, mode: str, known: Iterable[tuple[Choice, float | None]]
    ) -> None:
        import optuna  # pyright: ignore[reportMissingImports]

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._domains, self._asked = domains, dict[str, Any]()
        self._values: dict[str, float | None] = {}
        known = list(known)
        sampler = optuna.samplers.TPESampler(seed=seed + len(known))  # else it would draw its first proposals again
        direction = "minimize" if mode == "min" else "maximize"
        self._study = optuna.create_study(direction=direction, sampler=sampler)
        self._states = optuna.trial.TrialState
        self._distributions = {name: _distribution(domain) for name, domain in domains.items()}
        for choice, value in known:
            self.tell(choice, value)

    def __iter__(self) -> Iterator[Choice]:
        for _ in range(MAX_REPEATS):
            asked = self._study.ask(self._distributions)
            choice = {name: self._as_value(name, asked.params[name]) for name in self._domains}
            key = choice_key(choice)
            if key in self._values or key in self._asked:  # what came of it is known, or will be
                self._tell(asked, self._values.get(key))
                continue
            self._asked[key] = asked
            yield choice

    def tell(self, choice: Choice, value: float | None) -> None:
        """What came of a choice."""
        from optuna.trial import create_trial  # pyright: ignore[reportMissingImports]

        self._values[choice_key(choice)] = value
        asked = self._asked.pop(choice_key(choice), None)
        if asked is not None:
            self._tell(asked, value)
        elif value is not None:  # of an earlier start of the sweep
            params = {name: self._as_param(name, each) for name, each in choice.items()}
            self._study.add_trial(create_trial(params=params, distributions=self._distributions, value=value))

    def _tell(self, asked: Any, value: float | None) -> None:
        self._study.tell(asked, value, state=self._states.FAIL if value is None else None)

    def _as_param(self, name: str, value: Any) -> Any:
        domain = self._domains[name]
        return domain.values.index(value) if domain.kind == "choice" else value

    def _as_value(self, name: str, param: Any) -> Any:
        domain = self._domains[name]
        return domain.values[param] if domain.kind == "choice" else domain.tidy(param)


def _distribution(domain: Domain) -> Any:
    from optuna import distributions  # pyright: ignore[reportMissingImports]

    if domain.kind == "choice":
        return distributions.CategoricalDistribution(range(len(domain.values)))
    kind = distributions.IntDistribution if domain.whole else distributions.FloatDistribution
    return kind(*domain.values, log=domain.kind == "log")


def refuse_missing_optuna() -> None:
    """
    Raises:
        SettingsError: Optuna is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise SettingsError("--search optuna: Optuna is not installed: pip install 'voxray[optuna]'")
