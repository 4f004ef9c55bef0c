"""Compiling kernels for a GPU that need not be there."""

import torch

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
NAMES |= {torch.float64: "fp64", torch.int32: "i32", torch.int64: "i64"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class Compiles:
    """In place of a kernel: compiles it for what it would be launched on, and runs nothing."""

    def __init__(self, kernel):
        self.kernel, self.compiled = kernel, []

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **constants):
        import triton
        from triton.backends.compiler import GPUTarget

        options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        signature = {}
        given = dict(zip(self.kernel.arg_names, args, strict=False))
        for name, value in (given | constants).items():
            if isinstance(value, torch.Tensor):
                signature[name] = f"*{NAMES[value.dtype]}"
            elif name in constants or value is None:
                signature[name] = "constexpr"
                constants[name] = value
            else:
                signature[name] = "i32"
        self.compiled.append(
            triton.compile(
                triton.compiler.ASTSource(self.kernel, signature, constants),
                target=GPUTarget("cuda", 90, 32),
                options=options,
            )
        )
