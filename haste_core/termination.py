"""When phase I ends: triggers, and the sole owner of "which phase are we in" (Eq. 3, arXiv 2505.16792)."""

from __future__ import annotations

from typing import Any, Protocol

from haste_core import config


class Trigger(Protocol):
    """Decides the switch to phase II."""

    def fires(self, step: int) -> bool:
        """True when step `step` (from 0), not taken yet, should already be a phase II step."""
        ...


class Never:
    """Alignment stays on."""

    def fires(self, step: int) -> bool:
        """False."""
        return False


class FixedIteration:
    """Alignment ends before step `at`: steps 0 to at - 1 are aligned."""

    def __init__(self, at: int) -> None:
        self.at = at

    def fires(self, step: int) -> bool:
        """True from step `at` on."""
        return step >= self.at


class Termination:
    """The phase of a run: 1 while alignment is on, 2 from the switch to the end. It never goes back.

    A run without alignment is in phase 2 throughout: a vanilla step and a phase II step are the same thing.
    """

    def __init__(self, run: config.RunConfig) -> None:
        at = run.termination.at
        self.trigger: Trigger = Never() if at is None else FixedIteration(at)
        self.phase = 1 if run.alignment.active else 2
        self.switched_at: int | None = None

    def update(self, step: int) -> bool:
        """Ask the trigger before step `step`; True when the run switches to phase II right now."""
        if self.phase == 2 or not self.trigger.fires(step):
            return False
        self.phase, self.switched_at = 2, step
        return True

    def state_dict(self) -> dict[str, Any]:
        """JSON-like phase and trigger state."""
        return {"phase": self.phase, "switched_at": self.switched_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the phase that was saved."""
        self.phase, self.switched_at = state["phase"], state["switched_at"]
