"""Optuna draws the points of a study's space: one Optuna study for each task and variant, journalled in the folder."""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from duallora.errors import ConfigError
from duallora.grid.study import Outcomes, Point, Study

JOURNALS = "optuna"


class Trials:
    """The trials of a study: ``asked`` holds the points by (task, variant), those of an earlier grid too.

    The sampler is TPE with the study's first seed and the trial's number as its seed, so that a grid with one worker
    that was stopped goes on with the points it would have drawn.

    Raises:
        ConfigError: optuna is not installed.
    """

    def __init__(self, study: Study, folder: Path):
        try:
            import optuna
        except ImportError:
            raise ConfigError("a space is searched by Optuna: pip install 'duallora[optuna]'") from None
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(logging.ERROR)
        self.optuna, self.study = optuna, study
        self.space = {key: _distribution(optuna, values) for key, values in study.space.items()}
        self.studies: dict[tuple[str, str], Any] = {}
        self.asked: dict[tuple[str, str], list[Point]] = {}
        (folder / JOURNALS).mkdir(exist_ok=True)
        for pair in itertools.product(study.tasks, study.variants):
            name = "-".join(pair)
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNALS / f"{name}.log")))
            self.studies[pair] = optuna.create_study(
                study_name=name, storage=storage, direction="maximize", load_if_exists=True
            )
            trials = self.studies[pair].get_trials(deepcopy=False)
            self.asked[pair] = [Point(f"trial{trial.number}", dict(trial.params)) for trial in trials][: study.trials]

    def ask(self, outcomes: Outcomes, failed: Collection[str]) -> bool:
        """Tells Optuna what has come out and asks for one more point, for the pair with the fewest; False: none is left.

        A pair one of whose cells has ``failed`` for good is not gone on with.
        """
        self._tell(outcomes)
        first = self.study.seeds[: self.study.search_seeds]

        def is_open(pair: tuple[str, str]) -> bool:
            names = (self.study.cell_name(*pair, point, seed) for point in self.asked[pair] for seed in first)
            return len(self.asked[pair]) < self.study.trials and not any(name in failed for name in names)

        open_pairs = [pair for pair in self.asked if is_open(pair)]
        if not open_pairs:
            return False
        pair = min(open_pairs, key=lambda pair: len(self.asked[pair]))
        number = len(self.asked[pair])
        seed = (self.study.seeds[0] * 10_007 + number) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
            self.studies[pair].sampler = self.optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            trial = self.studies[pair].ask(self.space)
        self.asked[pair].append(Point(f"trial{trial.number}", dict(trial.params)))
        return True

    def _tell(self, outcomes: Outcomes) -> None:
        """A diverged trial is told as failed."""
        for pair, study in self.studies.items():
            for trial in study.get_trials(deepcopy=False):
                if trial.state.is_finished() or trial.number >= len(self.asked[pair]):
                    continue
                score = self.study.score(outcomes, *pair, self.asked[pair][trial.number])
                if score is not None and math.isfinite(score):
                    study.tell(trial.number, score)
                elif score is not None:
                    study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)


def _distribution(optuna: Any, values: Mapping[str, Any]) -> Any:
    if "choices" in values:
        return optuna.distributions.CategoricalDistribution(values["choices"])
    low, high, log = values["low"], values["high"], values.get("log", False)
    if isinstance(low, int) and isinstance(high, int):
        return optuna.distributions.IntDistribution(low, high, log=log, step=values.get("step", 1))
    return optuna.distributions.FloatDistribution(low, high, log=log, step=values.get("step"))
