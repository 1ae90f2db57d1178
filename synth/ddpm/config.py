"""Keys of a DDPM: how it learns, how it rehearses, how it draws."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from synth.ddpm.network import ClassUNetConfig
from synth.ddpm.words import translate
from utils.run.config import BatchSize, Decay, Factor, Place, Rate, Side, SourceConfig
from utils.run.errors import ConfigError

Sampler = Literal["ddim", "ddpm", "ipndm", "dpmpp", "unipc"]
EmaRate = Annotated[float, Field(gt=0, lt=1)]
Level = Annotated[float, Field(ge=0, le=1e6)]


class DDPMConfig(ClassUNetConfig, SourceConfig):
    """GUIDE's settings on CIFAR are the defaults."""

    # Its rehearsal is drawn with the first four too, but a later run only draws with what is learned.
    drawing: ClassVar[set[str]] = {"sampler", "timestep_respacing", "guidance", "clip_x0", "gradient_checkpointing",
                                   "guidance_interval"}  # fmt: skip

    image_size: Side | None = Field(None, description="side in pixels; null: the data set's own")
    attention_resolutions: list[int] | None = Field(None, description="sides with attention, not attention_levels")
    # Another number without betas scales both by 1000 / diffusion_steps, as GUIDE does: see words.py
    diffusion_steps: int = Field(1000, ge=1, le=10**5, description="time steps of the full process")
    beta_start: float = Field(1e-3, ge=1e-7, lt=1, description="variance of the first step")
    beta_end: float = Field(2e-2, ge=1e-7, lt=1, description="variance of the last step")
    train_respacing: str = Field("", description="train on a subset such as ddim250; empty: all steps")
    first_task_num_steps: int = Field(100_000, ge=1, description="training steps of the first task")
    num_steps: int = Field(50_000, ge=1, description="training steps of every later task")
    batch_size: BatchSize = Field(256, description="images per training step, replay included")
    flip: bool | None = Field(None, description="show mirror images too; null: where the data set's recipe does")
    lr: Rate = Field(2e-4, description="AdamW's rate, constant")
    lr_schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="of lr, down to 0")
    weight_decay: Decay = Field(0.0, description="AdamW's")
    ema_rate: float = Field(0.9999, ge=0, lt=1, description="decay of the average that generates; 0: raw weights")
    ema_rates: list[EmaRate] = Field([], description="more averages; the best on held-out images generates")
    ema_held_out: float = Field(0.05, gt=0, le=0.5, description="share of a task's images that judges ema_rates")
    init_weights: Place | None = Field(None, description="folder of a DDPM whose average starts it")
    clip_x0: bool = Field(True, description="clamp predicted images to their range at every step of sampling")
    sampler: Sampler = Field("ddim", description="how replay is drawn")
    timestep_respacing: str = Field("ddim50", description="sampling steps: ddimN strided, N spread; empty: all")
    # sigma = sqrt(1 / alpha_bar - 1), arXiv:2404.07724
    guidance_interval: tuple[Level, Level] | None = Field(None, description="noise levels of guidance; null: all")
    autoguidance: Factor = Field(1.0, description="away from the model before the task (arXiv:2406.02507); 1: off")
    guidance: Factor = Field(0.0, description="classifier-free guidance, 1 is the plain conditional; 0: off")
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share of labels hidden in training for guidance")
    # v: arXiv:2202.00512; the weightings: arXiv:2303.09556 and arXiv:2401.11605
    prediction: Literal["epsilon", "v", "x0"] = Field("epsilon", description="what the network predicts")
    loss_weighting: Literal["none", "min_snr", "soft_min_snr"] = Field("none", description="of the times in its loss")
    # What old classes are in its training: the learner's replay, or images that it draws itself from its raw weights.
    # Or what the denoiser before the task says (arXiv:2311.14028), of images that it draws, or on its way to some.
    rehearsal: Literal["replay", "own", "distil", "trajectory", "none"] = Field("replay", description="of old classes")
    teacher_steps: int | None = Field(None, ge=1, le=10**5, description="of its drawing; null: 2, trajectory 10")
    teacher_draws: Literal["pool", "step"] = Field("pool", description="of distil: once, or anew in every step")
    # reference: as GUIDE has it, labels by chance in whole batches, and only whole batches in training
    counts: Literal["balanced", "reference"] = Field("balanced", description="of the classes in its own draw")
    # null: as many as the new task has real ones
    gr_n_generated_examples_per_task: int | None = Field(None, ge=1, le=10**7, description="its images of a task")

    translate = staticmethod(translate)  # of GUIDE's flags

    @model_validator(mode="after")
    def _fits_together(self) -> DDPMConfig:
        if self.beta_start > self.beta_end:
            raise ValueError(f"synth.beta_start={self.beta_start} is above synth.beta_end={self.beta_end}")
        if self.teacher_steps is not None and self.rehearsal not in ("distil", "trajectory"):
            why = f"synth.rehearsal={self.rehearsal!r} has no teacher"
            raise ValueError(f"synth.teacher_steps={self.teacher_steps}: {why}, use distil or trajectory")
        if self.num_teacher_steps > self.diffusion_steps:
            where = f"synth.teacher_steps={self.num_teacher_steps}"
            raise ValueError(f"{where}: there are only synth.diffusion_steps={self.diffusion_steps}")
        if self.guidance_interval is not None and self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(f"synth.guidance_interval={[*self.guidance_interval]} is empty: give the lower first")
        return self

    @property
    def draws_anew(self) -> bool:
        """Whether a teacher draws what it teaches in every step."""
        return self.rehearsal == "trajectory" or (self.rehearsal == "distil" and self.teacher_draws == "step")

    @property
    def num_teacher_steps(self) -> int:
        return self.teacher_steps or (10 if self.rehearsal == "trajectory" else 2)

    def training_settings(self) -> dict[str, Any]:
        """Leave out what is not learned: without guidance no label is hidden."""
        return {**super().training_settings(), "label_dropout": self.label_dropout if self.guidance else 0}

    def levels_with_attention(self, side: int) -> list[int]:
        """Return the levels with attention of a UNet for images of this side; they may be given by their own sides."""
        if self.attention_resolutions is None:
            return self.attention_levels
        sides = [side >> level for level in range(len(self.block_out_channels))]
        if foreign := [wanted for wanted in self.attention_resolutions if wanted not in sides]:
            raise ConfigError(f"synth.attention_resolutions={foreign}: the levels of this UNet have sides {sides}")
        return [sides.index(wanted) for wanted in self.attention_resolutions]
