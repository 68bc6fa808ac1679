"""Search algorithms of a sweep: grid, random, and Optuna. No choice is proposed twice."""

import importlib.util
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from voxray.config.search_space import Choice, Domain, choice_key
from voxray.core.errors import SettingsError

MAX_REPEATS = 100
"""The search ends after this many consecutive Optuna proposals that were tried before."""
MAX_DRAWS = 20_000
"""The same for random draws, which take no time."""


class Search:
    """Proposes choices one at a time.

    The choices of grid and random search depend only on the space, the seed and the number of earlier choices, so a
    resumed sweep continues the same sequence.

    Args:
        domains: The search space, by flag.
        method: grid, random or optuna.
        mode: min or max.
        known: Earlier choices with their metric values; None for trials without a value.
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
        self._sequence = _grid(domains) if method == "grid" else _random(domains, seed)
        self._size = math.prod(domain.size for domain in domains.values())

    def ask(self) -> Choice | None:
        """The next choice; None if the space is exhausted."""
        if len(self._seen) >= self._size:
            return None
        for choice in self._optuna or itertools.islice(self._sequence, MAX_DRAWS):
            if choice_key(choice) not in self._seen:
                self._seen.add(choice_key(choice))
                return choice
        return None

    def tell(self, choice: Choice, value: float | None) -> None:
        """Report the metric value of a choice; None if its trial has none."""
        if self._optuna:
            self._optuna.tell(choice, value)


def _grid(domains: Mapping[str, Domain]) -> Iterator[Choice]:
    for values in itertools.product(*(domain.all() for domain in domains.values())):
        yield dict(zip(domains, values, strict=True))


def _random(domains: Mapping[str, Domain], seed: int) -> Iterator[Choice]:
    rng = random.Random(seed)
    while True:
        yield {name: domain.sample(rng) for name, domain in domains.items()}


class Proposals:
    """Proposals of Optuna's TPE sampler; iteration ends after ``MAX_REPEATS`` repeated proposals.

    This uses Optuna's ask-and-tell interface instead of Ray Tune's wrapper, so that the study can be rebuilt from the
    trials on disk.
    """

    def __init__(
        self, domains: Mapping[str, Domain], *, seed: int, mode: str, known: Iterable[tuple[Choice, float | None]]
    ) -> None:
        import optuna  # pyright: ignore[reportMissingImports]

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._domains, self._open_trials = domains, dict[str, Any]()
        self._values: dict[str, float | None] = {}
        known = list(known)
        sampler = optuna.samplers.TPESampler(seed=seed + len(known))  # else it would repeat its first proposals
        direction = "minimize" if mode == "min" else "maximize"
        self._study = optuna.create_study(direction=direction, sampler=sampler)
        self._states = optuna.trial.TrialState
        self._distributions = {name: _distribution(domain) for name, domain in domains.items()}
        for choice, value in known:
            self.tell(choice, value)

    def __iter__(self) -> Iterator[Choice]:
        for _ in range(MAX_REPEATS):
            optuna_trial = self._study.ask(self._distributions)
            choice = {name: self._as_value(name, optuna_trial.params[name]) for name in self._domains}
            key = choice_key(choice)
            if key in self._values or key in self._open_trials:  # the value is known, or its trial is running
                self._tell(optuna_trial, self._values.get(key))
                continue
            self._open_trials[key] = optuna_trial
            yield choice

    def tell(self, choice: Choice, value: float | None) -> None:
        """Report the metric value of a choice; None if its trial has none."""
        from optuna.trial import create_trial  # pyright: ignore[reportMissingImports]

        self._values[choice_key(choice)] = value
        optuna_trial = self._open_trials.pop(choice_key(choice), None)
        if optuna_trial is not None:
            self._tell(optuna_trial, value)
        elif value is not None:  # a trial of an earlier start of the sweep
            params = {name: self._as_param(name, flag_value) for name, flag_value in choice.items()}
            self._study.add_trial(create_trial(params=params, distributions=self._distributions, value=value))

    def _tell(self, optuna_trial: Any, value: float | None) -> None:
        self._study.tell(optuna_trial, value, state=self._states.FAIL if value is None else None)

    def _as_param(self, name: str, value: Any) -> Any:
        domain = self._domains[name]
        return domain.values.index(value) if domain.kind == "choice" else value

    def _as_value(self, name: str, param: Any) -> Any:
        domain = self._domains[name]
        return domain.values[param] if domain.kind == "choice" else domain.rounded(param)


def _distribution(domain: Domain) -> Any:
    from optuna import distributions  # pyright: ignore[reportMissingImports]

    if domain.kind == "choice":
        return distributions.CategoricalDistribution(range(len(domain.values)))
    kind = distributions.IntDistribution if domain.whole else distributions.FloatDistribution
    return kind(*domain.values, log=domain.kind == "log")


def refuse_missing_optuna() -> None:
    """Check that Optuna is installed.

    Raises:
        SettingsError: It is not.
    """
    if importlib.util.find_spec("optuna") is None:
        raise SettingsError("--search optuna: Optuna is not installed: pip install 'voxray[optuna]'")
