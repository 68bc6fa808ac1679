"""Settings of jobs/compile.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from voxray.config.evaluate import SalmonnBaseFlags
from voxray.config.flag_groups import CommaCounts, OutputFlags
from voxray.config.flags import Flag
from voxray.config.parse import convert
from voxray.config.salmonn_yaml import compiler_flags


class CompileSettings(OutputFlags, SalmonnBaseFlags):
    output_dir: Annotated[str, Flag(("out_dir",), path="output"), Field(min_length=1)] = "runs/compiled"
    """Folder to write to; it must be new or empty, unless --overwrite is set."""
    windows: Annotated[CommaCounts, Flag(("batch_sizes", "batch_size_eval"))] = (1,)
    """Batch sizes to compile the audio encoder for, comma separated, in windows (30 s of audio each in the released
    models, so mostly one per clip); one program each. Other batch sizes are split into these."""
    backend: Literal["aotinductor", "tensorrt"] = "aotinductor"
    """Compiler: aotinductor is part of torch and works on CPU and GPU; tensorrt is torch_tensorrt (extra: tensorrt) and
    needs a GPU."""
    optimization_level: Annotated[int, Field(ge=0, le=5)] = 3
    """How long TensorRT searches for faster kernels, from 0 to 5 (longest). For --backend tensorrt."""
    tensorrt_device: Annotated[
        str, Flag(no_effect="the model is compiled on the GPU that it is loaded on"), convert(str)
    ] = ""
    """GPU to compile on; from older scripts."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the audio on which the compiled and the uncompiled model are compared."""
    overwrite: bool = False
    """Replace what an earlier compilation wrote to --output_dir."""

    @classmethod
    def translate_yaml(
        cls, loaded: dict[Any, Any], path: Path, flags: Mapping[str, Any]
    ) -> tuple[dict[Any, Any], list[str]]:
        """Also read the nested YAML files of SALMONN's evaluator."""
        return compiler_flags(loaded, path)
