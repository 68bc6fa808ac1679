"""Flags of how several workers train together."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from voxray.config.parse import Settings


class StrategyFlags(Settings):
    strategy: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """How several workers train together: ddp replicates the model and optimizer state in each worker; fsdp shards the
    weights across workers, and with --tuning full the optimizer state as well; deepspeed shards what --zero_stage
    says."""
    zero_stage: Annotated[int, Field(ge=2, le=3)] = 2
    """What --strategy deepspeed shards: 2 the gradients and the optimizer state, 3 the weights as well (not with
    --quantize)."""
    offload_optimizer: bool = False
    """Keep the trained weights and the optimizer state in the memory of the CPU, with --strategy fsdp and --tuning
    full."""

    @property
    def shards_weights(self) -> bool:
        """Whether every worker holds only a part of the base's weights."""
        return self.strategy == "fsdp" or self.zero_stage == 3

    @property
    def shards_state(self) -> bool:
        """Whether every worker holds only a part of the gradients and of the optimizer state."""
        return self.strategy == "deepspeed" or (self.strategy == "fsdp" and getattr(self, "tuning", "") == "full")

    @property
    def fuses_optimizer(self) -> bool:
        """Whether AdamW is computed in a few kernels."""
        return getattr(self, "optim", "") == "adamw_torch_fused"

    @model_validator(mode="after")
    def _sharding_fits_the_other_flags(self) -> "StrategyFlags":
        quantized = getattr(self, "quantize", "none")
        if self.zero_stage == 3 and self.strategy != "deepspeed":
            raise ValueError("--zero_stage 3: needs --strategy deepspeed")
        if self.strategy == "fsdp" and quantized == "8bit":
            raise ValueError("--strategy fsdp: cannot shard 8-bit weights; take --quantize 4bit or none")
        if self.strategy == "fsdp" and quantized != "none" and getattr(self, "tuning", "") == "dora":
            raise ValueError("--strategy fsdp: --tuning dora needs unquantised weights; leave out --quantize 4bit")
        if self.strategy == "fsdp" and getattr(self, "compile", False):
            raise ValueError("--strategy fsdp: cannot compile sharded layers; leave out --compile")
        if self.strategy == "fsdp" and getattr(self, "tuning", "") == "full" and self.fuses_optimizer:
            raise ValueError("--optim adamw_torch_fused: not with --strategy fsdp and --tuning full")
        if self.offload_optimizer and not (self.strategy == "fsdp" and getattr(self, "tuning", "") == "full"):
            raise ValueError("--offload_optimizer: needs --strategy fsdp and --tuning full")
        if self.zero_stage == 3 and quantized != "none":
            raise ValueError(f"--zero_stage 3: cannot divide quantised weights; leave out --quantize {quantized}")
        return self
