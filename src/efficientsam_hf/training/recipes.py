"""What an object is asked in a training step, by name: the paper's setting, SAM's, SAM 2's."""

from dataclasses import dataclass
from typing import Literal

import torch

from ..modeling_efficientsam import EfficientSamModel


@dataclass(frozen=True)
class PromptRecipe:
    """The prompts of an object, one after the other, and what the answers are blamed for.

    From the second prompt on a model with `mask_prompts` sees the logits of its last answer, too; background clicks
    are given to models with `negative_points`, and mask token 0 is trained in models with `single_mask_token`.

    Args:
        rounds: Prompts that show something: a click or a box first, then a click on an error each.
        mask_rounds: Prompts that show nothing new but the last answer: the last of all, the others at random places.
        answer_chance: In which share of the steps of a model with `mask_prompts` further prompts are given with the
            last answer; in the others without it, as most users ask, which also takes less time and memory.
        box_chance: How often the first prompt is a box rather than a click.
        box_noise: Standard deviation of the box's coordinates as a share of its side.
        most_box_noise: Largest move of a box's coordinate as a share of the picture's side (20 of 1024 pixels in SAM).
        every_iou: Train the predicted IoU of all masks of a prompt, not of the nearest alone.
        iou_error: What the predicted IoU is blamed for: its error's square, or its size.
        answered_share: From the second prompt on, how much of the blame goes to the mask that a user is given, the
            one with the highest predicted IoU, rather than to the nearest. A first click may mean several things.
        single_mask_alone: From the second prompt on mask token 0 answers alone, as in SAM; otherwise it answers
            every prompt beside the three. Nothing without `single_mask_token`.
    """

    rounds: int = 1
    mask_rounds: int = 0
    answer_chance: float = 1.0
    box_chance: float = 0.5
    box_noise: float = 0.1
    most_box_noise: float = 20 / 1024
    every_iou: bool = False
    iou_error: Literal["squared", "absolute"] = "squared"
    answered_share: float = 0.0
    single_mask_alone: bool = False

    def check(self, model: EfficientSamModel) -> None:
        """Refuse what this model has no place for.

        Raises:
            ValueError: if the prompts have more slots than the model's, or show masks that it cannot read.
        """
        prompts = model.config.prompt_encoder_config
        most = prompts.max_prompt_points - 1
        for name in ("box_chance", "answer_chance", "answered_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {getattr(self, name)}")
        if not 1 <= self.rounds <= most:
            raise ValueError(
                f"rounds must be 1 to {most}: a box takes two of {prompts.max_prompt_points} slots; got {self.rounds} "
                "(extend_prompts gives a model more)"
            )
        if self.mask_rounds and not prompts.mask_prompts:
            raise ValueError(
                f"{self.mask_rounds} rounds show the last mask alone: wanted a model with mask_prompts "
                "(extend_prompts gives it them)"
            )

    def shows_answers(self, generator: torch.Generator | None = None) -> bool:
        """Whether this step's further prompts are given with the last answer."""
        if self.answer_chance in (0, 1):
            return bool(self.answer_chance)
        device = "cpu" if generator is None else generator.device
        return float(torch.rand((), generator=generator, device=device)) < self.answer_chance

    def order(self, generator: torch.Generator | None = None) -> list[bool]:
        """For each prompt whether it shows something new; the first one does."""
        shows = [True] * self.rounds
        for _ in range(self.mask_rounds - 1):
            device = "cpu" if generator is None else generator.device
            place = int(torch.randint(1, len(shows) + 1, (), generator=generator, device=device))
            shows.insert(place, False)
        return shows + [False] * (self.mask_rounds > 0)


RECIPES = {
    # The paper says "following SAM", its authors that no background clicks were given; how many clicks, nobody says.
    # The released weights have six slots, which a box and four clicks fill.
    "paper": PromptRecipe(rounds=5),
    # Kirillov et al., 2023, appendix A: eight clicks after the first prompt, and two rounds without one.
    "sam": PromptRecipe(rounds=9, mask_rounds=2, single_mask_alone=True),
    # Ravi et al., 2024, appendix D: seven clicks on a picture; the error of all predicted IoUs, not squared.
    "sam2": PromptRecipe(rounds=8, every_iou=True, iou_error="absolute", single_mask_alone=True),
}
