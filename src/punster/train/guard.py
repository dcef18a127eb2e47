"""Going back to the last good step when a policy-gradient run goes wrong."""

from __future__ import annotations

import json
import math
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from punster.errors import Aborted
from punster.model.tokenizer import Tokenizer
from punster.train.checkpoint import State, damage, remove, save_checkpoint, steps_of
from punster.train.run import Run

KEPT, LOST = "its last good one", "whose updates are to blame: no checkpoint before them is left"
Packed = tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]  # a state's tensors and numbers, and the place in the logs


def keep_begun(run: Run, state: State, tokenizer: Tokenizer, step: int) -> tuple[int, Packed]:
    """Before anything of a step is done: the step before it and the state, which becomes a checkpoint if this step fails."""
    tensors, numbers = state.pack()
    begun = ({name: tensor.clone() for name, tensor in tensors.items()}, numbers, run.place())

    def save() -> None:
        if step - 1 > run.step:  # something was learned, and is in no checkpoint yet
            state.unpack(*begun[:2])
            save_checkpoint(run, step - 1, state, tokenizer, place=begun[2])

    run.on_failure = save
    return step - 1, begun


class Guard:
    """Remembers the state in which a step began, and the newest one whose own rollout was in order.

    A rollout shows what the updates before it did: if its KL is out of bounds, the state before those updates is the last
    good one. A loss that is not finite damages nothing yet: the state in which its step began is good.
    """

    def __init__(self, run: Run, state: State, tokenizer: Tokenizer, max_kl: float):
        self.run, self.state, self.tokenizer, self.max_kl = run, state, tokenizer, max_kl
        self.good: tuple[int, Packed] | None = None
        self.began: tuple[int, Packed]

    def begin(self, step: int) -> None:
        """Before anything of this step is done."""
        self.began = keep_begun(self.run, self.state, self.tokenizer, step)

    def check_rollout(self, kl: Tensor, mask: Tensor) -> None:
        """kl, mask (B, R): exact KL of the rollout's tokens. Raises Aborted if a response has more than max_kl on average."""
        mean = float((kl * mask).sum(1).mean())
        if not mean <= self.max_kl:
            known = self.good or self.earlier()
            kept = KEPT if known or not self.began[0] else LOST
            self.abort(*(known or self.began), f"exact KL {mean:.1f} nats a response, above --max-kl {self.max_kl:g}", kept)
        self.good = self.began

    def check_end(self, figures: dict[str, float]) -> None:
        """No rollout follows the last updates: raises Aborted if the last evaluation's exact KL is out of bounds."""
        kl = figures.get("eval/exact_kl", 0.0)
        if kl <= self.max_kl:
            return
        reason = f"exact KL {kl:.1f} nats a response in the evaluation, above --max-kl {self.max_kl:g}"
        if self.good:
            self.abort(*self.began, reason)
        self.begin(self.run.step + 1)  # it was interrupted after its last step, and nothing was learned since
        known = self.earlier()
        self.abort(*(known or self.began), reason, KEPT if known else LOST)

    def earlier(self) -> tuple[int, Packed] | None:
        """Of a run that was resumed with the updates that went wrong: the newest whole checkpoint before them."""
        for step in sorted(steps_of(self.run.folder), reverse=True):
            place = self.run.checkpoints / f"step-{step}"
            if step < self.began[0] and not damage(place):
                numbers, known = (json.loads((place / file).read_text()) for file in ("state.json", "context.json"))
                return step, (load_file(place / "state.safetensors"), numbers, known)
        return None

    def check_losses(self, losses: dict[str, float]) -> None:
        """Raises Aborted if one of these losses is not finite."""
        for name, value in losses.items():
            if not math.isfinite(value):
                self.abort(*self.began, f"{name} is {value}")

    def abort(self, step: int, packed: Packed, reason: str, kept: str = KEPT) -> None:
        """Restore a state, make it the run's newest checkpoint and its result, and stop."""
        run, (tensors, numbers, place) = self.run, packed
        seen = min(self.began[0] + 1, run.steps)
        run.on_failure = None  # the state in which the step began may be what went wrong
        self.state.unpack(tensors, numbers)
        if damage(run.checkpoints / f"step-{step}"):  # or not there
            save_checkpoint(run, step, self.state, self.tokenizer, place=place)
        for later in [n for n in steps_of(run.folder) if n > step]:
            remove(run.checkpoints / f"step-{later}")
        run.finish({"steps": step, "aborted": reason, "aborted_at": seen})
        raise Aborted(
            f"STOPPED at step {seen} of {run.steps}: {reason}. {run.folder} is back at step {step}, {kept}. "
            "Lower --lr, or raise --beta, and start again under another name."
        )
