"""What a watch has seen, as a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, TypeAlias

from batchnorm.errors import StateError
from batchnorm.monitor.drift import MIN_SAMPLES, ChannelDrift, LayerDrift
from batchnorm.monitor.saturation import SLOPE, ActivationUse
from batchnorm.report import Document, Paragraph, Plot, Result, Section, Series, Table, foremost
from batchnorm.report.document import Block, Cell, Tone
from batchnorm.report.result import finite_or_none

__all__ = ["WatchResult", "WatchVerdict"]

_NO_CHANNELS = ("too few samples", "not called", "non-finite statistics")
WatchVerdict: TypeAlias = Literal["as stored", "drifted", "not judged"]


@dataclass(frozen=True, repr=False)
class WatchResult(Result):
    """What every norm and activation met.

    Attributes:
        layers: one entry a norm, in the order in which they were called; those never called come last.
        saturation: one entry an activation (sigmoid, tanh, ReLU and their hard versions), in the order of their calls.
        tolerance: the distance that is no drift, in stored standard deviations.
        level: probability that anything is flagged though the data is what it was.
        every: of the calls of the model every so many-th was looked at.
        window: how many samples count at most, the last ones; None for all.
        notes: what the numbers do not say, as sentences.
        by_reference: whether the comparison was with a population, and not with what the norms have stored. Standard
            deviations are those of the reference then.
    """

    layers: tuple[LayerDrift, ...]
    saturation: tuple[ActivationUse, ...]
    tolerance: float
    level: float
    every: int = 1
    window: int | None = None
    notes: tuple[str, ...] = ()
    by_reference: bool = False

    @property
    def verdict(self) -> WatchVerdict:
        """``"drifted"`` if a norm is flagged, ``"as stored"`` if one could be judged, else ``"not judged"``.

        Where statistics are not finite, what norms behind that one meet comes of them, whatever the data was: then it
        is not judged, unless a norm before it met data that drifted.
        """
        if self._unusable:
            return "drifted" if self._drifted_before else "not judged"
        statuses = {layer.status for layer in self.layers}
        if any(layer.flagged for layer in self.layers):
            return "drifted"
        return "as stored" if "as stored" in statuses else "not judged"

    @property
    def drifted(self) -> bool:
        """Whether any norm is flagged. That none is, is an answer only if something was seen.

        Raises:
            StateError: no norm met enough samples to be judged, so that there is no answer; :attr:`verdict` says so
                without an error.
        """
        if self.verdict == "not judged":
            more = "" if self._unusable else " Let the watched model meet more samples first;"
            raise StateError(
                f"watch: whether the data drifted is not known. {self.summary}{more} result.verdict can be asked at "
                "any time."
            )
        return self.verdict == "drifted"

    @property
    def samples(self) -> int:
        """Number of samples that passed through the model."""
        return max((layer.samples for layer in self.layers), default=0)

    @property
    def _unusable(self) -> list[str]:
        return [layer.name or "the model" for layer in self.layers if layer.status == "non-finite statistics"]

    @property
    def _drifted_before(self) -> list[LayerDrift]:
        """Return the norms that met other data, none of whose statistics before them are unusable."""
        usable = takewhile(lambda layer: layer.status != "non-finite statistics", self.layers)
        return [layer for layer in usable if layer.status == "drifted"]

    @property
    def _known(self) -> str:
        return "the reference" if self.by_reference else "the stored statistics"

    @property
    def _unit(self) -> str:
        return "standard deviations of the reference" if self.by_reference else "stored standard deviations"

    @property
    def _noun(self) -> str:
        return "layer" if self.by_reference else "norm"  # a folded model has no norms

    def _of(self, count: int) -> str:
        return f"{count} of {len(self.layers)} {self._noun}{'s' * (len(self.layers) != 1)}"

    def document(self) -> Document:
        """Return the report as data."""
        summary, tone = self._told()
        judged = [layer for layer in self.layers if layer.distance is not None]
        plots = [self._plot(judged)] if len(judged) > 1 else []
        notes = [Paragraph(note) for note in self.notes]
        sections = [
            Section(
                f"{self._noun.capitalize()}s", [*notes, self._layer_table(), *plots], [*notes, *self._worst_norms()]
            )
        ]
        if self.saturation:
            sections.append(Section("Activations", [_activation_table(self.saturation)], self._worst_activations()))
        return Document("Watch", summary, sections, tone)

    def _worst_norms(self) -> list[Block]:
        """Return what a terminal shows: the flagged norms, or those that are farthest off, a few of them."""
        rows: list[list[Cell]] = [
            [
                layer.name or "(the model)",
                layer.status,
                layer.distance,
                layer.bound,
                None if layer.status in _NO_CHANNELS else _words(layer.worst(1)),
            ]
            for layer in self.layers
        ]
        flagged = [row for row, layer in enumerate(self.layers) if _is_bad(layer)]
        return [
            Table(
                [self._noun, "verdict", "distance", "at least", "worst channel"],
                rows,
                caption=f"In {self._unit} σ. Flagged: at least {self.tolerance:g}.",
                tones=dict.fromkeys(flagged, "bad"),
                shown=foremost([finite_or_none(layer.distance) or 0.0 for layer in self.layers], flagged),
                optional=("at least",),
            )
        ]

    def _worst_activations(self) -> list[Block]:
        """Return the activations that have lost most of their units, a few of them, and how many there are."""
        lost = [use for use in self.saturation if _mostly_lost(use)]
        dead = sum(len(use.dead or ()) for use in self.saturation)
        count = f"{len(self.saturation)} activation{'s' * (len(self.saturation) != 1)}"
        text = f"{count}: {dead} dead units behind ReLU; {len(lost)} with most of their units or values lost."
        return [Paragraph(text), *([_activation_table(lost)] if lost else [])]

    @property
    def summary(self) -> str:
        """The result in one line."""
        return self._told()[0]

    def _told(self) -> tuple[str, Tone]:
        flagged = self._drifted_before
        broken = [layer.name or "the model" for layer in self.layers if layer.nonfinite]
        if self._unusable:
            poisoned = (
                f"The statistics of {_some(self._unusable)} are NaN, infinite or negative, so that nothing can be "
                "compared with them: load them anew, or recalibrate the model, and open a new watch."
            )
            behind = f"Non-finite values in {_some(broken)}, which may come of that."
            drift = f"Drift: {self._of(len(flagged))} met other data."
            return " ".join([poisoned] + [drift] * bool(flagged) + [behind] * bool(broken)), "bad"
        if flagged or broken:
            unknown = f"{self._known} {'does' if self.by_reference else 'do'} not describe"
            drift = f"Drift: {self._of(len(flagged))} met data that {unknown}."
            nan = f"Non-finite values in {_some(broken)}; samples that hold them are left out there."
            return " ".join([drift] * bool(flagged) + [nan] * bool(broken)), "bad"
        judged = [layer for layer in self.layers if layer.status == "as stored"]
        if judged:
            rest = "" if len(judged) == len(self.layers) else f" ({self._of(len(judged))} could be judged)"
            met = "every layer met what the reference did" if self.by_reference else "every norm met what it has stored"
            return f"No drift: {met}{rest}, in {self.samples:,} samples.", "good"
        if self.samples:
            seen = f"{self.samples} sample{'s' * (self.samples > 1)} seen"
            return f"Not enough samples to judge: {seen}, at least {MIN_SAMPLES} needed.", "plain"
        return "Nothing to compare: the model was not called while it was watched.", "plain"

    def _layer_table(self) -> Table:
        rows = [
            [
                layer.name or "(the model)",
                layer.status,
                layer.samples,
                None if layer.effective is None else round(layer.effective),
                layer.distance,
                layer.bound,
                layer.detectable,
                None if layer.status in _NO_CHANNELS else _words(layer.worst(1)),
            ]
            for layer in self.layers
        ]
        bad = [row for row, layer in enumerate(self.layers) if _is_bad(layer)]
        return Table(
            [self._noun, "verdict", "samples", "effective", "distance", "lower bound", "detectable", "worst channel"],
            rows,
            caption=f"Distance: how far the typical channel is from {self._known}, in {self._unit} σ, noise taken off. "
            f"Flagged where its lower bound exceeds {self.tolerance:g}. Effective: "
            "number of independent values behind a channel's mean. Detectable: about the smallest distance that this "
            "stream would have been flagged for.",
            tones=dict.fromkeys(bad, "bad"),
            shown=foremost([layer.distance or 0.0 for layer in self.layers], bad),
            optional=("effective", "samples", "detectable", "lower bound"),
        )

    def _plot(self, judged: Sequence[LayerDrift]) -> Plot:
        names = [layer.name for layer in judged]
        return Plot(
            f"Distance from {self._known}",
            self._noun,
            self._unit,
            [
                Series("distance", names, [finite_or_none(layer.distance) or 0.0 for layer in judged], "bar"),
                Series("tolerance", names, [self.tolerance] * len(judged), "dashed"),
            ],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result as numbers, strings, lists and dicts only; what is not known or not finite is None."""
        return {
            "verdict": self.verdict,
            "drifted": None if self.verdict == "not judged" else self.drifted,
            "samples": self.samples,
            "tolerance": self.tolerance,
            "level": self.level,
            "every": self.every,
            "window": self.window,
            "by_reference": self.by_reference,
            "notes": list(self.notes),
            "summary": self.summary,
            "layers": [
                {
                    "name": layer.name,
                    "status": layer.status,
                    "flagged": layer.flagged,
                    "samples": layer.samples,
                    "nonfinite_samples": layer.nonfinite,
                    "effective_values": finite_or_none(layer.effective),
                    "distance": finite_or_none(layer.distance),
                    "lower_bound": finite_or_none(layer.bound),
                    "detectable": finite_or_none(layer.detectable),
                    "worst_channels": [
                        {
                            "channel": worst.channel,
                            "shift": finite_or_none(worst.shift),
                            "standard_errors": finite_or_none(worst.standard_errors),
                            "variance_ratio": finite_or_none(worst.variance_ratio),
                        }
                        for worst in layer.worst()
                    ],
                }
                for layer in self.layers
            ],
            "activations": [
                {
                    "name": use.name,
                    "kind": use.kind,
                    "units": use.units,
                    "values": use.values,
                    "saturated": use.saturated,
                    "stuck_units": None if use.stuck is None else list(use.stuck),
                    "dead_units": None if use.dead is None else list(use.dead),
                }
                for use in self.saturation
            ],
        }


def _activation_table(uses: Sequence[ActivationUse]) -> Table:
    rows = [
        [
            use.name or "(the model)",
            use.kind,
            use.units,
            None if use.saturated is None else f"{100 * use.saturated:.1f} %",
            None if use.stuck is None else len(use.stuck),
            None if use.dead is None else len(use.dead),
        ]
        for use in uses
    ]
    bad = [row for row, use in enumerate(uses) if _mostly_lost(use)]
    return Table(
        ["called in", "function", "units", "saturated values", "always saturated units", "dead units"],
        rows,
        caption=f"Saturated: slope below {100 * SLOPE:g} % of its maximum. Dead: a unit (channel, feature) that fired "
        "at no sample and no position.",
        tones=dict.fromkeys(bad, "bad"),
        shown=foremost([max(use.saturated or 0.0, len(use.dead or ()) / max(use.units, 1)) for use in uses], bad),
        optional=("units", "always saturated units"),
    )


def _is_bad(layer: LayerDrift) -> bool:
    return layer.flagged or layer.status == "non-finite statistics"


def _mostly_lost(use: ActivationUse) -> bool:
    return (use.saturated or 0) > 0.5 or 2 * len(use.dead or ()) > use.units


def _words(worst: Sequence[ChannelDrift]) -> str | None:
    """Return e.g. ``"41: +0.15 σ (2.4 s.e.), variance × 0.99"``, with no-break spaces in what belongs together."""
    if not worst:
        return None
    w = worst[0]
    errors = f" ({abs(w.standard_errors):.3g}\u00a0s.e.)" if math.isfinite(w.standard_errors) else ""
    ratio = f", variance\u00a0×\u00a0{w.variance_ratio:.3g}" if math.isfinite(w.variance_ratio) else ""
    return f"{w.channel}:\u00a0{w.shift:+.2g}\u00a0σ{errors}{ratio}".replace("-", "−")


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
