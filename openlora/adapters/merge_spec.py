"""How several adapters become one: what a request asks for. Stdlib only."""

from __future__ import annotations

from dataclasses import dataclass

from openlora.errors import InvalidRequest

METHODS = (
    *("cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_ties"),
    *("dare_linear_svd", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd"),
)
MAJORITY_SIGNS = ("total", "frequency")


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """The combination types of PEFT's ``add_weighted_adapter``.

    Attributes:
        method: "cat" is exactly Σ weight·ΔW, from the adapters' own pages; all others make a new
            adapter.
        density: share of the values that ties, dare and magnitude_prune methods keep, (0, 1].
        majority_sign: how ties methods elect a sign: by the "total" of the values or by their
            "frequency".
        seed: of what dare methods drop: PEFT's draws behind ``torch.manual_seed(seed)``.
    """

    method: str = "cat"
    density: float | None = None
    majority_sign: str = "total"
    seed: int = 0

    def check(self) -> None:
        """Raises InvalidRequest: a method, sign or density that there is not."""
        if self.method not in METHODS:
            raise InvalidRequest(
                f"merge method is {self.method!r}; use one of {', '.join(METHODS)}"
            )
        if self.majority_sign not in MAJORITY_SIGNS:
            raise InvalidRequest(
                f"majority_sign is {self.majority_sign!r}; use 'total' or 'frequency'"
            )
        if any(word in self.method for word in ("ties", "dare", "prune")) and not (
            self.density is not None and 0 < self.density <= 1
        ):
            raise InvalidRequest(
                f"density is {self.density}; merge method {self.method!r} needs one in (0, 1]"
            )


CAT = MergeSpec()
