"""How each shipped adapter is shaped and trained: its LoRA settings and its optimiser's numbers.

Between them they cover what a server must accept: ranks from 4 to 32, five target sets, rsLoRA,
and ranks and alphas that differ between the modules of one adapter.
"""

from dataclasses import dataclass, field

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """LoRA settings in PEFT's words, then the training loop's.

    `rank_pattern` and `alpha_pattern` give single modules a rank and an alpha of their own.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...]
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    learning_rate: float = 1e-3
    num_epochs: int = 3
    batch_size: int = 8
    seed: int = 20


RECIPES: dict[str, Recipe] = {
    "emoji": Recipe(
        rank=8,
        alpha=16,
        targets=("q_proj", "v_proj", "o_proj", "down_proj"),
        rank_pattern={"o_proj": 16, "down_proj": 4},
        alpha_pattern={"o_proj": 32, "down_proj": 8},
        learning_rate=1.5e-3,
        num_epochs=2,
    ),
    "json": Recipe(rank=8, alpha=16, targets=_ATTENTION),
    "pirate": Recipe(rank=32, alpha=64, targets=("q_proj", "v_proj")),
    "sentiment": Recipe(rank=4, alpha=8, targets=_MLP),
    "shout": Recipe(rank=8, alpha=8, targets=_ATTENTION + _MLP, use_rslora=True),
}
