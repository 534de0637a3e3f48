from collections.abc import Sequence
from typing import Literal, TypedDict

import torch

CpuCapability = Literal["generic", "avx2", "avx512", "neon"]

class CudaInfo(TypedDict):
    version: str
    architectures: list[str]

class BuildInfo(TypedDict):
    version: str
    torch: str
    compiler: str
    cxx_standard: int
    cxx_flags: str
    cuda: CudaInfo | None
    cpu_capabilities: list[str]

def build_info() -> BuildInfo: ...
def cpu_capability() -> CpuCapability: ...
def cpu_capabilities() -> list[CpuCapability]: ...
def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def gumbel_from_words(hi: torch.Tensor, lo: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...
def logistic_from_words(hi: torch.Tensor, lo: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...
