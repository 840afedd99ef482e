"""The interactive training step: encode a picture once, prompt it, look where the answer is wrong, prompt again."""

import torch
from torch import Tensor, nn

from ..loss_efficientsam import resize_labels, segmentation_loss
from ..modeling_efficientsam import EfficientSamModel, best_mask
from .prompts import click_inside, click_on_error, noisy_boxes


class InteractiveSegmentation(nn.Module):
    """Everything of a training step that needs the weights.

    One module, because data-parallel training only synchronises the gradients of what goes through the forward of the
    module it wraps.

    Args:
        model: The model to train; its config says whether background clicks may be given.
        rounds: Prompts an object gets: a click or a box first, then a click on an error each. Slots permitting.
        box_chance: How often the first prompt is a box rather than a click.
        box_noise: Standard deviation of the box's coordinates as a share of its side.
        most_box_noise: Largest move of a box's coordinate as a share of the picture's side (20 of 1024 pixels in SAM).
        every_iou: Train the predicted IoU of all masks of a prompt, not of the nearest alone.
    """

    def __init__(
        self,
        model: EfficientSamModel,
        rounds: int = 1,
        box_chance: float = 0.5,
        box_noise: float = 0.1,
        most_box_noise: float = 20 / 1024,
        every_iou: bool = False,
    ):
        super().__init__()
        slots = model.config.prompt_encoder_config.max_prompt_points
        if not 1 <= rounds <= slots - 2:
            raise ValueError(f"rounds must be 1 to {slots - 2}: a box takes two of {slots} slots; got {rounds}")
        self.model = model
        self.rounds = rounds
        self.box_chance = box_chance
        self.box_noise = box_noise
        self.most_box_noise = most_box_noise
        self.every_iou = every_iou

    def forward(
        self, pixel_values: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """One training step's losses.

        Args:
            pixel_values: (B, 3, S, S).
            labels: (B, Q, h, w), 1 on the object, 0 off it, below 0 unknown; a prompt all unknown is padding.
            generator: Source of the prompts.

        Returns:
            `loss` and its parts `focal`, `dice`, `iou`, each a mean over the rounds.
        """
        embeddings = self.model.get_image_embeddings(pixel_values)
        grid = (4 * embeddings.shape[-2], 4 * embeddings.shape[-1])
        targets, known = (part.bool().flatten(0, 1) for part in resize_labels(labels, grid))
        targets = targets & known
        scale = pixel_values.shape[-1] / grid[1]
        boxes, points, point_labels = self.first_prompt(targets, scale, generator)
        losses = []
        for number in range(self.rounds):
            outputs = self.model(
                image_embeddings=embeddings,
                input_boxes=boxes.unflatten(0, labels.shape[:2]),
                input_points=points.unflatten(0, labels.shape[:2]),
                input_labels=point_labels.unflatten(0, labels.shape[:2]),
            )
            loss = segmentation_loss(outputs.pred_masks, outputs.iou_scores, labels, every_iou=self.every_iou)
            losses.append(loss)
            if number + 1 < self.rounds:
                answer = best_mask(outputs.pred_masks.detach(), outputs.iou_scores.detach())[0]
                # What nobody knows is no error, and gets no click.
                answer = (answer.flatten(0, 2) >= 0) & known
                point, label = self.next_click(answer, targets, scale, generator)
                points = torch.cat([points, point[:, None]], dim=1)
                point_labels = torch.cat([point_labels, label[:, None]], dim=1)
        return {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}

    def first_prompt(
        self, targets: Tensor, scale: float, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A box or a click for each mask (N, h, w); the one not given is padding. -> (N, 4), (N, 1, 2), (N, 1)."""
        most = self.most_box_noise * scale * targets.shape[-1]
        boxes = noisy_boxes(targets, scale, self.box_noise, most, generator)
        points, point_labels = click_inside(targets, scale, generator)
        is_box = torch.rand(len(targets), generator=generator, device=targets.device) < self.box_chance
        boxes = boxes.masked_fill(~is_box[:, None], -1.0)
        points, point_labels = points.masked_fill(is_box[:, None], -1.0), point_labels.masked_fill(is_box, -1)
        return boxes, points[:, None], point_labels[:, None]

    def next_click(
        self, answer: Tensor, targets: Tensor, scale: float, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """A click on each answer's error, background ones only for a model that learns them."""
        background = self.model.config.prompt_encoder_config.negative_points
        return click_on_error(answer, targets, scale, background, generator)
