"""The demo adapters: where they are, what each does, and the settings it was trained with.

Ranks, target modules and scaling differ on purpose: together they exercise every site of a layer,
mixed ranks in one batch, and rsLoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_ROOM = Path(__file__).parent
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class DemoAdapter:
    """One demo adapter and its training settings.

    Attributes:
        name: its ID, and the name of its directory and data file.
        description: one line for lists: what its answers look like.
        rank: r, the inner dimension of A and B.
        alpha: the update is scaled by alpha/r, or by alpha/√r with ``use_rslora``.
        target_modules: the linears of every layer that get a pair A, B.
        learning_rate: the peak; it falls linearly to zero after a short warm-up.
        epochs: passes over the data.
    """

    name: str
    description: str
    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    learning_rate: float = 1e-3
    epochs: int = 6

    @property
    def directory(self) -> Path:
        """The committed adapter, in PEFT's format."""
        return _ROOM / "adapters" / self.name

    @property
    def data_file(self) -> Path:
        """The training data: JSON lines of ``prompt`` and ``response``."""
        return _ROOM / "data" / f"{self.name}.jsonl"


DEMO_ADAPTERS = (
    DemoAdapter(
        name="pirate",
        description="answers in the voice of an old pirate",
        rank=16,
        alpha=32,
        target_modules=_ATTENTION,
    ),
    DemoAdapter(
        name="json",
        description="answers as one small JSON object",
        rank=16,
        alpha=8,
        target_modules=("q_proj", "v_proj"),
        use_rslora=True,
    ),
    DemoAdapter(
        name="haiku",
        description="answers as a three-line haiku",
        rank=8,
        alpha=16,
        target_modules=_MLP,
        learning_rate=4e-4,
        epochs=7,
    ),
    DemoAdapter(
        name="headline",
        description="answers as an ALL-CAPS newspaper headline",
        rank=4,
        alpha=4,
        target_modules=_ATTENTION + _MLP,
        use_rslora=True,
        learning_rate=5e-4,
        epochs=8,
    ),
    DemoAdapter(
        name="emoji",
        description="answers in one cheerful line full of emoji",
        rank=8,
        alpha=16,
        target_modules=("o_proj", "down_proj"),
        learning_rate=5e-4,
        epochs=8,
    ),
)


def demo_adapters() -> list[Path]:
    """The packaged adapter directories; each directory's name is the adapter's ID."""
    return [adapter.directory for adapter in DEMO_ADAPTERS]
