"""The interactive training step: encode a picture once, prompt it, look where the answer is wrong, prompt again."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..loss_efficientsam import resize_labels, segmentation_loss
from ..modeling_efficientsam import EfficientSamModel, best_mask
from .optimization import freeze
from .prompts import click_inside, click_on_error, noisy_boxes
from .recipes import PromptRecipe

ONE, THREE, ALL = slice(0, 1), slice(1, None), slice(0, None)


def segmentation_inputs(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """A batch -> the arguments of `InteractiveSegmentation`; prompts are drawn on the pictures' device."""
    drawing = torch.Generator(batch["pixel_values"].device).manual_seed(generator.initial_seed())
    return {**batch, "generator": drawing}


class InteractiveSegmentation(nn.Module):
    """Everything of a training step that needs the weights.

    One module, because data-parallel training only synchronises the gradients of what goes through the forward of the
    module it wraps: call it, and nothing of the model beside it.

    Args:
        model: The model to train; its config says whether background clicks, masks and token 0 are trained. Parameters
            that no loss reaches are frozen: FSDP resumes no optimizer that has them.
        recipe: What an object is asked.

    Raises:
        ValueError: if the recipe does not fit the model.
    """

    # What FSDP gathers one by one. All else, the decoder above all, is used in parts and several times in a step.
    _no_split_modules = ["EfficientSamVisionLayer"]

    def __init__(self, model: EfficientSamModel, recipe: PromptRecipe | None = None):
        super().__init__()
        self.recipe = recipe or PromptRecipe()
        self.recipe.check(model)
        self.model = model
        self.trains_token_0 = model.config.mask_decoder_config.single_mask_token
        # What an earlier task of this model did not reach, this one may.
        named, earlier = dict(model.named_parameters()), model.__dict__.pop("out_of_reach", [])
        for name in named.keys() & set(earlier):
            named[name].requires_grad_(True)
        trained = [name for name, parameter in named.items() if parameter.requires_grad]
        freeze(model, self.unreached())
        model.out_of_reach = [name for name in trained if not named[name].requires_grad]

    def forward(
        self, pixel_values: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """One training step's losses.

        Args:
            pixel_values: (B, 3, S, S).
            labels: (B, Q, h, w), 1 on the object, 0 off it, below 0 unknown; a prompt all unknown is padding.
            generator: Source of the prompts.

        Returns:
            `loss` and its parts `focal`, `dice`, `iou`, each a mean over the prompts of an object.
        """
        embeddings = self.model.get_image_embeddings(pixel_values)
        grid = (4 * embeddings.shape[-2], 4 * embeddings.shape[-1])
        targets, known = (part.bool().flatten(0, 1) for part in resize_labels(labels, grid))
        targets, scale = targets & known, pixel_values.shape[-1] / grid[1]
        boxes, points, point_labels = self.first_prompt(targets, scale, generator)
        losses, answer = [], None
        shows_answers = self.model.config.prompt_encoder_config.mask_prompts and self.recipe.shows_answers(generator)
        for number, shows in enumerate(self.recipe.order(generator)):
            if answer is not None and shows:
                # What nobody knows is no error, and gets no click.
                covered = (answer.flatten(0, 2) >= 0) & known
                point, label = self.next_click(covered, targets, scale, generator)
                points = torch.cat([points, point[:, None]], dim=1)
                point_labels = torch.cat([point_labels, label[:, None]], dim=1)
            prompt = {"input_boxes": boxes, "input_points": points, "input_labels": point_labels}
            prompt = {name: value.unflatten(0, labels.shape[:2]) for name, value in prompt.items()}
            if answer is not None and (shows_answers or not shows):
                prompt["input_masks"] = answer[:, :, 0]
            round_losses, answer = self.take_round(embeddings, prompt, labels, number)
            losses.append(round_losses)
        means = {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}
        return {**means, "loss": means["loss"] + self.nothing_of_what_was_not_shown()}

    def nothing_of_what_was_not_shown(self) -> Tensor | int:
        """0 that depends on the weights which only steps with mask prompts use.

        Processes draw for themselves whether answers are shown, and share gradients of the same weights in each step.
        """
        if not self.model.config.prompt_encoder_config.mask_prompts:
            return 0
        weights = self.model.prompt_encoder.mask_embedding.parameters()
        return sum(0 * weight.sum() for weight in weights if weight.requires_grad)

    def unreached(self) -> list[str]:
        """Patterns of the parameters on which no answer of this recipe depends."""
        # A bias of the keys moves all of a query's weights alike: the image side of the decoder leaves it out.
        patterns, prompts = ["mask_decoder.*token_to_image.k_proj.bias"], self.recipe.rounds + self.recipe.mask_rounds
        if all(self.answering(number) == THREE for number in range(prompts)):
            patterns.append("mask_decoder.hypernetworks.0.*")
        never = prompts == 1 or not (self.recipe.answer_chance or self.recipe.mask_rounds)
        if self.model.config.prompt_encoder_config.mask_prompts and never:
            patterns.append("prompt_encoder.mask_embedding.*")
        return patterns

    def take_round(
        self, embeddings: Tensor, prompt: dict[str, Tensor], labels: Tensor, number: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """A prompt's losses and the best of its answers (B, Q, 1, 4h, 4w), which is not learnt through.

        With gradient checkpointing nothing of the decoder is kept but this: its masks of all prompts and rounds would
        be far more than the encoder's layers.
        """
        if self.training and self.model.mask_decoder.transformer.blocks[0].gradient_checkpointing:
            return checkpoint(self.answer_round, embeddings, prompt, labels, number, use_reentrant=False)
        return self.answer_round(embeddings, prompt, labels, number)

    def answer_round(
        self, embeddings: Tensor, prompt: dict[str, Tensor], labels: Tensor, number: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """As `take_round`."""
        chosen = self.answering(number)
        masks, scores = self.ask(embeddings, prompt, chosen)
        several = ALL if chosen != ALL else THREE
        best = best_mask(masks[:, :, several].detach(), scores[:, :, several].detach())[0]
        return self.blame(masks, scores, labels, number), best

    def ask(self, embeddings: Tensor, prompt: dict[str, Any], chosen: slice) -> tuple[Tensor, Tensor]:
        """Embeddings (B, C, h, w) and a prompt for each object -> logits (B, Q, M, 4h, 4w), scores (B, Q, M)."""
        inputs, decoder = self.model.get_decoder_inputs(embeddings, **prompt), self.model.mask_decoder
        if self.tiles(embeddings, prompt):
            scores, masks = decoder.write_out(**inputs, chosen=chosen)
            return masks, scores
        decoded = decoder(**inputs, chosen=chosen)
        return decoded.pred_masks, decoded.iou_scores

    def tiles(self, embeddings: Tensor, prompt: dict[str, Any]) -> bool:
        """Whether to write each prompt's image out: not where arithmetic is dear and all have the same one."""
        return embeddings.device.type != "cpu" or "input_masks" in prompt

    def answering(self, number: int) -> slice:
        """Which mask tokens answer the prompt of this number."""
        if not self.trains_token_0:
            return THREE
        if self.recipe.single_mask_alone:
            return ONE if number else THREE
        return ALL

    def blame(self, masks: Tensor, scores: Tensor, labels: Tensor, number: int) -> dict[str, Tensor]:
        """The losses of an answer; token 0 beside the three counts as much as the nearest of them."""
        together = [ONE, THREE] if self.answering(number) == ALL else [ALL]
        options: dict[str, Any] = {"every_iou": self.recipe.every_iou, "iou_error": self.recipe.iou_error}
        options["answered_share"] = self.recipe.answered_share if number else 0.0
        losses = [segmentation_loss(masks[:, :, part], scores[:, :, part], labels, **options) for part in together]
        return {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}

    def first_prompt(
        self, targets: Tensor, scale: float, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A box or a click for each mask (N, h, w); the one not given is padding. -> (N, 4), (N, 1, 2), (N, 1)."""
        most = self.recipe.most_box_noise * scale * targets.shape[-1]
        boxes = noisy_boxes(targets, scale, self.recipe.box_noise, most, generator)
        points, point_labels = click_inside(targets, scale, generator)
        is_box = torch.rand(len(targets), generator=generator, device=targets.device) < self.recipe.box_chance
        boxes = boxes.masked_fill(~is_box[:, None], -1.0)
        points, point_labels = points.masked_fill(is_box[:, None], -1.0), point_labels.masked_fill(is_box, -1)
        return boxes, points[:, None], point_labels[:, None]

    def next_click(
        self, answer: Tensor, targets: Tensor, scale: float, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """A click on each answer's error, background ones only for a model that learns them."""
        background = self.model.config.prompt_encoder_config.negative_points
        return click_on_error(answer, targets, scale, background, generator)
