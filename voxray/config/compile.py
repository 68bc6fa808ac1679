"""Settings of jobs/compile.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from voxray.config.evaluate import SalmonnBaseFlags
from voxray.config.flag_groups import CommaCounts, OutputFlags
from voxray.config.parse import Flag
from voxray.config.salmonn_yaml import compiler_flags


class CompileSettings(OutputFlags, SalmonnBaseFlags):
    output_dir: Annotated[str, Flag(("out_dir",), path="output"), Field(min_length=1)] = "runs/compiled"
    """Folder to write to; it must be new or empty, unless --overwrite is given."""
    windows: Annotated[CommaCounts, Flag(("batch_sizes", "batch_size_eval"))] = (1,)
    """Numbers of windows (30 s of audio each in the released models, so mostly one a clip) that are compiled, one
    program each, comma separated. Other numbers are heard in parts of these."""
    backend: Literal["aotinductor", "tensorrt"] = "aotinductor"
    """What compiles: aotinductor is torch's own, on CPU and GPU; tensorrt is torch_tensorrt (extra: tensorrt), on a
    GPU."""
    optimization_level: Annotated[int, Field(ge=0, le=5)] = 3
    """How long TensorRT looks for faster kernels; 5 is longest. For --backend tensorrt."""
    tensorrt_device: Annotated[
        str, Flag(no_effect="the model is compiled on the GPU that it is loaded on"), BeforeValidator(str)
    ] = ""
    """GPU to compile on, as older scripts named it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the audio on which compiled and uncompiled model are held against each other."""
    overwrite: bool = False
    """Replace what an earlier compilation wrote to --output_dir."""

    @classmethod
    def of_file(cls, loaded: dict[Any, Any], path: Path, given: Mapping[str, Any]) -> tuple[dict[Any, Any], list[str]]:
        """Keys and values of a YAML file, and what is wrong with it; the nested files of SALMONN's evaluator too."""
        return compiler_flags(loaded, path)
