"""``PeftkernCallback``: for those who own a Trainer and never see the model it trains."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftkern.integrations.peft import PatchReport, patch, unpatch


class PeftkernCallback(TrainerCallback):
    """Patches the model of a Hugging Face Trainer, or of TRL's, and says once which layers are fused.

    The model is patched when the Trainer has it, so that evaluation without training is fast too, and again when
    training begins: by then ``model_init`` may have made another one. Checkpoints stay PEFT's own.

    Args: unpatch_at_end: give the layers their own classes back when training ends.
    Attributes: report: what the last ``patch`` found; None before the Trainer has a model.
    """

    def __init__(self, unpatch_at_end: bool = False) -> None:
        self.unpatch_at_end = unpatch_at_end
        self.report: PatchReport | None = None
        self._told = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if more.get("model") is not None:
            self.report = patch(more["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self.report = patch(more["model"])
        if state.is_world_process_zero and not self._told:
            print(self.report)
        self._told = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if self.unpatch_at_end:
            unpatch(more["model"])
